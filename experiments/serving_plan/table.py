# SPDX-License-Identifier: Apache-2.0
"""Writes table.md from the reports of plan.py: python experiments/serving_plan/table.py"""

import json
import pathlib

HERE = pathlib.Path(__file__).parent
GRANTED = {'v5p': 95.7, 'tpu7x': 94.8, '1x2x8': 131.3, 'v6e': 31.2}  # GiB of a device.
HEAD = (
    'model', 'devices', 'step', 'texts', 'cache', 'weights, GiB', 'cache, GiB', 'temporaries, GiB',
    'all, GiB', 'fits', 'sent, MiB', 'tokens per second', 'dollars per million',
)  # fmt: skip


def main():
  reports = [json.loads(path.read_text()) for path in HERE.glob('*.json')]
  reports.sort(key=lambda x: (x['model'] != 'v32', x['topology'], x['phase'], x['batch'], x['cache']))
  lines = ['| ' + ' | '.join(HEAD) + ' |', '| --- | --- | --- |' + ' ---: |' * (len(HEAD) - 3)]
  lines += ['| ' + ' | '.join(cells_of(report)) + ' |' for report in reports]
  (HERE / 'table.md').write_text('\n'.join(lines) + '\n')


def cells_of(x: dict) -> list[str]:
  gib, chip = x['gib'], x['topology'].split(':')[0]
  mesh = ', '.join(f'{axis} {n}' for axis, n in x['mesh'].items() if n > 1)
  name = {'1x2x8': 'H200'}.get(chip, chip)
  fits = 'yes' if gib['total'] <= GRANTED[chip] else f'no, of {GRANTED[chip]}'
  sizes = [f'{gib[part]:.1f}' for part in ('weights', 'cache', 'temporaries', 'total')]
  sent, speed = sum(x['collective_mib'].values()), x['by_roofline']
  return [
      x['model'], f'{x["devices"]} {name} ({mesh})', x['phase'], str(x['batch']), x['cache'], *sizes,
      fits, f'{sent:,.0f}', f'{speed["tokens_per_second"]:,}', f'{speed["dollars_per_million"]:.2f}',
  ]  # fmt: skip


if __name__ == '__main__':
  main()
