# SPDX-License-Identifier: Apache-2.0
"""The kinds of weights: who trains them, and which axes of a mesh may split them."""

from flax import nnx
import jax


class BackboneParam(nnx.Param):
  """A weight of the dense model. It is frozen while the indexer warms up."""


class IndexerParam(nnx.Param):
  """A weight of the lightning indexer. Only distillation trains it."""


class LayerFact(nnx.Variable):
  """What tells a layer from its neighbours in a stack that is scanned. No checkpoint holds it."""


class RouterBias(nnx.Variable):
  """The selection bias of the experts. No loss trains it: the load of each expert moves it."""


def param(
    kind: type[nnx.Variable],
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    std: float,
    rngs: nnx.Rngs,
) -> nnx.Variable:
  """Creates a float32 weight, drawn from a normal distribution.

  Args:
    kind: Who trains it.
    shape: Its shape.
    axes: The names of its dimensions in `parallel.mesh.RULES`. A dimension named None is never split.
    std: The standard deviation.
    rngs: What it is drawn from.
  """
  if len(axes) != len(shape):
    raise ValueError(f'{axes=} must name every dimension of {shape=}.')
  return kind(std * jax.random.normal(rngs.params(), shape), axes=axes)
