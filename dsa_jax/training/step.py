# SPDX-License-Identifier: Apache-2.0
"""The train step of every stage: it sums over micro-batches, and updates each part once."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsa_jax.config import ConfigError
from dsa_jax.data.batch import Batch
from dsa_jax.nn.attention.types import Mode
from dsa_jax.nn.layers import layers_of_stacks
from dsa_jax.nn.moe import balance
from dsa_jax.nn.transformer import Output
from dsa_jax.parallel import shard
from dsa_jax.parallel.mesh import TOKENS
from dsa_jax.parallel.zigzag import zigzag
from dsa_jax.training.losses import next_token_loss, shift_targets
from dsa_jax.training.optim import OptimConfig, make_optimizer
from dsa_jax.training.state import TrainState, join_parts, split_parts

Rates = dict[str, jax.Array | float]  # The learning rate of each part that learns.
Metrics = dict[str, jax.Array]


class Rows(NamedTuple):
  """A batch with the targets of the MTP layer."""

  batch: Batch
  mtp_targets: jax.Array
  mtp_weights: jax.Array


@functools.cache  # Stages that differ only in their schedules share one compiled program.
def make_train_step(
    graph: nnx.GraphDef,
    trains: tuple[str, ...],
    mode: Mode,
    optim: OptimConfig,
    *,
    micro_batches: int = 1,
) -> Callable[[TrainState, Batch, Rates], tuple[TrainState, Metrics]]:
  """Returns the jitted step of a stage.

  The losses are means over the tokens of the whole batch that count, whatever the number of
  micro-batches and the padding. `lm_loss` is a mean over targets. The divergence is a mean over the
  queries that see something, in each layer, and is then summed over layers.

  Args:
    graph: The model without its weights.
    trains: The parts of the model that learn, keys of `stages.PARTS`.
    mode: How the model attends.
    optim: The settings of the optimiser.
    micro_batches: The number of pieces that a batch is cut into; it must divide the batch.
  """

  optimizer = make_optimizer(optim)

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state: TrainState, batch: Batch, rates: Rates):
    key, step_key = jax.random.split(jax.random.wrap_key_data(state.key))
    parts, rest = split_parts(state.params, trains)
    n_shares = shard.n_devices(*TOKENS)
    in_zigzag = n_shares > 1
    rows = Rows(batch, *shift_targets(batch.targets, batch.weights))
    totals = _count(rows)
    rows = jax.tree.map(lambda x: zigzag(x, n_shares), rows) if in_zigzag else rows

    def loss(parts, rows_and_key):
      rows, key = rows_and_key
      batch, model = rows.batch, nnx.merge(graph, join_parts(parts, rest))
      out = model(
          batch.tokens, batch.start, batch.end, dataclasses.replace(mode, zigzag=in_zigzag),
          next_tokens=batch.targets, key=key,
      )
      return _losses(out, model.head_weight, rows, totals, optim, mode, model.cfg.logit_softcap)

    split = lambda x: shard.split_micro_batches(x, micro_batches)
    inputs = jax.tree.map(split, rows), jax.random.split(step_key, micro_batches)
    grads, metrics = _sum_over_micro_batches(jax.value_and_grad(loss, has_aux=True), parts, inputs)
    opt_state = {}
    for name in trains:
      updates, opt_state[name] = optimizer.update(grads[name], state.opt_state[name], parts[name])
      parts[name] = optax.apply_updates(parts[name], optax.tree.scale(rates[name], updates))
      metrics[f'grad_norm_{name}'] = optax.tree.norm(grads[name])
      metrics[f'layer_grad_norm_{name}'] = _layer_grad_norm(graph, state.params, grads[name])
    params = join_parts(parts, rest)
    if 'backbone' in trains:
      params = _balance(graph, params, metrics['expert_load'], optim.bias_rate)
    metrics = _summarize(metrics, micro_batches)
    state = TrainState(state.step + 1, params, opt_state, jax.random.key_data(key))
    return shard.constrain_weights(state), metrics

  return train_step


def _count(rows: Rows) -> dict[str, jax.Array]:
  """Returns how many tokens of the whole batch count for each loss."""
  count = lambda weights: jnp.maximum(jnp.sum(weights), 1)
  return {
      'lm': count(rows.batch.weights),
      'mtp': count(rows.mtp_weights),
      'kl': count(rows.batch.end > rows.batch.start),
  }


def _sum_over_micro_batches(grad: Callable, parts: dict[str, nnx.State], inputs: Any):
  """Returns the gradients and metrics of all micro-batches, which lead the dimensions of `inputs`."""

  def accumulate(sums, of_one):
    (_, metrics), grads = grad(parts, of_one)
    own = shard.constrain_weights(grads), metrics
    return (own if sums is None else jax.tree.map(jnp.add, sums, own)), None

  first = jax.tree.map(lambda x: x[0], inputs)
  if len(jax.tree.leaves(inputs)[0]) == 1:
    return accumulate(None, first)[0]
  shapes = jax.eval_shape(accumulate, None, first)[0]
  zeros = shard.constrain_weights(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
  return jax.lax.scan(accumulate, zeros, inputs)[0]


def _losses(
    out: Output, head, rows: Rows, totals, optim: OptimConfig, mode: Mode, softcap: float
):
  """Returns the sum of all losses, and metrics that add up over micro-batches."""
  batch = rows.batch
  metrics = {'residual_rms': out.residual_rms}
  weights = batch.weights / totals['lm']
  lm_loss = functools.partial(next_token_loss, softcap=softcap)
  loss = metrics['lm_loss'] = lm_loss(out.hidden, head, batch.targets, weights)
  if out.mtp_hidden is not None:
    weights = rows.mtp_weights / totals['mtp']
    mtp = lm_loss(out.mtp_hidden, head, rows.mtp_targets, weights)
    metrics['mtp_loss'] = mtp
    loss += optim.mtp_weight * mtp
  if mode.index_loss:
    metrics['index_kl'] = jnp.sum(out.index_kl, axis=(1, 2)) / totals['kl']  # One number per layer.
    loss += jnp.sum(metrics['index_kl'])
  metrics['expert_load'] = out.expert_load
  return loss, metrics


def _balance(graph: nnx.GraphDef, params: nnx.State, load, rate: float) -> nnx.State:
  """Moves every selection bias that there is by the load that its experts had in this step."""
  model = nnx.merge(graph, params)
  for stack, loads in load.items():
    if stack == 'mtp':
      bias, loads = model.mtp.block.ffn.bias, loads[0]
    else:
      bias = getattr(model, stack).ffn.bias
    if bias is not None:
      bias[...] = balance(bias[...], loads, rate)
  return nnx.state(model)


def _layer_grad_norm(graph: nnx.GraphDef, params: nnx.State, grads: nnx.State) -> jax.Array:
  """Returns the norm of the gradient of each layer that has one, in the order of the layers."""
  cfg = nnx.merge(graph, params).cfg
  square = lambda x: jnp.sum(jnp.square(x), axis=range(1, x.ndim))
  squares, numbers = [], []
  for stack, layers in layers_of_stacks(cfg).items():
    if stack in grads:
      squares.append(sum(map(square, jax.tree.leaves(grads[stack]))))
      full = [i for i in layers if cfg.is_full(i)]
      numbers += layers if len(squares[-1]) == len(layers) else full  # Indexers are in full layers.
  if not squares:
    raise ConfigError(
        f'window_layers={cfg.window_layers} names all layers, so none has an indexer that could learn. '
        'Stages can train the backbone alone.'
    )
  norms = jnp.sqrt(jnp.concatenate(squares))
  return norms if numbers == sorted(numbers) else norms[np.argsort(numbers)]


def _summarize(metrics: dict[str, Any], micro_batches: int) -> Metrics:
  """Turns sums over micro-batches into the metrics that are logged."""
  load = metrics.pop('expert_load')
  metrics['residual_rms'] /= micro_batches
  if load:
    load = jnp.concatenate(list(load.values()))
    metrics['expert_imbalance'] = load.max(axis=-1) / load.mean(axis=-1)  # 1 is balanced.
  return metrics
