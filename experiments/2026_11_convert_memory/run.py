# SPDX-License-Identifier: Apache-2.0
"""How much memory a conversion takes, however large the checkpoint: writes figures.json.

python experiments/2026_11_convert_memory/run.py [FOLDER]

Makes DeepSeek-V3.2 checkpoints in FP8 with more and more expert layers in FOLDER (a temporary one),
converts each in and out in fresh processes, and reads the highest resident memory of each.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tests'))

import released  # noqa: E402

DEPTHS = 5, 9, 17, 33  # Of which the last is 3.5 GB in FP8.
CONFIG = released.V32 | {
    'hidden_size': 2048, 'n_routed_experts': 16, 'n_group': 2, 'moe_intermediate_size': 1024,
    'num_nextn_predict_layers': 0, 'intermediate_size': 2048, 'vocab_size': 4096,
}  # fmt: skip

CONVERT = """
import json, pathlib, re, sys, time
from dsa_jax.convert.exporter import export_checkpoint, open_checkpoint
from dsa_jax.convert.importer import import_checkpoint, open_source
what, source, target = sys.argv[1], *map(pathlib.Path, sys.argv[2:])
if what == 'idle':
  opened = open_source(source)
elif what == 'import':
  began = time.time()
  import_checkpoint(open_source(source), target, advance=lambda n: None)
else:
  began = time.time()
  export_checkpoint(open_checkpoint(source), target, shard_bytes=2**28)
seconds = 0 if what == 'idle' else time.time() - began
peak = re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]
print(json.dumps([int(peak) / 1024, seconds]))
"""


def run(*arguments) -> tuple[float, float]:
  """Returns the highest resident memory in MiB, and the seconds."""
  command = [sys.executable, '-c', CONVERT, *map(str, arguments)]
  done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
  return json.loads(done.stdout.splitlines()[-1])


def main():
  folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
  rows = []
  for depth in DEPTHS:
    config = CONFIG | {'num_hidden_layers': depth}
    tensors = released.random_tensors(config)
    released.write(folder / 'source', config, tensors, shards=depth)
    source_mb = sum(x.nbytes for x in tensors.values()) / 2**20
    del tensors
    layers = depth - config['first_k_dense_replace']
    stack = layers * 16 * config['hidden_size'] * config['moe_intermediate_size'] * 2 / 2**20
    idle, _ = run('idle', folder / 'source', folder / 'none')
    importing, import_seconds = run('import', folder / 'source', folder / 'ours')
    exporting, export_seconds = run('export', folder / 'ours', folder / 'out')
    rows.append({
        'layers': depth, 'source_mib': source_mb, 'largest_stack_mib': stack,
        'idle_mib': idle, 'import_mib': importing, 'export_mib': exporting,
        'import_seconds': import_seconds, 'export_seconds': export_seconds,
    })  # fmt: skip
    print(json.dumps({name: round(x, 1) for name, x in rows[-1].items()}), flush=True)
    for name in ('source', 'ours', 'out'):
      shutil.rmtree(folder / name)
  path = pathlib.Path(__file__).with_name('figures.json')
  path.write_text(json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
  main()
