# SPDX-License-Identifier: Apache-2.0
"""Times PyTorch's dense attention beside our kernels; bench_gpu.py calls this.

The programs are scaled-dot-product attention by whatever PyTorch picks, and FlexAttention, both
causal, for the last queries of a context. Keys have 192 channels and values 128, which are padded
to 192 for the former.
"""

import importlib.util
import time

from dsa_jax.families.deepseek import DEEPSEEK_V32

H = DEEPSEEK_V32.n_heads
E = DEEPSEEK_V32.qk_nope_head_dim + DEEPSEEK_V32.qk_rope_head_dim
V = DEEPSEEK_V32.v_head_dim


def rows(args):
  """Yields a row for each program and size, or none where PyTorch is not installed."""
  if importlib.util.find_spec('torch') is None:
    return
  import torch  # pylint: disable=import-outside-toplevel

  for n in args.torch_sizes:
    n_queries = min(args.queries, n)
    normal = lambda t, width: torch.randn(
        1, H, t, width, device='cuda', dtype=torch.bfloat16, requires_grad=True
    )
    q, k, v = normal(n_queries, E), normal(n, E), normal(n, V)
    pairs = n_queries * (n - (n_queries - 1) / 2)
    forward = 2 * pairs * H * (E + V)
    work = {'forward': forward, 'forward_backward': forward + 2 * pairs * H * (3 * E + 2 * V)}
    for name, attend in (('torch_sdpa', sdpa), ('torch_flex', flex(n_queries, n))):
      for what, flops in work.items():
        try:
          seconds = timed(attend, (q, k, v), what == 'forward_backward', args.seconds)
        except (RuntimeError, torch.OutOfMemoryError) as error:
          print(f'{name}, {what}, {n} keys: {str(error)[:300]}', flush=True)
          continue
        ms = 1e3 * seconds
        yield {
            'S': n, 'queries': n_queries, 'program': f'{name}_{what}', 'device_ms': ms,
            'wall_ms': None, 'roofline_ms': None, 'tflops': flops / ms / 1e9,
        }  # fmt: skip


def sdpa(q, k, v):
  import torch.nn.attention.bias as bias
  import torch.nn.functional as F

  v = F.pad(v, (0, E - V))
  mask = bias.causal_lower_right(q.shape[2], k.shape[2])
  return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(n_queries: int, n_keys: int):
  import torch
  from torch.nn.attention.flex_attention import create_block_mask, flex_attention

  seen = lambda b, h, t, s: s <= t + n_keys - n_queries
  mask = create_block_mask(seen, None, None, n_queries, n_keys, device='cuda')
  run = torch.compile(flex_attention, dynamic=False)
  return lambda q, k, v: run(q, k, v, block_mask=mask)


def timed(attend, inputs, with_gradients: bool, seconds: float) -> float:
  """Returns the median time of events on the device, after a warm-up."""
  import torch

  def run():
    if not with_gradients:
      with torch.no_grad():
        return attend(*inputs)
    out = attend(*inputs)
    return torch.autograd.grad(out, inputs, torch.ones_like(out))

  run()
  times, began = [], time.perf_counter()
  while not times or time.perf_counter() - began < seconds:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    times.append(start.elapsed_time(end) / 1e3)
  return sorted(times)[len(times) // 2]
