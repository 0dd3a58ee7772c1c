# SPDX-License-Identifier: Apache-2.0
"""Measures a running batch beside one text after the other: python experiments/model_speed/batching.py

Sixteen ragged requests of a small model with random weights, all tokens per second counted. Both ways
take turns in one process, and both have compiled what they need before.
"""

import argparse
import json
import pathlib
import statistics
import time

from flax import nnx
import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.inference.sampler import SampleConfig, Sampler
from dsa_jax.training.state import init_params, model_graph

HERE = pathlib.Path(__file__).parent
CFG = ModelConfig(
    vocab_size=32_768, dim=512, n_layers=6, n_dense_layers=6, inter_dim=2048, n_heads=8, q_lora_rank=256,
    kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, index_n_heads=4,
    index_head_dim=64, index_topk=256, n_routed_experts=0, max_seq_len=4096, original_seq_len=4096,
    dtype='float32',
)  # fmt: skip


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--requests', type=int, default=16)
  parser.add_argument('--turns', type=int, default=3)
  parser.add_argument('--slots', type=int, default=16)
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  lengths = rng.integers(20, 600, args.requests)
  prompts = [rng.integers(0, CFG.vocab_size, n).tolist() for n in lengths]
  config = SampleConfig(max_new_tokens=128, stop=())
  sampler = Sampler(nnx.merge(model_graph(CFG), init_params(CFG, seed=0)), capacity=1024)
  ways = {
      'one after the other': lambda: [sampler.generate([prompt], config)[0] for prompt in prompts],
      'running batch': lambda: [
          x.ids for x in sorted(sampler.complete(prompts, config, slots=args.slots))
      ],
  }
  first = {name: way() for name, way in ways.items()}  # Compiles.
  seconds = {name: [] for name in ways}
  for _ in range(args.turns):
    for name, way in ways.items():
      began = time.perf_counter()
      way()
      seconds[name].append(time.perf_counter() - began)
  n_tokens = args.requests * config.max_new_tokens
  results = {
      'tokens': n_tokens,
      'slots': args.slots,
      'prompt_lengths': lengths.tolist(),
      'tokens_per_second': {name: n_tokens / statistics.median(s) for name, s in seconds.items()},
      'ratio': statistics.median(a / b for a, b in zip(*seconds.values())),
      'texts_that_are_equal': sum(a == b for a, b in zip(*first.values())),
  }
  (HERE / 'batching.json').write_text(json.dumps(results, indent=1) + '\n')
  print(json.dumps(results, indent=1))


if __name__ == '__main__':
  main()
