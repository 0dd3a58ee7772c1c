# SPDX-License-Identifier: Apache-2.0
"""The train state: its creation, and its shapes and shardings."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
import optax

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.nn.transformer import Transformer
from dsa_jax.parallel.mesh import shardings_of, weight_sharding
from dsa_jax.training.optim import OptimConfig, make_optimizer
from dsa_jax.training.stages import PARTS


class TrainState(NamedTuple):
  """All arrays that a checkpoint holds."""

  step: jax.Array
  params: nnx.State
  opt_state: dict[str, optax.OptState]  # One for each part of the model that the stage trains.
  key: jax.Array  # The random state, as the bits of a key.


def split_parts(params: nnx.State, names: Any) -> tuple[dict[str, nnx.State], nnx.State]:
  """Splits parameters into the named parts and the rest."""
  *parts, rest = nnx.split_state(params, *(PARTS[name] for name in names), ...)
  return dict(zip(names, parts)), rest


def join_parts(parts: dict[str, nnx.State], rest: nnx.State) -> nnx.State:
  return nnx.merge_state(*parts.values(), rest)


def model_graph(cfg: ModelConfig) -> nnx.GraphDef:
  """Returns the model without its weights, which `nnx.merge` puts back."""
  return _traced(cfg)[0]


@functools.cache  # A run asks for it once for each of its entries, and again for its report.
def _traced(cfg: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
  """Returns the model without its weights, and their shapes."""
  return nnx.split(nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0))))


def init_params(cfg: ModelConfig, *, seed: int, mesh: Mesh | None = None) -> nnx.State:
  """Returns fresh weights, the same on every mesh."""
  key = jax.random.key(seed, impl='rbg')  # XLA takes ten times longer to compile Threefry.
  return _make_params(cfg, mesh)(key)


@functools.cache
def _make_params(cfg: ModelConfig, mesh: Mesh | None) -> Callable:
  make = lambda key: nnx.state(Transformer(cfg, rngs=nnx.Rngs(key)))
  shapes = jax.eval_shape(make, jax.random.key(0, impl='rbg'))
  places = None if mesh is None else shardings_of(shapes, mesh)
  # The program runs once, so on a CPU half of the compiler's work would not pay.
  options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
  return jax.jit(make, out_shardings=places, compiler_options=options)


def abstract_params(
    cfg: ModelConfig, *, mesh: Mesh | None = None, dtype: str = 'float32'
) -> nnx.State:
  """Returns the shapes, dtypes and shardings of the weights, for a checkpoint to fill.

  Args:
    cfg: The model.
    mesh: The devices that share the weights, see `weight_sharding`. None: the first device has all.
    dtype: The dtype of matrices. Norms and the router's bias are always float32.
  """
  if dtype not in ('float32', 'bfloat16'):
    raise ConfigError(f"{dtype=} must be 'float32' or 'bfloat16'.")
  first = SingleDeviceSharding(jax.devices()[0])

  def leaf(x: nnx.Variable) -> nnx.Variable:
    axes = x.get_metadata()['axes']
    place = first if mesh is None else weight_sharding(x.shape, axes, mesh)
    stored = dtype if len(axes) > 1 else 'float32'
    return x.replace(jax.ShapeDtypeStruct(x.shape, stored, sharding=place))

  return jax.tree.map(leaf, _traced(cfg)[1], is_leaf=lambda x: isinstance(x, nnx.Variable))


def new_state(
    params: nnx.State,
    trains: tuple[str, ...],
    optim: OptimConfig,
    *,
    seed: int,
    mesh: Mesh | None = None,
) -> TrainState:
  """Returns a state at step 0 with the given weights and a fresh optimiser for each part."""
  parts, _ = split_parts(params, trains)
  optimizer = make_optimizer(optim)
  fresh = lambda parts: {name: optimizer.init(part) for name, part in parts.items()}
  places = None if mesh is None else shardings_of(jax.eval_shape(fresh, parts), mesh)
  state = TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=jax.jit(fresh, out_shardings=places)(parts),
      key=jax.random.key_data(jax.random.key(seed)),
  )  # Restored arrays are committed to devices; so are these, and one program serves both.
  return jax.device_put(state, jax.devices()[0] if mesh is None else shardings_of(state, mesh))


def abstract_state(
    cfg: ModelConfig, trains: tuple[str, ...], optim: OptimConfig, *, mesh: Mesh | None = None
) -> TrainState:
  """Returns the shapes, dtypes and shardings of a state, so that its step can be compiled first."""
  params = abstract_params(cfg, mesh=mesh)
  state = jax.eval_shape(lambda params: new_state(params, trains, optim, seed=0), params)
  first = SingleDeviceSharding(jax.devices()[0])
  places = jax.tree.map(lambda _: first, state) if mesh is None else shardings_of(state, mesh)
  shape = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  return jax.tree.map(shape, state, places)
