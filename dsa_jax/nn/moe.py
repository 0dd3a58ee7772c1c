# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: routing within groups, dropless experts, and shared experts."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dsa_jax.config import ModelConfig
from dsa_jax.kernels.block_scaled import cast
from dsa_jax.kernels.grouped_matmul.op import grouped_matmul
from dsa_jax.kernels.xla.rows import map_rows
from dsa_jax.nn.fixed import Configured
from dsa_jax.nn.mlp import MLP, swiglu
from dsa_jax.nn.project import in_float32
from dsa_jax.parallel import collectives, ragged, shard
from dsa_jax.parallel.mesh import BATCH, MESH_AXES, OWNERS
from dsa_jax.params import BackboneParam, RouterBias, param

TOKENS_AT_ONCE = 2**14  # Over all devices that share the experts; one may receive them all.


class MoE(Configured):
  """Sends every token to a few experts and to the shared ones, and drops none."""

  def __init__(self, cfg: ModelConfig, *, out_scale: float, rngs: nnx.Rngs):
    d, x, f = cfg.dim, cfg.n_routed_experts, cfg.moe_inter_dim
    inward, outward = ('expert', 'embed', None), ('expert', None, 'embed')
    self.gate = param(BackboneParam, (d, x), ('embed', None), std=d**-0.5, rngs=rngs)
    has_bias = cfg.topk_method == 'noaux_tc'
    self.bias = RouterBias(jnp.zeros(x), axes=(None,)) if has_bias else None
    self.w1 = param(BackboneParam, (x, d, f), inward, std=d**-0.5, rngs=rngs)
    self.w3 = param(BackboneParam, (x, d, f), inward, std=d**-0.5, rngs=rngs)
    self.w2 = param(BackboneParam, (x, f, d), outward, std=out_scale * f**-0.5, rngs=rngs)
    shared = cfg.shared_experts_dim
    make_shared = lambda: MLP(d, shared, out_std=out_scale * shared**-0.5, rngs=rngs)
    self.shared = make_shared() if shared else None
    self._cfg = cfg

  def __call__(
      self, x: Float[Array, 'B T D'], counted: Float[Array, 'B T'], backend: str
  ) -> tuple[Float[Array, 'B T D'], Float[Array, 'X']]:
    """Returns the output, and the number of `counted` tokens that each expert received."""
    shares = shard.weight_specs(self), BATCH, BATCH
    experts = functools.partial(MoE._experts, backend=backend)
    routed, load = shard.shard_mapped(experts, shares, (BATCH, P()))(self, x, counted)
    return routed if self.shared is None else routed + self.shared(x), load

  def _experts(self, x, counted, backend):
    """Sends this device's tokens to the owners of their experts, and sums what they return."""
    here = shard.gather_weights(self, x.dtype)
    weights = [cast(w[...], jnp.float32) for w in (here.w1, here.w3, here.w2)]
    gate = collectives.all_gather(self.gate[...], 'fsdp', dim=0)
    tokens = x.reshape(-1, x.shape[-1])
    bias = 0.0 if self.bias is None else self.bias[...]
    experts, gates = route(in_float32('AD,DX->AX', tokens, gate), bias, self.cfg)
    load = jnp.sum(_is_of(experts, self.cfg) * counted.reshape(-1, 1, 1), axis=(0, 1))

    def apply(rows):  # The weights' gradients add up in float32 over blocks of rows.
      narrow = (cast(w, x.dtype) for w in weights)
      return _apply(*(a[0] for a in rows), *narrow, self.cfg, backend)[None]

    rows = jax.tree.map(lambda a: a[None], (tokens, experts, gates))
    most = _tokens_at_once(here.w1.shape, self.cfg)
    routed = apply(rows) if len(tokens) <= most else map_rows(jax.checkpoint(apply), rows, most)
    return routed.astype(x.dtype).reshape(x.shape), collectives.psum(load, *MESH_AXES)


def _tokens_at_once(shape: tuple[int, int, int], cfg: ModelConfig) -> int:
  """Returns the tokens of a block, given the shape of this device's share of a weight.

  Several blocks need float32 sums of the weights' gradients. Where a device has many experts, these
  take more memory than rows do, so there a block may have about as many rows as the weights have.
  """
  n_experts, _, width = shape
  n_owners = collectives.axis_size(*OWNERS)
  rows_of_a_token = n_owners * min(cfg.n_activated_experts, n_experts)
  many = 3 * n_experts * width // rows_of_a_token
  return max(TOKENS_AT_ONCE // n_owners, 1 << many.bit_length() >> 1)  # A power of two.


def _apply(tokens, experts, gates, w1, w3, w2, cfg: ModelConfig, backend: str):
  """Returns the gated sum of each token's experts, float32 [A, D], wherever these lie."""
  n_tokens, n_chosen = experts.shape
  # A stable sort puts each expert's tokens side by side, and last what only fills up a block.
  order = jnp.argsort(jnp.where(experts < 0, cfg.n_routed_experts, experts).reshape(-1))
  places = jnp.argsort(order).reshape(experts.shape)
  journey = ragged.plan_journey(jnp.sum(_is_of(experts, cfg), axis=(0, 1)), *OWNERS)
  # So many rows arrive if all tokens choose this device's experts.
  most = collectives.axis_size(*OWNERS) * n_tokens * min(n_chosen, w1.shape[0])
  rows = ragged.send(_spread(tokens, order, places), journey.there, most, *OWNERS)
  dot = lambda rows, w: grouped_matmul(rows, w, journey.sizes, backend=backend)
  gate, up = dot(rows, w1), dot(rows, w3)
  if limit := cfg.swiglu_limit:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  rows = dot(swiglu(gate, up).astype(tokens.dtype), w2)
  rows = ragged.send(rows, journey.back, n_tokens * n_chosen, *OWNERS)
  return _gated_sum(rows, gates, order, places)


@jax.custom_vjp
def _spread(tokens, order, places):
  """Returns a row [A*K, D] for each choice of each token, in order; `places` [A, K] says where."""
  return tokens[order // places.shape[1]]


@jax.custom_vjp
def _gated_sum(rows, gates, order, places):
  """Returns the sum of each token's rows times their gates, float32 [A, D].

  Neither it nor any gradient holds the rows in another order: each reads them where they lie.
  """
  return in_float32('AKD,AK->AD', rows[places], gates)


def _sum_of_rows(places, drows):
  dtokens = jnp.sum(drows[places].astype(jnp.float32), axis=1)
  return dtokens.astype(drows.dtype), None, None


def _gated_sum_gradients(residuals, dout):
  rows, gates, order, places = residuals
  drows = dout[order // places.shape[1]] * gates.reshape(-1)[order][:, None]
  dgates = in_float32('AKD,AD->AK', rows[places], dout)
  return drows.astype(rows.dtype), dgates, None, None


_spread.defvjp(lambda *x: (_spread(*x), x[2]), _sum_of_rows)
_gated_sum.defvjp(lambda *x: (_gated_sum(*x), x), _gated_sum_gradients)


def _is_of(experts, cfg: ModelConfig):
  """Returns which expert each choice [A, K] is, one-hot [A, K, X]; its sums need no scatter."""
  return experts[..., None] == jnp.arange(cfg.n_routed_experts)


def route(
    logits: Float[Array, 'A X'], bias: Float[Array, 'X'] | float, cfg: ModelConfig
) -> tuple[Int[Array, 'A K'], Float[Array, 'A K']]:
  """Chooses each token's experts and their weights.

  The bias moves the choice, but not the weights. Experts outside the best `n_limited_groups` groups
  cannot be chosen, or come before all whose score is negative (`zero_dropped_groups`).

  Source:
    `Gate.forward` in DeepSeek-V3.2-Exp inference/model.py at commit 87e509a2. For softmax scores,
    the DeepSeek-V2, Qwen3-MoE and Mistral Large 4 models of `transformers` 5.24; for scores of 0, its
    A.X-K2.
  """
  score = {'sigmoid': jax.nn.sigmoid, 'softmax': jax.nn.softmax}[cfg.score_func]
  scores = score(logits.astype(jnp.float32))
  choice = scores + bias
  if cfg.n_expert_groups > 1 and cfg.topk_method != 'greedy':
    grouped = choice.reshape(len(choice), cfg.n_expert_groups, -1)
    best = min(1 if cfg.topk_method == 'group_limited_greedy' else 2, grouped.shape[-1])
    group_scores = jax.lax.top_k(grouped, best)[0].sum(-1)
    groups = jax.lax.top_k(group_scores, cfg.n_limited_groups)[1]
    kept = jax.nn.one_hot(groups, cfg.n_expert_groups, dtype=bool).any(axis=1)
    dropped = 0.0 if cfg.zero_dropped_groups else -jnp.inf
    choice = jnp.where(kept[..., None], grouped, dropped).reshape(choice.shape)
  experts = jax.lax.top_k(choice, cfg.n_activated_experts)[1]
  gates = jnp.sum(jnp.where(_is_of(experts, cfg), scores[:, None], 0), axis=-1)
  if cfg.norm_topk_prob:
    gates = gates / gates.sum(axis=-1, keepdims=True)
  return experts, cfg.route_scale * gates


def balance(
    bias: Float[Array, '*L X'], load: Float[Array, '*L X'], rate: float
) -> Float[Array, '*L X']:
  """Moves the selection bias by `rate` towards the experts that received fewer tokens than most.

  Source:
    DeepSeek-V3 report, section 2.1.2 (auxiliary-loss-free load balancing).
  """
  return bias + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
