# SPDX-License-Identifier: Apache-2.0
"""The side of this package; `peer.py` starts this file.

python peer_ours.py FOLDER CONTEXT N_TOKENS CORE
"""

import json
import os
import resource
import sys
import time

import jax
import numpy as np

from dsa_jax.inference.load import load_checkpoint
from dsa_jax.inference.sampler import SampleConfig, Sampler


def run(folder: str, context: int, n_tokens: int):
  """Prints seconds of the processor and of the wall for prefill and for a token, and the tokens."""
  sampler = Sampler(load_checkpoint(folder), capacity=context + 64)
  tokens = np.random.default_rng(0).integers(sampler.cfg.vocab_size, size=(1, context)).tolist()
  config = SampleConfig(max_new_tokens=n_tokens)
  list(sampler.steps(sampler.read(tokens, n_tokens), config))  # Compiles.
  began = time.process_time(), time.perf_counter()
  prefix = jax.block_until_ready(sampler.read(tokens, n_tokens))
  prefill = time.process_time() - began[0], time.perf_counter() - began[1]
  ids, decode, began = [], [], (time.process_time(), time.perf_counter())
  for [word] in sampler.steps(prefix, config):
    ids.append(word)
    decode.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    began = time.process_time(), time.perf_counter()
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(json.dumps({
      'prefill': prefill, 'decode': np.median(decode[1:-1], axis=0).tolist(), 'peak_bytes': peak,
      'ids': ids, 'logits': np.asarray(prefix.logits)[0, :64].tolist(),
  }))  # fmt: skip


if __name__ == '__main__':
  os.sched_setaffinity(0, {int(sys.argv[4])})
  run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
