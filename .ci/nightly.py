#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs what is slow by nature: the parts whose files have changed, and one part in turn.

python .ci/nightly.py               # what is due
python .ci/nightly.py --minutes=6   # what is due, as far as it fits; the rest comes first next time
python .ci/nightly.py --all         # everything
python .ci/nightly.py --list        # says what is due, and why, and runs nothing
python .ci/nightly.py --turn=100    # the number of this run, from 1 to 100 and again

A part is due where this machine has never seen it pass, where its files have changed since the
commit at which it last passed here, and where it has sat out four runs. A fifth of the parts runs
each time, those that have sat out longest first. So each part runs at least once in five runs, if
the minutes are at least a fifth of what all parts take. What this machine has seen is kept in the
user's cache folder. A machine that has seen nothing begins with another part each hour, so that new
machines, too, come to all of them.
"""

import argparse
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
SEEN = CACHE / 'dsa_jax' / 'nightly.json'
SITS_OUT = 4  # Runs.
UNKNOWN = 300  # Seconds that a part is thought to take before it was seen.


class Part(NamedTuple):
  """Nightly tests, by their files, what else their outcome depends on, and maybe another command."""

  tests: tuple[str, ...]
  depends_on: tuple[str, ...]
  command: tuple[str, ...] = ()  # Instead of pytest.

  @property
  def files(self) -> tuple[str, ...]:
    return self.tests + self.depends_on + helpers(self.tests)


def helpers(tests: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the modules of tests/ that test files import, and the scripts that they start."""
  text = '\n'.join((ROOT / name).read_text() for name in tests if (ROOT / name).is_file())
  modules = [path for path in (ROOT / 'tests').rglob('*.py') if not path.name.startswith('test_')]
  is_named = lambda stem: re.search(rf'^\s*(import|from) {stem}\b|\b{stem}\.py\b', text, re.MULTILINE)
  return tuple(str(path.relative_to(ROOT)) for path in sorted(modules) if is_named(path.stem))


KERNELS = ('dsa_jax/kernels',)
MODELS = ('dsa_jax/kernels', 'dsa_jax/nn', 'dsa_jax/parallel', 'dsa_jax/selection', 'dsa_jax/config.py')
TRAINING = ('dsa_jax/train.py', 'dsa_jax/training', 'dsa_jax/parallel', 'configs')
CHECKPOINTS = ('dsa_jax/convert', 'dsa_jax/families', 'dsa_jax/training')
PARTS = {
    'selection': Part(('tests/kernels/test_index_topk.py', 'tests/kernels/test_index_kl.py'), KERNELS),
    'sparse attention': Part(('tests/kernels/test_sparse_attention.py',), KERNELS),
    'other attention': Part(
        ('tests/kernels/test_dense_attention.py', 'tests/kernels/test_indexed_attention.py'), KERNELS
    ),
    'models on chips': Part(
        (
            'tests/nn/test_tpu_model.py', 'tests/test_bench_gpu.py', 'tests/compile/test_codes.py',
            'tests/kernels/test_grouped_matmul.py',
        ),
        MODELS,
    ),
    'caches': Part(
        (
            'tests/inference/test_extend.py', 'tests/inference/test_drafts.py',
            'tests/inference/test_batching.py', 'tests/reporting/test_inspect.py',
            'tests/compile/test_decode.py', 'tests/inference/test_weights.py',
            'tests/reporting/test_evaluate.py',
        ),
        (*MODELS, 'dsa_jax/inference'),
    ),
    'meshes': Part(('tests/parallel/test_meshes.py',), MODELS),
    'configs': Part(('tests/test_configs.py',), (*MODELS, 'configs')),
    'golden numbers': Part(
        ('tests/test_golden.py', 'tests/test_parity.py', 'tests/test_family_mistakes.py'), MODELS
    ),
    'laws': Part(('tests/test_laws.py',), MODELS),
    'kills': Part(('tests/test_train.py', 'tests/data/test_streaming.py'), (*TRAINING, 'dsa_jax/data')),
    'processes': Part(('tests/parallel/test_processes.py',), (*TRAINING, 'dsa_jax/data')),
    'tokens': Part(('tests/data/test_tokenizing.py', 'tests/test_own_tokens.py'), ('dsa_jax/data',)),
    'conversion': Part(
        (
            'tests/convert/test_convert.py', 'tests/convert/test_convert_faults.py',
            'tests/convert/test_convert_scale.py', 'tests/convert/test_export.py',
            'tests/convert/test_gguf.py', 'tests/test_parity_dense.py',
        ),
        CHECKPOINTS,
    ),
    'sampling': Part(('tests/test_sample.py',), (*CHECKPOINTS, 'dsa_jax/inference')),
    'notebooks': Part(('tests/test_notebooks.py',), (*TRAINING, 'dsa_jax/inference', 'notebooks')),
    'compile reports': Part(
        ('tests/compile/test_compile_report.py', 'tests/compile/test_compile_gpu.py'),
        ('dsa_jax/kernels', 'dsa_jax/compile'),
    ),
    'samplers on meshes': Part(
        ('tests/inference/test_sampler_meshes.py',), (*MODELS, 'dsa_jax/inference')
    ),
    'evaluations on meshes': Part(
        ('tests/evaluation/test_evaluation_meshes.py',), (*MODELS, 'dsa_jax/evaluation', 'dsa_jax/inference')
    ),
    'measured costs': Part(
        ('tests/cost/test_measure.py',), ('dsa_jax/inference', 'dsa_jax/cost', 'experiments/cost_claim/measure.py')
    ),
    'wheel': Part(('tests/test_wheel.py',), ('setup.cfg', 'pyproject.toml')),
    'pods': Part(
        ('experiments/pod_plan',), MODELS,
        (sys.executable, 'experiments/pod_plan/plan.py', '--stage=warmup'),
    ),
}  # fmt: skip


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--all', action='store_true', help='everything, due or not')
  parser.add_argument('--list', action='store_true', help='only say what is due')
  parser.add_argument('--minutes', type=float, default=float('inf'), help='start no part that takes longer')
  parser.add_argument('--turn', type=int, metavar='N', help='only say which of N turns this is')
  args = parser.parse_args()
  seen = json.loads(SEEN.read_text()) if SEEN.exists() else {}
  if args.turn:
    print(seen.get('runs', 0) % args.turn + 1)
    return
  due = dict.fromkeys(PARTS, 'asked for') if args.all else due_parts(seen)
  for name in PARTS:
    print(f'nightly: {name}: {due.get(name, "sits out")}', flush=True)
  if args.list:
    return
  failed = run_parts(due, seen, args.minutes * 60)
  remember(seen | {'runs': seen.get('runs', 0) + 1})
  if failed:
    sys.exit(f'nightly: failed: {", ".join(failed)}')


def run_parts(due: dict[str, str], seen: dict, seconds: float) -> list[str]:
  """Runs the due parts that fit into the seconds, at least one, and returns those that failed."""
  ends, failed, ran = time.monotonic() + seconds, [], set()
  for name in due:
    if ran and time.monotonic() + seen.get(name, {}).get('seconds', UNKNOWN) > ends:
      print(f'nightly: {name}: waits for the next run', flush=True)
      continue
    ran.add(name)
    began = time.monotonic()
    if run(PARTS[name]):
      seen[name] = {'commit': head(), 'sat_out': 0, 'seconds': round(time.monotonic() - began)}
    else:
      failed.append(name)
      seen.pop(name, None)
    remember(seen)
  for name in seen.keys() & (PARTS.keys() - ran):
    seen[name]['sat_out'] += 1
  return failed


def remember(seen: dict):
  SEEN.parent.mkdir(parents=True, exist_ok=True)
  new = SEEN.with_suffix('.new')  # A kill leaves the old file, or the new one.
  new.write_text(json.dumps(seen, indent=1))
  new.replace(SEEN)


def due_parts(seen: dict) -> dict[str, str]:
  """Returns the parts to run, each with the reason; those that have sat out longest come first."""
  sat_out = lambda name: seen[name]['sat_out'] if name in seen else float('inf')
  first = int(time.time() / 3600) % len(PARTS)
  in_turn = sorted([*PARTS][first:] + [*PARTS][:first], key=sat_out, reverse=True)
  reasons = {name: reason(seen.get(name), PARTS[name]) for name in in_turn}
  n_due = sum(map(bool, reasons.values()))
  fair_share = -(-len(PARTS) // (SITS_OUT + 1))
  others = [name for name in in_turn if not reasons[name]][: max(fair_share - n_due, 0)]
  return {name: reasons[name] or 'sat out longest' for name in in_turn if reasons[name] or name in others}


def reason(last: dict | None, part: Part) -> str:
  if last is None:
    return 'never seen here'
  if last['sat_out'] >= SITS_OUT:
    return f'sat out {last["sat_out"]} runs'
  unchanged = git('diff', '--quiet', last['commit'], '--', *part.files).returncode == 0
  return '' if unchanged else 'its files have changed'


def run(part: Part) -> bool:
  command = part.command or ('pytest', '-m', 'nightly', *part.tests)
  print('nightly:', shlex.join(command), flush=True)
  began = time.monotonic()
  code = subprocess.run(command, cwd=ROOT).returncode
  print(f'nightly: ended with {code} after {time.monotonic() - began:.0f} s', flush=True)
  return code == 0


def head() -> str:
  return git('rev-parse', 'HEAD').stdout.strip()


def git(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(['git', *arguments], cwd=ROOT, capture_output=True, text=True)


if __name__ == '__main__':
  main()
