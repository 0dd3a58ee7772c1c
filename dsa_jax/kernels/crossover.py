# SPDX-License-Identifier: Apache-2.0
"""From which context on attention to a selection is cheaper as sparse than as masked dense."""

# Context / K at which a forward and backward pass of `sparse_attention` takes as long as one of
# `dense_attention` with `indices`. Measured by experiments/kernel_speed: see its README.
# Not yet measured on a TPU or a GPU.
CROSSOVER = {'reference': 1, 'xla': 4, 'tpu': 1, 'gpu': 1}


def faster_attention(backend: str, seq_len: int, topk: int) -> str:
  """Returns 'masked' or 'sparse': the same numbers, at the lower cost."""
  return 'sparse' if seq_len > CROSSOVER[backend] * topk else 'masked'
