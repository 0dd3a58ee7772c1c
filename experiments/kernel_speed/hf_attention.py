# SPDX-License-Identifier: Apache-2.0
"""Measures the attention of transformers' deepseek_v32 layer, on torch, beside ours.

Two environments share one file of results. Run it once in each (jax with this package, torch with
transformers):

  python experiments/kernel_speed/hf_attention.py
"""

import argparse
import importlib.util
import json
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

RESULTS = pathlib.Path(__file__).parent / 'transformers.json'  # Which bench.py reads.
DIMS = dict(kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=128, v_head_dim=128,
            q_lora_rank=256, index_n_heads=4, index_head_dim=32, index_topk=512)


def torch_layer(n: int):
  import torch
  from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

  cfg = hf.DeepseekV32Config(
      hidden_size=512, num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=1,
      attn_implementation='sdpa', **DIMS,
  )
  torch.manual_seed(0)
  layer, rotary = hf.DeepseekV32Attention(cfg, 0).eval(), hf.DeepseekV32RotaryEmbedding(cfg)
  x, position = torch.randn(1, n, 512), torch.arange(n)[None]
  mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]

  @torch.no_grad()
  def forward():
    return layer(x, rotary(x, position), mask)[0].sum().item()

  return forward


def our_layer(n: int):
  from flax import nnx
  import jax
  import jax.numpy as jnp

  from dsa_jax.config import ModelConfig
  from dsa_jax.nn.attention.mla import MLA
  from dsa_jax.nn.attention.types import Mode

  cfg = ModelConfig(dim=512, n_heads=16, dtype='float32', max_seq_len=n, original_seq_len=n, **DIMS)
  layer = MLA(cfg, out_scale=1.0, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (1, n, 512))
  position = jnp.arange(n, dtype=jnp.int32)[None]
  mode = Mode(attention='sparse', backend='xla')
  run = jax.jit(lambda x: layer(x, 0 * position, position + 1, jax.random.key(0), mode)[0].sum())
  return lambda: float(run(x))


def measure(n: int, runs: int) -> str:
  """Returns the seconds of the fastest run, and the growth of resident memory at its peak."""
  peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  forward = (torch_layer if importlib.util.find_spec('torch') else our_layer)(n)
  before, seconds = peak(), []
  for _ in range(runs + 1):
    began = time.perf_counter()
    assert np.isfinite(forward())
    seconds.append(time.perf_counter() - began)
  return f'{min(seconds[1:]):.2f} s, {peak() - before:.0f} MiB'


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--sizes', type=int, nargs='*', default=[1024, 2048, 4096, 8192])
  parser.add_argument('--runs', type=int, default=3)
  parser.add_argument('--one', type=int, help='measure one size in this process')
  args = parser.parse_args()
  if args.one:
    print(measure(args.one, args.runs))
    return
  torch = importlib.util.find_spec('torch')
  name, row = 'transformers (torch, sdpa)' if torch else 'dsa_jax (xla, sparse)', {}
  for n in args.sizes:  # Each in a process of its own: a peak never falls again.
    command = [sys.executable, __file__, f'--one={n}', f'--runs={args.runs}']
    row[str(n)] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    print(name, n, row[str(n)], flush=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {name: row}, indent=1) + '\n')


if __name__ == '__main__':
  main()
