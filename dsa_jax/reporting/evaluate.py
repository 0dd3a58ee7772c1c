# SPDX-License-Identifier: Apache-2.0
"""Validation: the loss by position, and the true attention that a selection captures."""

from collections.abc import Iterable, Sequence
import functools
import itertools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.data.batch import Batch
from dsa_jax.nn.attention.types import Mode
from dsa_jax.nn.transformer import Output
from dsa_jax.parallel import shard
from dsa_jax.selection import measures
from dsa_jax.training.losses import next_token_loss, score_targets


class Scores(NamedTuple):
  """One entry per validation target."""

  nats: np.ndarray
  right: np.ndarray  # Whether the likeliest token was the target.
  n_visible: np.ndarray  # The number of tokens that the query could see, itself included.

  def bits(self, n_visible_above: int = 0) -> float:
    """Returns the mean bits per target, over queries that see more tokens than given; NaN without any."""
    nats = self.nats[self.n_visible > n_visible_above]
    return float(nats.mean() / np.log(2)) if nats.size else float('nan')

  def bits_by_position(self, edges: Sequence[int]) -> list[float]:
    """Returns the mean bits of targets with edges[i] <= n_visible < edges[i + 1], or else NaN."""
    bucket = np.digitize(self.n_visible, edges) - 1
    count = np.bincount(bucket, minlength=len(edges))[: len(edges) - 1]
    total = np.bincount(bucket, self.nats, minlength=len(edges))[: len(edges) - 1]
    return [float(t / c / np.log(2)) if c else float('nan') for t, c in zip(total, count)]


def evaluate(
    graph: nnx.GraphDef,
    params: nnx.State,
    batches: Iterable[Batch],
    mode: Mode,
    choice: int | None = None,
) -> Scores:
  """Scores every target of the batches.

  Where `mode.rule` names several rules, `choice` is the number of the one that selects, so one
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
  hidden = model(batch.tokens, batch.start, batch.end, mode, choice=choice).hidden
  softcap = model.cfg.logit_softcap
  return shard.replicate(score_targets(hidden, model.head_weight, batch.targets, softcap=softcap))


def measure(
    graph: nnx.GraphDef,
    params: nnx.State,
    batches: Iterable[Batch],
    mode: Mode,
    *,
    beyond: tuple[int, ...] = (0,),
) -> list[dict[str, dict[str, np.ndarray]] | None]:
  """Compares the selections of `mode.measure` with the true attention.

  Args:
    graph: The model without its weights.
    params: Its weights.
    batches: What to run on.
    mode: How the model attends. Its `measure` names the rules.
    beyond: For each of these numbers, only queries that see more tokens than it are counted. With
      the budget as the number, those are the queries for which a rule has to choose.

  Returns:
    For each number, by rule and then by measure, the means over queries for each layer; None where no
    query sees that many tokens.
    `captured_mass`, `topk_recall`, `neighbour_overlap` (with the previous query) and `layer_overlap`
    (with the next layer that selects; the last layer has no number) are shares; `selected_distance`
    is in tokens. `left_out` is the share of the queries that do not select all that they see. A
    layer with a window selects nothing, so all its numbers are NaN.
  """
  of_batch = lambda batch: measure_batch(graph, params, batch, mode, beyond)
  of_batches = [jax.device_get(of_batch(batch)) for batch in batches]  # One after the other.
  sums, counts = jax.tree.map(lambda *x: np.sum(x, axis=0), *of_batches)
  mean = lambda total, n: jax.tree.map(lambda x: x / n, total) if n else None
  return [mean(total, n) for total, n in zip(sums, counts)]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def measure_batch(graph, params, batch, mode, beyond):
  model = nnx.merge(graph, params)
  out = model(batch.tokens, batch.start, batch.end, mode)
  by_rule = _by_rule(out, model.cfg, mode)
  for rule, fields in by_rule.items():
    of_layer = lambda indices: measures.over_key_heads(
        measures.leaves_out(indices, batch.end - batch.start)
    )
    left_out = jax.vmap(of_layer)(out.measures(rule).indices)
    fields['left_out'] = _where_selected(left_out, model.cfg)
  return shard.replicate(_totals(by_rule, batch, beyond))


def look(
    graph: nnx.GraphDef, params: nnx.State, batch: Batch, mode: Mode
) -> dict[str, float | list[float | None]]:
  """Looks at a few rows while a model trains.

  Returns:
    `validation_loss`, in nats, and for each layer what `measure` returns of the first rule of
    `mode.measure`, if there is one, with None in place of NaN.
  """
  seen = look_batch(graph, params, batch, mode)
  loss = float(seen.pop('validation_loss'))
  of_layers = {name: np.asarray(x).tolist() for name, x in seen.items()}
  without_nan = lambda values: [None if np.isnan(x) else x for x in values]
  return {'validation_loss': loss} | {name: without_nan(x) for name, x in of_layers.items()}


@functools.partial(jax.jit, static_argnums=(0, 3))
def look_batch(graph, params, batch, mode):
  model = nnx.merge(graph, params)
  out = model(batch.tokens, batch.start, batch.end, mode)
  loss = next_token_loss(
      out.hidden, model.head_weight, batch.targets, batch.weights, softcap=model.cfg.logit_softcap
  )
  loss /= jnp.sum(batch.weights)
  [by_rule], [count] = _totals(_by_rule(out, model.cfg, mode), batch, (0,))
  means = jax.tree.map(lambda x: x / count, by_rule[mode.measure[0]]) if mode.measure else {}
  return shard.replicate({'validation_loss': loss} | means)


def _by_rule(out: Output, cfg: ModelConfig, mode: Mode) -> dict[str, dict[str, jax.Array]]:
  """Returns the measures of each rule, for each layer and query."""
  by_rule = {}
  for rule in mode.measure:
    fields = out.measures(rule)._asdict()
    indices = fields.pop('indices')
    fields = {name: _where_selected(x, cfg) for name, x in fields.items()}
    by_rule[rule] = fields | {'layer_overlap': _layer_overlap(indices, cfg)}
  return by_rule


def _layer_overlap(indices: jax.Array, cfg: ModelConfig) -> jax.Array:
  """Returns what share of its selection the next layer that selects has in common with each layer.

  It is NaN in a layer that does not select, and where no later one does. The last layer is left out.
  """
  selecting = [i for i in range(cfg.n_layers) if i not in cfg.window_layers]
  later = dict(itertools.pairwise(selecting))
  others = np.array([later.get(i, i) for i in range(cfg.n_layers - 1)], int)
  overlap = measures.overlap(indices[others], indices[:-1])
  has_later = np.array([i in later for i in range(cfg.n_layers - 1)], bool)
  overlap = jax.vmap(measures.over_key_heads)(overlap)
  return jnp.where(has_later[:, None, None], overlap, jnp.nan)


def _where_selected(x: jax.Array, cfg: ModelConfig) -> jax.Array:
  """Returns numbers [L, B, T] with NaN in the layers that have a window and select nothing."""
  selects = np.array([i not in cfg.window_layers for i in range(cfg.n_layers)])
  return jnp.where(selects[:, None, None], x, jnp.nan)


def _totals(by_rule: dict[str, dict[str, jax.Array]], batch: Batch, beyond: tuple[int, ...]):
  """Returns sums over the queries that count, and their number, for each entry of `beyond`."""
  sums, counts = [], []
  for n in beyond:
    counted = (batch.end - batch.start > n).astype(jnp.float32)
    sums.append(jax.tree.map(lambda x: jnp.sum(x * counted, axis=(1, 2)), by_rule))
    counts.append(jnp.sum(counted))
  return sums, counts
