# SPDX-License-Identifier: Apache-2.0
"""One training step of a small model at a long context: python experiments/kernel_speed/step.py

Prints for each stage its seconds, the peak of resident memory, and the temporary memory that the
compiler reports, with the largest arrays of the program and the part that made each.
"""

import argparse
import math
import re
import resource
import time

import jax
import jax.numpy as jnp

from dsa_jax.config import ModelConfig
from dsa_jax.data.batch import Batch
from dsa_jax.nn.attention.types import Mode
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.stages import STAGES
from dsa_jax.training.state import init_params, model_graph, new_state
from dsa_jax.training.step import make_train_step

BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'pred': 1}


def small_model(context: int) -> ModelConfig:
  return ModelConfig(
      vocab_size=256, dim=128, n_layers=2, n_dense_layers=2, inter_dim=512, n_heads=4,
      q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
      index_n_heads=4, index_head_dim=32, index_topk=512, max_seq_len=context,
      original_seq_len=context, dtype='float32',
  )


def one_document(context: int, cfg: ModelConfig) -> Batch:
  tokens = jax.random.randint(jax.random.key(0), (1, context), 0, cfg.vocab_size)
  position = jnp.arange(context, dtype=jnp.int32)[None]
  fields = {
      'tokens': tokens, 'targets': jnp.roll(tokens, -1, axis=1),
      'weights': jnp.ones((1, context), jnp.float32),
      'start': jnp.zeros_like(position), 'end': position + 1,
  }
  return Batch(**fields)


def run(stage: str, context: int):
  cfg, optim = small_model(context), OptimConfig()
  trains = STAGES[stage].trains
  mode = Mode(
      attention=STAGES[stage].attention[0],
      backend='xla',
      index_loss='indexer' in trains,
      remat='layer',
  )
  state = new_state(init_params(cfg, seed=0), trains, optim, seed=0)
  step = make_train_step(model_graph(cfg), trains, mode, optim)
  inputs = state, one_document(context, cfg), {part: 1e-3 for part in trains}
  compiled = step.lower(*inputs).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  began = time.perf_counter()
  _, metrics = jax.block_until_ready(compiled(*inputs))
  seconds = time.perf_counter() - began
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB.
  print(f'\n{stage} at {context} tokens: {seconds:.1f} s, loss {metrics["lm_loss"]:.3f}, '
        f'peak resident {peak / 2**30:.2f} GiB, temporary {temporary / 2**30:.2f} GiB', flush=True)
  print('| MiB | array | made by |\n| ---: | --- | --- |')
  for size, shape, name in largest(compiled.as_text()):
    print(f'| {size / 2**20:.0f} | {shape} | {name} |', flush=True)


def largest(text: str, n: int = 12) -> list[tuple[float, str, str]]:
  """Returns the largest arrays that a compiled program makes, one for each shape and maker."""
  sizes = {}
  line = r'= (\w+)\[([\d,]+)\]\S* (\w[\w-]*)\(.*?op_name="([^"]*)"'
  for dtype, shape, op, name in re.findall(line, text):
    if op in ('parameter', 'get-tuple-element', 'bitcast', 'tuple') or dtype not in BYTES:
      continue
    size = BYTES[dtype] * math.prod(map(int, shape.split(',')))
    sizes[f'{dtype}[{shape}]', '/'.join(name.split('/')[-3:])] = size
  ranked = sorted(((size, *key) for key, size in sizes.items()), reverse=True)
  return ranked[:n]


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--stages', nargs='*', default=['warmup', 'sparse'], choices=list(STAGES))
  parser.add_argument('--context', type=int, default=65_536)
  args = parser.parse_args()
  for stage in args.stages:
    run(stage, args.context)
