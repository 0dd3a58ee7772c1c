# SPDX-License-Identifier: Apache-2.0
"""Validation: loss by position, and how much true attention a selection captures."""

from collections.abc import Sequence
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.data.batch import Batch
from dsa_jax.nn.attention.types import Mode
from dsa_jax.parallel import spmd
from dsa_jax.selection import measures
from dsa_jax.training.losses import next_token_loss


class Scores(NamedTuple):
  """One entry per validation target."""

  nats: np.ndarray
  right: np.ndarray  # Whether the likeliest token was the target.
  n_visible: np.ndarray  # How many tokens the query could see, itself included.

  def bits(self, n_visible_above: int = 0) -> float:
    """Mean bits per target, over the queries that see more than that."""
    return float(self.nats[self.n_visible > n_visible_above].mean() / np.log(2))

  def bits_by_position(self, edges: Sequence[int]) -> list[float]:
    """Mean bits per target with edges[i] <= n_visible < edges[i + 1]; NaN where there is none."""
    bucket = np.digitize(self.n_visible, edges) - 1
    count = np.bincount(bucket, minlength=len(edges))[: len(edges) - 1]
    total = np.bincount(bucket, self.nats, minlength=len(edges))[: len(edges) - 1]
    return [float(t / c / np.log(2)) if c else float('nan') for t, c in zip(total, count)]


def evaluate(
    graph: nnx.GraphDef,
    params: nnx.State,
    batches: Sequence[Batch],
    mode: Mode,
    choice: int | None = None,
) -> Scores:
  """Scores every target of the batches.

  Where `mode.rule` names several rules, `choice` is the number of the one that selects: one
  compiled program serves them all.
  """
  scored, choice = [], None if choice is None else jnp.int32(choice)
  for batch in batches:
    nats, right = score_batch(graph, params, batch, mode, choice)
    counts = batch.weights > 0
    n_visible = (batch.end - batch.start)[counts]
    scored.append(Scores(np.asarray(nats)[counts], np.asarray(right)[counts], n_visible))
  return Scores(*(np.concatenate(x) for x in zip(*scored)))


@functools.partial(jax.jit, static_argnums=(0, 3))
def score_batch(graph, params, batch, mode, choice):
  model = nnx.merge(graph, params)
  logits = model(batch.tokens, batch.start, batch.end, mode, choice=choice).logits
  scores = next_token_loss(logits, batch.targets), logits.argmax(-1) == batch.targets
  return spmd.everywhere(scores)


def measure(
    graph: nnx.GraphDef,
    params: nnx.State,
    batches: Sequence[Batch],
    mode: Mode,
    *,
    beyond: tuple[int, ...] = (0,),
) -> list[dict[str, dict[str, np.ndarray]]]:
  """Holds the selections of `mode.measure` against the true attention.

  Args:
    graph: The model without its weights.
    params: Its weights.
    batches: What to run on.
    mode: How the model attends meanwhile; its `measure` names the rules.
    beyond: For each of these numbers, count only queries that see more tokens than it: with
      the budget, those for which a rule has to choose.

  Returns:
    For each number, by rule, then by measure, means over queries for each layer: `captured_mass`, `topk_recall`,
    `neighbour_overlap` (against the previous query), `layer_overlap` (against the previous layer;
    one shorter) as shares, and `selected_distance` in tokens.
  """
  found = [measure_batch(graph, params, batch, mode, beyond) for batch in batches]
  sums, counts = jax.tree.map(lambda *x: np.sum(x, axis=0), *found)
  if not all(counts):
    raise ValueError(f'no query of the batches sees more than {max(beyond)} tokens.')
  return [jax.tree.map(lambda x: x / n, total) for total, n in zip(sums, counts)]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def measure_batch(graph, params, batch, mode, beyond):
  out = nnx.merge(graph, params)(batch.tokens, batch.start, batch.end, mode)
  found = {}
  for rule in mode.measure:
    fields = out.measures(rule)._asdict()
    indices = fields.pop('indices')
    fields['layer_overlap'] = measures.overlap(indices[1:], indices[:-1])
    found[rule] = fields
  sums, counts = [], []
  for n in beyond:
    counted = (batch.end - batch.start > n).astype(jnp.float32)
    sums.append(jax.tree.map(lambda x: jnp.sum(x * counted, axis=(1, 2)), found))
    counts.append(jnp.sum(counted))
  return spmd.everywhere((sums, counts))
