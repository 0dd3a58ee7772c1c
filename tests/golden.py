# SPDX-License-Identifier: Apache-2.0
"""The package against `plain`, the same model written a second time."""

import contextlib
import functools

from flax import nnx
import jax
import laws
import numpy as np
import plain

from dsa_jax.config import ModelConfig
from dsa_jax.nn.attention.types import Mode
from dsa_jax.nn.layers import layers_of_stacks
from dsa_jax.params import BackboneParam, IndexerParam


@functools.cache
def expected(cfg: ModelConfig, sparse: bool) -> list[plain.Row]:
  batch, params = laws.make_batch(laws.LENGTHS), nnx.as_pure(laws.weights(cfg))
  return run_plain(params, batch, cfg, sparse)


def run_plain(params, batch, cfg: ModelConfig, sparse: bool) -> list[plain.Row]:
  params = _as_dict(params)
  rows = []
  for row in range(len(batch.tokens)):
    tokens, targets, _, start, end = (np.asarray(x[row]) for x in batch)
    rows.append(
        plain.transformer(params, tokens, start, end, cfg, sparse=sparse, next_tokens=targets)
    )
  return rows


def check_forward(attention: str, backend: str, cfg: ModelConfig = laws.CFG, *, measured: bool = True):
  """Logits, divergences, selections, measures (unless `measured` is false) and loads of every layer."""
  batch, params = laws.make_batch(laws.LENGTHS), laws.weights(cfg)
  mode = Mode(attention=attention, backend=backend, index_loss=True, measure=('indexer',))
  with contextlib.nullcontext() if measured else laws.unmeasured():
    out = laws.forward(params, batch, mode, cfg, next_tokens=batch.targets)
  found = out.measures('indexer')
  rows = expected(cfg, attention != 'dense')
  n_layers = len(rows[0].layers)
  laws.assert_close(out.logits, np.stack([row.logits for row in rows]), 1e-4)
  for i in range(n_layers):
    layers = [row.layers[i] for row in rows]
    both = lambda name: np.stack([getattr(layer, name) for layer in layers])
    for row, layer in enumerate(layers):
      for t, chosen in enumerate(layer.selected):
        got = [s for s in np.asarray(found.indices[i, row, t]).tolist() if s >= 0]
        assert got == ([] if i in cfg.window_layers else chosen), (i, row, t)
        overlap = len(set(chosen) & set(layer.oracle[t])) / max(len(layer.oracle[t]), 1)
        if measured:
          np.testing.assert_allclose(found.topk_recall[i, row, t], overlap, atol=1e-6)
    laws.assert_close(out.index_kl[i], both('index_kl'), 1e-4)
    if measured:
      laws.assert_close(found.captured_mass[i], both('captured_mass'), 1e-5)
    load = [layer.expert_load for layer in layers]
    if load[0] is not None:
      stacks = [(name, j) for name, of in layers_of_stacks(cfg).items() for j in of]
      stack = next((name for name, j in stacks if j == i), 'mtp')
      j = sum(k < i for name, k in stacks if name == stack)
      laws.assert_same(out.expert_load[stack][j], sum(load))
  if cfg.n_mtp_layers:
    laws.assert_close(out.mtp_logits, np.stack([row.mtp_logits for row in rows]), 1e-4)


def check_gradients(
    attention: str, backend: str, cfg: ModelConfig = laws.CFG, *, remat: str = 'none'
):
  """Each loss's gradient along random directions, against differences of the plain model."""
  batch, params = laws.make_batch(laws.LENGTHS), laws.weights(cfg)
  mode = Mode(attention=attention, backend=backend, index_loss=True, remat=remat)

  def plain_losses(params):
    rows = run_plain(params, batch, cfg, attention != 'dense')
    targets, counts = np.asarray(batch.targets), np.asarray(batch.weights)
    nats = np.stack([plain.cross_entropy(row.logits, t) for row, t in zip(rows, targets)])
    return (nats * counts).sum(), sum(layer.index_kl.sum() for row in rows for layer in row.layers)

  rng, h = np.random.default_rng(0), 1e-6
  for which, kind in enumerate([BackboneParam, IndexerParam]):
    grads = laws.gradients(which, params, batch, mode, cfg)
    own, _ = nnx.split_state(grads, kind, ...)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(own)}
    draw = lambda path, x: rng.normal(size=x.shape) * (jax.tree_util.keystr(path) in names)
    direction = jax.tree_util.tree_map_with_path(draw, params)
    # Float64 leaves: the plain model is differenced far below float32's resolution.
    ahead, behind = (
        jax.tree.map(lambda x, d: np.asarray(x, np.float64) + s * h * d, params, direction)
        for s in (1, -1)
    )
    slope = (plain_losses(ahead)[which] - plain_losses(behind)[which]) / (2 * h)
    dots = jax.tree.map(lambda g, d: np.sum(np.asarray(g, np.float64) * d), grads, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(dots)), slope, rtol=2e-3)


def _as_dict(tree):
  """Nested dictionaries of arrays, from any state."""
  if hasattr(tree, 'items'):
    return {name: _as_dict(value) for name, value in tree.items()}
  return tree[...] if isinstance(tree, nnx.Variable) else tree
