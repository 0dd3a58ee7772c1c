# SPDX-License-Identifier: Apache-2.0
"""Measures a decoded token, beside an earlier build: python experiments/model_speed/sampling.py

With --baseline=FOLDER, another checkout of the package (`git worktree add FOLDER COMMIT`) takes turns.
The model is small, its weights and the rows of its cache of 16K tokens are random.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
CONTEXT = 16_384
DRAWS = {
    'greedy': {},
    'top_k': {'temperature': 1.0, 'top_k': 50},
    'top_p': {'temperature': 1.0, 'top_p': 0.9},
    'all': {'temperature': 1.0},
}


def measure(dtype: str, n_tokens: int) -> dict[str, dict]:
  """Returns of each way to draw: seconds of the processor and of the wall of a token, and the ids."""
  from flax import nnx
  import jax
  import jax.numpy as jnp

  from dsa_jax.config import ModelConfig
  from dsa_jax.inference.cache import init_cache
  from dsa_jax.inference.sampler import Prefix, SampleConfig, Sampler
  from dsa_jax.training.state import init_params, model_graph

  cfg = ModelConfig(
      vocab_size=ModelConfig.vocab_size, dim=128, n_layers=2, n_dense_layers=1, inter_dim=256, n_heads=8,
      q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
      index_n_heads=4, index_head_dim=32, index_topk=512, n_routed_experts=8,
      n_activated_experts=2, n_expert_groups=1, n_limited_groups=1, moe_inter_dim=128,
      max_seq_len=CONTEXT, original_seq_len=CONTEXT, dtype=dtype,
  )  # fmt: skip
  sampler = Sampler(nnx.merge(model_graph(cfg), init_params(cfg, seed=0)))
  cache = init_cache(cfg, 1, CONTEXT, fmt=dtype)
  fill = lambda x: jax.random.normal(jax.random.key(0), x.shape, x.dtype)
  cache = cache._replace(
      **jax.tree.map(fill, {'kv': cache.kv, 'index_key': cache.index_key}),
      length=jnp.full(1, CONTEXT - n_tokens, jnp.int32),
  )
  prefix = Prefix(cache, jax.random.normal(jax.random.key(2), (1, cfg.vocab_size)))
  rows = {}
  for name, drawing in DRAWS.items():
    config = SampleConfig(max_new_tokens=n_tokens, **drawing)
    list(sampler.steps(prefix, config))  # Compiles.
    began = time.process_time(), time.perf_counter()
    ids = [word for [word] in sampler.steps(prefix, config)]
    spent = time.process_time() - began[0], time.perf_counter() - began[1]
    rows[name] = {'processor': spent[0] / n_tokens, 'wall': spent[1] / n_tokens, 'ids': ids}
  return rows


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--baseline', type=pathlib.Path, help='another checkout of the package')
  parser.add_argument('--tokens', type=int, default=50)
  parser.add_argument('--turns', type=int, default=3)
  parser.add_argument('--one', choices=['float32', 'bfloat16'], help='measure once, in this process')
  args = parser.parse_args()
  if args.one:
    print(json.dumps(measure(args.one, args.tokens)))
    return
  builds = {'now': ROOT} | ({'before': args.baseline} if args.baseline else {})
  results = {}
  for dtype in 'float32', 'bfloat16':
    runs = {name: [] for name in builds}
    for _ in range(args.turns):
      for name, folder in builds.items():
        command = [sys.executable, __file__, f'--one={dtype}', f'--tokens={args.tokens}']
        env = os.environ | {'PYTHONPATH': str(folder)}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    results[dtype] = {name: summary(of_build) for name, of_build in runs.items()}
    (HERE / 'sampling.json').write_text(json.dumps(results, indent=1) + '\n')
    print_rows(dtype, results[dtype])


def summary(runs: list[dict]) -> dict[str, dict]:
  """Returns milliseconds of the fastest of several runs, and the ids, which must not differ."""
  rows = {}
  for draw in DRAWS:
    ids = runs[0][draw]['ids']
    assert all(run[draw]['ids'] == ids for run in runs), draw
    least = {k: 1e3 * min(run[draw][k] for run in runs) for k in ('processor', 'wall')}
    rows[draw] = least | {'ids': ids}
  return rows


def print_rows(dtype: str, results: dict):
  for draw, now in results['now'].items():
    line = f'{dtype:8s} {draw:6s} now {now["processor"]:6.2f} ms of processor, {now["wall"]:6.2f} wall'
    if before := results.get('before', {}).get(draw):
      ratio = now['processor'] / before['processor']
      line += f'; before {before["processor"]:6.2f} and {before["wall"]:6.2f}: {ratio:.2f}'
      line += ', same tokens' if now['ids'] == before['ids'] else ', other tokens'
    print(line, flush=True)


if __name__ == '__main__':
  main()
