# SPDX-License-Identifier: Apache-2.0
"""Times the products of experts on this CPU: ours, jax's own, and one dense product of equal work.

python experiments/model_speed/grouped_matmul.py

Writes grouped_matmul.json and grouped_matmul.png. Arms take turns, and each ratio is the median of
those of single rounds. jax's `ragged_dot` is measured at up to 64 experts: beyond, its temporaries,
[rows, experts, channels], fill this machine.
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
MOST_OF_JAX = 64
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
  rng = np.random.default_rng(n_experts)
  n = TOKENS * ACTIVE
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  rows, weights, dout = draw(n, D), draw(n_experts, D, F), draw(n, F)
  shares = rng.dirichlet(np.full(n_experts, 4.0))
  sizes = jnp.asarray(rng.multinomial(n, shares), jnp.int32)

  def gradients(product, weights):
    def run(rows, weights, dout):
      out, vjp = jax.vjp(product, rows, weights)
      return out, vjp(dout)

    return jax.jit(run).lower(rows, weights, dout).compile(), weights

  arms = {
      'ours': gradients(lambda x, w: grouped_matmul(x, w, sizes, backend='xla'), weights),
      'dense': gradients(jnp.dot, weights[0]),
  }
  if n_experts <= MOST_OF_JAX:
    arms['ragged_dot'] = gradients(lambda x, w: jax.lax.ragged_dot(x, w, sizes), weights)
  memory = {name: program.memory_analysis() for name, (program, _) in arms.items()}
  seconds = {name: [] for name in arms}
  for _ in range(ROUNDS + 1):
    for name, (program, weights_of) in arms.items():
      if name == 'ragged_dot' and seconds[name][1:]:
        continue  # It takes minutes.
      began = time.perf_counter()
      jax.block_until_ready(program(rows, weights_of, dout))
      seconds[name].append(time.perf_counter() - began)
  seconds = {name: taken[1:] for name, taken in seconds.items()}  # The first warms up.
  ours = memory['ours']
  row = {
      'experts': n_experts,
      'seconds': {name: statistics.median(taken) for name, taken in seconds.items()},
      'times_dense': statistics.median(
          a / b for a, b in zip(seconds['ours'], seconds['dense'], strict=True)
      ),
      'temporaries_of_inputs_and_outputs': ours.temp_size_in_bytes
      / (ours.argument_size_in_bytes + ours.output_size_in_bytes),
      'temporaries_mib': {name: m.temp_size_in_bytes / 2**20 for name, m in memory.items()},
  }
  if 'ragged_dot' in seconds:
    row['faster_than_ragged_dot'] = row['seconds']['ragged_dot'] / row['seconds']['ours']
  print(json.dumps(row), flush=True)
  return row


def plot(rows: list[dict], path: pathlib.Path):
  figure, axes = plt.subplots(figsize=(6, 3.6))
  for name, label in ('ragged_dot', "jax's ragged_dot"), ('ours', 'grouped_matmul'):
    some = [row for row in rows if name in row['seconds']]
    times = [row['seconds'][name] / row['seconds']['dense'] for row in some]
    axes.plot([row['experts'] for row in some], times, 'o-', label=label)
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
