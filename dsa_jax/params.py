# SPDX-License-Identifier: Apache-2.0
"""Weights that know who trains them and how they split."""

from flax import nnx
import jax


class BackboneParam(nnx.Param):
  """A weight of the dense model; frozen while the indexer warms up."""


class IndexerParam(nnx.Param):
  """A weight of the lightning indexer; trained by distillation only."""


class RouterBias(nnx.Variable):
  """The experts' selection bias; no loss trains it, the load of each expert moves it."""


def param(
    kind: type[nnx.Variable],
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    std: float,
    rngs: nnx.Rngs,
) -> nnx.Variable:
  """Creates a float32 weight, normal with `std`; `axes` names its dimensions (None: never split)."""
  if len(axes) != len(shape):
    raise ValueError(f'{axes=} must name every dimension of {shape=}.')
  return kind(std * jax.random.normal(rngs.params(), shape), axes=axes)
