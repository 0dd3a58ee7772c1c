# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.kernels.backend import BACKENDS
from dsa_jax.kernels.dense_attention.op import dense_attention
from dsa_jax.kernels.index_kl.op import index_kl
from dsa_jax.kernels.index_topk.op import index_topk
from dsa_jax.kernels.indexed_attention.op import indexed_attention
from dsa_jax.kernels.sparse_attention.op import sparse_attention

NONE = {'batch': (0, 3, 5), 'queries': (2, 0, 5), 'keys': (2, 3, 0), 'anything': (0, 0, 0)}


@pytest.mark.hostile
@pytest.mark.parametrize('n_selections', [1, 2])
@pytest.mark.parametrize('sizes', NONE.values(), ids=NONE)
@pytest.mark.parametrize('backend', BACKENDS)
def test_ops_of_no_queries_or_no_keys(backend, sizes, n_selections):
  """All ops give what rows give that see nothing, and gradients of zero."""
  b, t, s = sizes
  q, k, v = jnp.ones((b, t, 4, 8)), jnp.ones((b, s, 2, 8)), jnp.ones((b, s, 2, 6))
  index = jnp.ones((b, t, 2, 4)), jnp.ones((b, s, 4)), jnp.ones((b, t, 2))
  see = jnp.zeros((b, t), jnp.int32), jnp.full((b, t), s, jnp.int32)
  usual = dict(sm_scale=1.0, backend=backend)
  selected = dict(topk=3, n_selections=n_selections, backend=backend)

  indices = index_topk(*index, *see, **selected)
  assert indices.shape == ((b, t, 3) if n_selections == 1 else (b, t, 2, 3))
  assert indices.dtype == jnp.int32 and (indices == -1).all()

  def total(q, k, v, index):
    attended = [
        dense_attention(q, k, v, *see, **usual),
        dense_attention(q, k, v, *see, indices=indices, **usual),
        sparse_attention(q, k, v, indices, **usual),
    ]
    for out, lse in attended:
      assert out.shape == (b, t, 4, 6) and not out.any()
      assert lse.dtype == jnp.float32 and (lse == -jnp.inf).all()
    out, again = indexed_attention(q, k, v, *index, *see, sm_scale=1.0, **selected)
    assert out.shape == (b, t, 4, 6) and not out.any()
    np.testing.assert_array_equal(again, indices)
    kls = [
        index_kl(q, k, lse, *index, *see, n_selections=n_selections, **usual),
        index_kl(q, k, lse, *index, *see, indices=indices, **usual),
    ]
    for kl in kls:
      assert kl.shape == (b, t) and not kl.any()
    return sum(out.sum() for out, _ in attended) + sum(kl.sum() for kl in kls)

  for gradient in jax.tree.leaves(jax.grad(total, (0, 1, 2, 3))(q, k, v, index)):
    assert not gradient.any()
