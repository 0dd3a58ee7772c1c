# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: sigmoid routing within groups, dropless experts, one shared expert."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dsa_jax import spmd
from dsa_jax.config import ModelConfig
from dsa_jax.kernels.rows import map_rows
from dsa_jax.nn.mlp import MLP, swiglu
from dsa_jax.nn.param import BackboneParam, RouterBias, param
from dsa_jax.sharding import BATCH, MESH_AXES

TOKENS_AT_ONCE = 2**14  # That a device takes in, from all that share its experts.
SHARERS = ('expert', 'tensor')  # Axes of the mesh that hold different experts, or parts of one.


class MoE(nnx.Module):
  """Sends every token to its own few experts, none dropped, and to the shared expert."""

  def __init__(self, cfg: ModelConfig, *, out_scale: float, rngs: nnx.Rngs):
    d, x, f = cfg.dim, cfg.n_routed_experts, cfg.moe_inter_dim
    inward, outward = ('expert', 'embed', 'expert_ffn'), ('expert', 'expert_ffn', 'embed')
    self.gate = param(BackboneParam, (d, x), ('embed', None), std=d**-0.5, rngs=rngs)
    self.bias = RouterBias(jnp.zeros(x), axes=(None,))
    self.w1 = param(BackboneParam, (x, d, f), inward, std=d**-0.5, rngs=rngs)
    self.w3 = param(BackboneParam, (x, d, f), inward, std=d**-0.5, rngs=rngs)
    self.w2 = param(BackboneParam, (x, f, d), outward, std=out_scale * f**-0.5, rngs=rngs)
    shared = cfg.n_shared_experts * f
    self.shared = MLP(d, shared, out_std=out_scale * shared**-0.5, rngs=rngs)
    self.cfg = cfg

  def __call__(
      self, x: Float[Array, 'B T D'], counted: Float[Array, 'B T']
  ) -> tuple[Float[Array, 'B T D'], Float[Array, 'X']]:
    """Returns the output, and how many of the `counted` tokens each expert received."""
    shares = spmd.weight_specs(self), BATCH, BATCH
    routed, load = spmd.on_each_device(MoE._experts, shares, (BATCH, P()))(self, x, counted)
    return routed + self.shared(x), load

  def _experts(self, x, counted):
    """Sends tokens to the devices that share the experts, and adds up what these return."""
    here = spmd.gather_weights(self, x.dtype)
    weights = [w[...].astype(jnp.float32) for w in (here.w1, here.w3, here.w2)]
    gate = spmd.gather(self.gate[...], 'fsdp', dim=0)
    tokens = x.reshape(-1, x.shape[-1])
    experts, gates = route(tokens.astype(jnp.float32) @ gate, self.bias[...], self.cfg)
    load = jnp.zeros(self.cfg.n_routed_experts).at[experts].add(counted.reshape(-1, 1))

    def send(rows):  # The gradients of the weights add up over such rows in float32.
      tokens, experts, gates = (spmd.gather(a[0], *SHARERS, dim=0) for a in rows)
      experts -= spmd.index('expert') * len(weights[0])  # Those of this device are now the first.
      routed = _apply(tokens, experts, gates, *(w.astype(x.dtype) for w in weights))
      return spmd.scatter_sum(routed, *SHARERS, dim=0)[None]

    rows = jax.tree.map(lambda a: a[None], (tokens, experts, gates))
    most = TOKENS_AT_ONCE // spmd.size(*SHARERS)
    routed = send(rows) if len(tokens) <= most else map_rows(jax.checkpoint(send), rows, most)
    return routed.astype(x.dtype).reshape(x.shape), spmd.total(load, *MESH_AXES)


def _apply(tokens, experts, gates, w1, w3, w2):
  """The gated sum of each token's experts, float32 [A, D], of those whose weights are here."""
  n_tokens, n_chosen = experts.shape
  here = (experts >= 0) & (experts < len(w1))
  experts = jnp.where(here, experts, len(w1)).reshape(-1)  # Others come last, in no group.
  order = jnp.argsort(experts)  # Stable: each expert's tokens, side by side.
  sizes = jnp.bincount(experts, length=len(w1))
  rows = tokens[order // n_chosen]
  hidden = swiglu(jax.lax.ragged_dot(rows, w1, sizes), jax.lax.ragged_dot(rows, w3, sizes))
  rows = jax.lax.ragged_dot(hidden.astype(tokens.dtype), w2, sizes)
  rows = rows[jnp.argsort(order)].reshape(n_tokens, n_chosen, -1)
  rows = jnp.where(here[..., None], rows.astype(jnp.float32), 0)
  return jnp.einsum('AKD,AK->AD', rows, gates)


def route(
    logits: Float[Array, 'A X'], bias: Float[Array, 'X'], cfg: ModelConfig
) -> tuple[Int[Array, 'A K'], Float[Array, 'A K']]:
  """Chooses each token's experts and their weights.

  The bias moves the choice only. A group's score is the sum of its two best experts; experts
  outside the best `n_limited_groups` groups cannot be chosen.

  Source:
    `Gate.forward` in DeepSeek-V3.2-Exp inference/model.py at commit 87e509a2.
  """
  scores = jax.nn.sigmoid(logits.astype(jnp.float32))
  choice = scores + bias
  if cfg.n_expert_groups > 1:
    grouped = choice.reshape(len(choice), cfg.n_expert_groups, -1)
    best_two = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0]
    groups = jax.lax.top_k(best_two.sum(-1), cfg.n_limited_groups)[1]
    kept = jax.nn.one_hot(groups, cfg.n_expert_groups, dtype=bool).any(axis=1)
    choice = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
  experts = jax.lax.top_k(choice, cfg.n_activated_experts)[1]
  gates = jnp.take_along_axis(scores, experts, axis=-1)
  return experts, cfg.route_scale * gates / gates.sum(axis=-1, keepdims=True)


def balance(
    bias: Float[Array, '*L X'], load: Float[Array, '*L X'], rate: float
) -> Float[Array, '*L X']:
  """Moves the selection bias by `rate` towards the experts that received fewer tokens than most.

  Source:
    DeepSeek-V3 report, section 2.1.2 (auxiliary-loss-free load balancing).
  """
  return bias + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
