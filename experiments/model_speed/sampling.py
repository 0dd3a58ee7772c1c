# SPDX-License-Identifier: Apache-2.0
"""Measures a decoded token, beside an earlier build: python experiments/model_speed/sampling.py

With --baseline=FOLDER, another checkout of the package (`git worktree add FOLDER COMMIT`) takes turns:
each build has a process of its own, which compiles once, and they write texts alternately. The model
is small, its weights and the rows of its cache are random.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
DRAWS = {
    'greedy': {},
    'top_k': {'temperature': 1.0, 'top_k': 50},
    'top_p': {'temperature': 1.0, 'top_p': 0.9},
    'all': {'temperature': 1.0},
}


def serve(dtype: str, context: int, n_tokens: int, draws: list[str]):
  """Writes a text for each line of the input, and prints what its tokens took."""
  sampler, prefix = make_sampler(dtype, context, n_tokens)
  from dsa_jax.inference.sampler import SampleConfig

  configs = {draw: SampleConfig(max_new_tokens=n_tokens, **DRAWS[draw]) for draw in draws}
  for config in configs.values():
    list(sampler.steps(prefix, config))  # Compiles.
  print(json.dumps('ready'), flush=True)
  for line in sys.stdin:
    began = time.process_time(), time.perf_counter()
    ids = [word for [word] in sampler.steps(prefix, configs[line.strip()])]
    spent = time.process_time() - began[0], time.perf_counter() - began[1]
    row = {'processor': 1e3 * spent[0] / n_tokens, 'wall': 1e3 * spent[1] / n_tokens, 'ids': ids}
    print(json.dumps(row), flush=True)


def make_sampler(dtype: str, context: int, n_tokens: int):
  """Returns a sampler and a prefix, which so many tokens fill up."""
  from flax import nnx
  import jax
  import jax.numpy as jnp

  from dsa_jax.config import ModelConfig
  from dsa_jax.inference.cache import init_cache
  from dsa_jax.inference.sampler import Prefix, Sampler
  from dsa_jax.training.state import init_params, model_graph

  cfg = ModelConfig(
      vocab_size=ModelConfig.vocab_size, dim=128, n_layers=2, n_dense_layers=1, inter_dim=256, n_heads=8,
      q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
      index_n_heads=4, index_head_dim=32, index_topk=512, n_routed_experts=8,
      n_activated_experts=2, n_expert_groups=1, n_limited_groups=1, moe_inter_dim=128,
      max_seq_len=context, original_seq_len=context, dtype=dtype,
  )  # fmt: skip
  sampler = Sampler(nnx.merge(model_graph(cfg), init_params(cfg, seed=0)))
  cache = init_cache(cfg, 1, context, fmt=dtype)
  fill = lambda x: jax.random.normal(jax.random.key(0), x.shape, x.dtype)
  cache = cache._replace(
      **jax.tree.map(fill, {'kv': cache.kv, 'index_key': cache.index_key}),
      length=jnp.full(1, context - n_tokens, jnp.int32),
  )
  fields = cache, jax.random.normal(jax.random.key(2), (1, cfg.vocab_size))
  if dataclasses.is_dataclass(Prefix):  # It knows its mesh since November 29.
    from dsa_jax.parallel.mesh import MeshConfig

    fields = *fields, MeshConfig()
  return sampler, Prefix(*fields)


class Build:
  """A process that writes texts with one checkout of the package."""

  def __init__(self, folder: pathlib.Path, dtype: str, args: argparse.Namespace):
    command = [
        sys.executable, __file__, f'--serve={dtype}', f'--tokens={args.tokens}', f'--context={args.context}',
        f'--draws={args.draws}',
    ]  # fmt: skip
    self._process = subprocess.Popen(
        command, env=os.environ | {'PYTHONPATH': str(folder.resolve())}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    self._answer()

  def write(self, draw: str) -> dict:
    print(draw, file=self._process.stdin, flush=True)
    return self._answer()

  def end(self):
    self._process.stdin.close()
    self._process.wait()

  def _answer(self):
    if not (line := self._process.stdout.readline()):
      raise SystemExit(f'a build has ended with {self._process.wait()}.')
    return json.loads(line)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--baseline', type=pathlib.Path, help='another checkout of the package')
  parser.add_argument('--context', type=int, default=16_384, help='tokens that the cache holds in the end')
  parser.add_argument('--tokens', type=int, default=50, help='of each text')
  parser.add_argument('--turns', type=int, default=3, help='texts of each build, for each way to draw')
  parser.add_argument('--draws', default=','.join(DRAWS), help='ways to draw, separated by commas')
  parser.add_argument('--dtypes', default='float32,bfloat16')
  parser.add_argument('--json', type=pathlib.Path, default=HERE / 'sampling.json')
  parser.add_argument('--serve', choices=['float32', 'bfloat16'], help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    return serve(args.serve, args.context, args.tokens, args.draws.split(','))
  folders = {'now': ROOT} | ({'before': args.baseline} if args.baseline else {})
  results = {}
  for dtype in args.dtypes.split(','):
    builds = {name: Build(folder, dtype, args) for name, folder in folders.items()}
    runs = take_turns(builds, args.draws.split(','), args.turns)
    for build in builds.values():
      build.end()
    results[dtype] = {name: summary(of_build) for name, of_build in runs.items()}
    args.json.write_text(json.dumps(results, indent=1) + '\n')
    print_rows(dtype, args.context, results[dtype], runs)


def take_turns(builds: dict[str, Build], draws: list[str], turns: int) -> dict[str, dict[str, list]]:
  """Returns what each build took for each text, by build and draw; who begins changes with each turn."""
  runs = {name: {draw: [] for draw in draws} for name in builds}
  for turn in range(turns):
    for draw in draws:
      for name in list(builds)[:: -1 if turn % 2 else 1]:
        runs[name][draw].append(builds[name].write(draw))
  return runs


def summary(runs: dict[str, list]) -> dict[str, dict]:
  """Returns the median milliseconds of a token, and the ids, which must not differ between turns."""
  rows = {}
  for draw, of_draw in runs.items():
    ids = of_draw[0]['ids']
    assert all(run['ids'] == ids for run in of_draw), draw
    middle = {k: statistics.median(run[k] for run in of_draw) for k in ('processor', 'wall')}
    rows[draw] = middle | {'ids': ids}
  return rows


def print_rows(dtype: str, context: int, results: dict, runs: dict):
  for draw, now in results['now'].items():
    line = f'{dtype:8s} {context:,} {draw:6s} now {now["processor"]:6.2f} ms of processor, {now["wall"]:6.2f} wall'
    if before := results.get('before', {}).get(draw):
      line += f'; before {before["processor"]:6.2f} and {before["wall"]:6.2f}'
      for kind in 'processor', 'wall':
        pairs = zip(runs['now'][draw], runs['before'][draw])
        ratios = sorted(a[kind] / b[kind] for a, b in pairs)
        quarter = len(ratios) // 4
        line += f'; {kind} {statistics.median(ratios):.3f} ({ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f})'
      line += ', same tokens' if now['ids'] == before['ids'] else ', other tokens'
    print(line, flush=True)


if __name__ == '__main__':
  main()
