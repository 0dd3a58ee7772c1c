# SPDX-License-Identifier: Apache-2.0
"""Times the products of experts on this CPU: ours, jax's own, and one dense product of equal work.

python experiments/model_speed/grouped_matmul.py

Writes grouped_matmul.json and grouped_matmul.png. Arms take turns, and each ratio is the median of
those of single rounds. jax's `ragged_dot` needs [rows, experts, channels] of memory, so it is
measured, and ours beside it, on fewer rows where experts are many.
"""

import json
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from dsa_jax.kernels import grouped_matmul

TOKENS, ACTIVE, D, F = 8192, 8, 512, 256
EXPERTS = 8, 16, 32, 64, 128, 256
MOST_OF_JAX = 2**20  # Rows times experts of a product by `ragged_dot`, which then takes some 6 GiB.
ROUNDS = 5


def main():
  rows = [measure(n) for n in EXPERTS]
  about = {
      'machine': f'{platform.processor() or platform.machine()}, {len(jax.devices())} device',
      'jax': jax.__version__,
      'date': time.strftime('%Y-%m-%d'),
      'shape': {'rows': TOKENS * ACTIVE, 'D': D, 'F': F, 'dtype': 'float32'},
  }
  path = pathlib.Path(__file__).with_suffix('.json')
  path.write_text(json.dumps(about | {'rows': rows}, indent=1) + '\n')
  plot(rows, path.with_suffix('.png'))


def measure(n_experts: int) -> dict:
  """Returns times and temporaries of the product and of both its gradients."""
  n = TOKENS * ACTIVE
  seconds, memory = run(n_experts, n, ('ours', 'dense'), ROUNDS)
  ours = memory['ours']
  few = min(n, MOST_OF_JAX // n_experts)
  beside, memory_beside = run(n_experts, few, ('ours', 'ragged_dot'), 2)
  row = {
      'experts': n_experts,
      'seconds': {name: statistics.median(taken) for name, taken in seconds.items()},
      'times_dense': ratio(seconds, 'ours', 'dense'),
      'temporaries_of_inputs_and_outputs': ours.temp_size_in_bytes
      / (ours.argument_size_in_bytes + ours.output_size_in_bytes),
      'rows_beside_ragged_dot': few,
      'faster_than_ragged_dot': ratio(beside, 'ragged_dot', 'ours'),
      'ragged_dot_temporaries_mib': memory_beside['ragged_dot'].temp_size_in_bytes / 2**20,
      'temporaries_mib': ours.temp_size_in_bytes / 2**20,
  }
  print(json.dumps(row), flush=True)
  return row


def ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
  return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def run(n_experts: int, n: int, names: tuple[str, ...], rounds: int) -> tuple[dict, dict]:
  """Returns the seconds of each round, and the memory of each program."""
  rng = np.random.default_rng(n_experts)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  rows, weights, dout = draw(n, D), draw(n_experts, D, F), draw(n, F)
  sizes = jnp.asarray(rng.multinomial(n, rng.dirichlet(np.full(n_experts, 4.0))), jnp.int32)
  products = {
      'ours': (lambda x, w: grouped_matmul(x, w, sizes, backend='xla'), weights),
      'dense': (jnp.dot, weights[0]),
      'ragged_dot': (lambda x, w: jax.lax.ragged_dot(x, w, sizes), weights),
  }

  def compiled(product, weights):
    def differentiate(rows, weights, dout):
      out, vjp = jax.vjp(product, rows, weights)
      return out, vjp(dout)

    return jax.jit(differentiate).lower(rows, weights, dout).compile()

  programs = {name: compiled(*products[name]) for name in names}
  seconds = {name: [] for name in names}
  for _ in range(rounds + 1):
    for name, program in programs.items():
      began = time.perf_counter()
      jax.block_until_ready(program(rows, products[name][1], dout))
      seconds[name].append(time.perf_counter() - began)
  memory = {name: program.memory_analysis() for name, program in programs.items()}
  return {name: taken[1:] for name, taken in seconds.items()}, memory  # The first round warms up.


def plot(rows: list[dict], path: pathlib.Path):
  figure, axes = plt.subplots(figsize=(6, 3.6))
  experts = [row['experts'] for row in rows]
  ours = [row['times_dense'] for row in rows]
  theirs = [row['times_dense'] * row['faster_than_ragged_dot'] for row in rows]
  axes.plot(experts, theirs, 'o-', label="jax's ragged_dot")
  axes.plot(experts, ours, 'o-', label='grouped_matmul')
  axes.axhline(1, color='black', linewidth=0.8)
  axes.set(
      xscale='log', yscale='log', xticks=EXPERTS, xticklabels=EXPERTS, xlabel='experts',
      ylabel='time / one dense product of equal work',
  )  # fmt: skip
  axes.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  main()
