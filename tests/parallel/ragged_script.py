# SPDX-License-Identifier: Apache-2.0
"""Rows to the owners of their groups and back, on eight simulated devices: prints what is right.

Run by test_meshes.py in a process of its own, which has the devices.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.parallel import ragged
from dsa_jax.parallel.mesh import OWNERS, make_mesh

N, GROUPS, ROWS = 8, 16, 6  # Devices, groups of all of them, rows of each.


def travel(groups, rows):
  """What each device receives there and back, its slices for both, and how much of each group."""

  def on_device(groups, rows):
    sizes = jnp.sum(groups[0, :, None] == jnp.arange(GROUPS), axis=0)
    journey = ragged.plan_journey(sizes, *OWNERS)
    there = ragged.send(rows[0], journey.there, N * ROWS, *OWNERS)
    back = ragged.send(there, journey.back, ROWS, *OWNERS)
    return jax.tree.map(lambda a: a[None], (there, back, journey))

  shares = jax.P(OWNERS)
  return jax.shard_map(on_device, in_specs=shares, out_specs=shares, check_vma=False)(groups, rows)


def documented(rows, slices: ragged.Slices, n_rows: int):
  """What `jax.lax.ragged_all_to_all` says it does, of all devices at once."""
  out = np.zeros((N, n_rows, rows.shape[-1]), rows.dtype)
  received = np.zeros((N, N, GROUPS // N), int)
  for sender in range(N):
    for i, (start, size, place) in enumerate(zip(*(a[sender] for a in slices[:3]))):
      receiver, slot = divmod(i, GROUPS // N)
      out[receiver, place : place + size] = rows[sender, start : start + size]
      received[receiver, sender, slot] = size
  return out, received.reshape(N, -1)


def main():
  random = np.random.default_rng(0)
  uneven = np.sort(random.integers(GROUPS, size=(N, ROWS)) ** 2 // GROUPS, axis=1)
  for name, groups in {'uneven': uneven, 'all to one': np.full((N, ROWS), 5)}.items():
    rows = np.stack([groups, np.arange(N * ROWS).reshape(N, ROWS)], axis=-1).astype(np.float32)
    with jax.set_mesh(make_mesh(expert=2, tensor=4)):
      there, back, journey = jax.tree.map(np.asarray, jax.jit(travel)(groups, rows))
    arrived = [row for part, sizes in zip(there, journey.sizes) for row in part[: sizes.sum()]]
    wanted = sorted(rows.reshape(-1, 2).tolist())  # By group, then by sender.
    lawful, received = documented(rows, journey.there, N * ROWS)
    lawful_back, received_back = documented(there, journey.back, ROWS)
    print(json.dumps({
        'case': name,
        'by group': np.array_equal(arrived, wanted),
        'back': np.array_equal(back, rows),
        'as documented': np.array_equal(lawful, there) and np.array_equal(lawful_back, back),
        'sizes': np.array_equal(received, journey.there.received)
        and np.array_equal(received_back, journey.back.received),
    }))  # fmt: skip


if __name__ == '__main__':
  main()
