# SPDX-License-Identifier: Apache-2.0
"""The measured programs: each op alone, the sparse stage as one, and what they replace."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np

from dsa_jax.kernels import dense_attention, index_kl, index_scores, index_topk, sparse_attention
from dsa_jax.kernels.visibility import visible_keys
from dsa_jax.kernels.xla.rows import map_rows
from dsa_jax.parallel.zigzag import zigzag

H, E, V, I, J, K = 16, 160, 128, 4, 32, 512
SM_SCALE = E**-0.5
NAIVE_BLOCK = 128  # The block of index_topk.


def make_inputs(n: int, seed: int = 0) -> dict[str, jax.Array]:
  """Returns random float32 inputs of n tokens; `lse` is a stand-in of the right size."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
  position = jnp.arange(n, dtype=jnp.int32)[None]
  return {
      'q': normal(1, n, H, E),
      'kv': normal(1, n, E),
      'index_q': normal(1, n, I, J),
      'index_k': normal(1, n, J),
      'weights': normal(1, n, I),
      'start': jnp.zeros_like(position),
      'end': position + 1,
      'lse': jnp.full((1, n, H), 1 + np.log(n), jnp.float32),
      'indices': random_indices(rng, n),
  }


def random_indices(rng, n: int) -> jax.Array:
  """Returns K visible positions of each query, ascending, and then -1."""
  out = np.full((1, n, K), -1, np.int32)
  for t in range(n):
    chosen = np.arange(t + 1) if t < K else rng.choice(t + 1, K, replace=False, shuffle=False)
    out[0, t, : len(chosen)] = np.sort(chosen)
  return jnp.asarray(out)


def topk(x):
  return index_topk(
      x['index_q'], x['index_k'], x['weights'], x['start'], x['end'], topk=K, backend='xla'
  )


def naive_topk(x):
  """Scores all keys and applies lax.top_k, in the same blocks; positions are not sorted."""
  n = x['index_k'].shape[1]

  def select(rows):
    q, weights, start, end = rows
    scores = index_scores(q, x['index_k'], weights)
    scores = jnp.where(visible_keys(start, end, jnp.arange(n)), scores, -jnp.inf)
    best, position = jax.lax.top_k(scores, min(K, n))
    return jnp.where(best > -jnp.inf, position, -1)

  return map_rows(select, (x['index_q'], x['weights'], x['start'], x['end']), NAIVE_BLOCK)


def sparse(x, indices=None):
  indices = x['indices'] if indices is None else indices
  inputs = x['q'], x['kv'][:, :, None], None, indices
  return sparse_attention(*inputs, v_dim=V, sm_scale=SM_SCALE, backend='xla')


def dense(x, heads: int = 1, indices=None):
  """Attends with one key head, which sparse attention has too, or with one for each query head."""
  k = jnp.broadcast_to(x['kv'][:, :, None], (*x['kv'].shape[:2], heads, E))
  return dense_attention(
      x['q'], k, k[..., :V], x['start'], x['end'],
      indices=indices, sm_scale=SM_SCALE, backend='xla',
  )


def kl(x, indices=None, lse=None):
  return index_kl(
      x['q'], x['kv'][:, :, None], x['lse'] if lse is None else lse,
      x['index_q'], x['index_k'], x['weights'], x['start'], x['end'],
      indices=indices, sm_scale=SM_SCALE, backend='xla',
  )


def sparse_forward(x):
  return sparse(x, topk(x))


def sparse_stage(x):
  """Runs selection, attention and the indexer's loss: all that attention is in the sparse stage."""
  indices = topk(x)
  out, lse = sparse(x, indices)
  return out, kl(x, indices, jax.lax.stop_gradient(lse))


def with_gradients(f, *trained):
  """Returns f with its gradients to the named inputs."""

  def both(x):
    rest = {name: x[name] for name in x if name not in trained}
    out, vjp = jax.vjp(lambda some: f(some | rest), {name: x[name] for name in trained})
    return out, vjp(jax.tree.map(jnp.ones_like, out))

  return both


WHOLE = ('kv', 'index_k')  # Inputs that every device holds; all others are split.


def share_rows(f, mesh):
  """Returns f with query rows split over the devices of a mesh, as `mesh.context` does."""

  def shared(x):
    specs = {name: rows_or_whole(name) for name in x}
    return jax.shard_map(
        f, mesh=mesh, in_specs=(specs,), out_specs=P(None, 'context'), check_vma=False
    )(x)

  return shared


def rows_or_whole(name: str) -> P:
  return P() if name in WHOLE else P(None, 'context')


def make_mesh(devices: int):
  return jax.make_mesh((devices,), ('context',), axis_types=(AxisType.Auto,))


def make_shares(n: int, devices: int) -> dict[str, jax.Array]:
  """Returns inputs for `share_rows`, so that each device has equal causal work."""
  mesh = make_mesh(devices)
  return {
      name: jax.device_put(
          x if name in WHOLE else zigzag(x, devices), NamedSharding(mesh, rows_or_whole(name))
      )
      for name, x in make_inputs(n).items()
  }


INDEXER = ('index_q', 'index_k', 'weights')
SELECTED = lambda x: kl(x, x['indices'])
PROGRAMS = {
    'index_topk': topk,
    'naive_topk': naive_topk,
    'sparse_attention': sparse,
    'sparse_attention_grad': with_gradients(sparse, 'q', 'kv'),
    'index_kl_selected': SELECTED,
    'index_kl_selected_grad': with_gradients(SELECTED, *INDEXER),
    'index_kl': kl,
    'index_kl_grad': with_gradients(kl, *INDEXER),
    'dense_attention': dense,
    'dense_attention_grad': with_gradients(dense, 'q', 'kv'),
    'dense_attention_16_heads': functools.partial(dense, heads=H),
    'masked_attention': lambda x: dense(x, indices=x['indices']),
    'masked_attention_grad': with_gradients(lambda x: dense(x, indices=x['indices']), 'q', 'kv'),
    'sparse_forward': sparse_forward,
    'sparse_stage_grad': with_gradients(sparse_stage, 'q', 'kv', *INDEXER),
}


def shared_programs(devices: int) -> dict:
  """Dense attention and what is compared with it, the query rows shared by devices."""
  share = lambda f: share_rows(f, make_mesh(devices))
  return {
      'index_topk': share(topk),
      'dense_attention': share(dense),
      'dense_attention_grad': with_gradients(share(dense), 'q', 'kv'),
      'sparse_forward': share(sparse_forward),
      'sparse_stage_grad': with_gradients(share(sparse_stage), 'q', 'kv', *INDEXER),
  }


def flops(name: str, n: int) -> float:
  """Multiplications and additions that the mathematics asks for, exactly causal."""
  pairs, chosen = n * (n + 1) / 2, K * (K + 1) / 2 + (n - K) * K if n > K else n * (n + 1) / 2
  score, attend = 2 * I * J + 3 * I, 2 * H * (E + V)
  gradient = 2 * H * (2 * E + V) + attend  # Logits again, dq, dk; dprobs, dv.
  per = {
      'index_topk': pairs * score,
      'naive_topk': pairs * score,
      'sparse_attention': chosen * attend,
      'sparse_attention_grad': chosen * (attend + gradient),
      'dense_attention': pairs * attend,
      'dense_attention_16_heads': pairs * attend,
      'dense_attention_grad': pairs * (attend + gradient),
      'sparse_forward': pairs * score + chosen * attend,
  }
  return per.get(name, 0.0)


def scoring_bytes(name: str, n: int) -> float:
  """What scoring writes and reads again: float32 dots of each pair and head, and the scores."""
  return n * (n + 1) / 2 * 8 * (I + 1) if name in ('index_topk', 'naive_topk') else 0.0
