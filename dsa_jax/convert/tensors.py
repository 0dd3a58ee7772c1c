# SPDX-License-Identifier: Apache-2.0
"""Where every tensor of a released checkpoint belongs, by the table of its family."""

from collections import Counter
from collections.abc import Iterator, Mapping
import dataclasses
import functools
import math

import einops
from flax import nnx
import jax
import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.families import FAMILIES
from dsa_jax.families.family import TensorNames
from dsa_jax.nn.layers import OF_EXPERTS, layers_of_stacks
from dsa_jax.nn.transformer import Transformer

Path = tuple[str, ...]  # The path of a weight in our tree.


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a released checkpoint, which is one piece of an array of ours."""

  name: str
  index: tuple[int, ...]  # Where the piece lies in our array: its layer, its expert.
  equation: str  # Turns the tensor's axes into those of the piece.
  piece: tuple[int, ...]  # The shape of the piece.
  part: int = 0  # Which part of the tensor the piece is, along its last axis but one.
  n_parts: int = 1  # The number of pieces that the tensor holds.

  @property
  def shape(self) -> tuple[int, ...]:
    """The tensor's own shape."""
    sizes, theirs = self._sizes(), self.equation.split(' -> ')[0]
    for group in _groups(theirs):
      theirs = theirs.replace(f'({group})', group.replace(' ', '*'))
    shape = [math.prod(sizes[axis] for axis in axes.split('*')) for axes in theirs.split()]
    if self.n_parts > 1:
      shape[-2] *= self.n_parts
    return tuple(shape)

  def to_ours(self, x: np.ndarray) -> np.ndarray:
    if self.n_parts > 1:
      x = np.split(x, self.n_parts, axis=-2)[self.part]
    return einops.rearrange(x, self.equation, **self._grouped())

  def to_theirs(self, x: np.ndarray) -> np.ndarray:
    """Returns the tensor, or this part of it."""
    return einops.rearrange(x, ' -> '.join(reversed(self.equation.split(' -> '))))

  def _sizes(self) -> dict[str, int]:
    return dict(zip(self.equation.split(' -> ')[1].split(), self.piece))

  def _grouped(self) -> dict[str, int]:
    sizes = self._sizes()
    return {axis: sizes[axis] for group in _groups(self.equation) for axis in group.split()}


def _groups(equation: str) -> list[str]:
  return [part.split(')')[0] for part in equation.split('(')[1:]]


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of ours, and the tensors that it is made of."""

  shape: tuple[int, ...]
  tensors: list[Tensor]
  quantizable: bool  # Whether a checkpoint may hold it in FP8.

  @property
  def n_leading(self) -> int:
    return len(self.tensors[0].index)


def arrays_of(
    cfg: ModelConfig,
    family: str,
    *,
    has_indexer: bool | None = None,
    names: TensorNames | None = None,
) -> dict[Path, Array]:
  """Returns every array of the model that a checkpoint of the family holds, with its tensors.

  Args:
    cfg: The model.
    family: A key of FAMILIES.
    has_indexer: Whether the checkpoint has indexers. None stands for what is usual in the family.
    names: The names of its tensors. None stands for those of the release.
  """
  traits, shapes = FAMILIES[family], weight_shapes(cfg)
  names = names or traits.tensors
  has_indexer = traits.has_indexer if has_indexer is None else has_indexer
  sources = {tuple(path.split('/')): [((), *name)] for path, name in names.model.items()}
  for stack, layers in layers_of_stacks(cfg).items():
    full = [i for i in layers if cfg.is_full(i)]
    for i in layers:
      scores = cfg.is_full(i) and has_indexer
      for path, index, name, *rest in _layer(cfg, names, stack in OF_EXPERTS, scores):
        at = (full if 'indexer' in path else layers).index(i)
        source = (at, *index), f'{names.layers}{i}.{name}', *rest
        sources.setdefault((stack, *path), []).append(source)
  if cfg.n_mtp_layers:
    prefix = f'{names.layers}{cfg.n_layers}.'
    for path, (name, equation) in names.mtp.items():
      sources['mtp', *path.split('/')] = [((), prefix + name, equation)]
    has_experts = cfg.n_dense_layers < cfg.n_layers
    for path, index, name, *rest in _layer(cfg, names, has_experts, has_indexer):
      sources.setdefault(('mtp', 'block', *path), []).append((index, prefix + name, *rest))
  return {
      path: Array(
          shapes[path],
          [Tensor(name, i, equation, shapes[path][len(i) :], *of) for i, name, equation, *of in pieces],
          quantizable=_is_quantizable(pieces[0][1], names),
      )
      for path, pieces in sources.items()
      if path in shapes
  }


def _is_quantizable(name: str, names: TensorNames) -> bool:
  *_, module, kind = name.split('.')
  return kind == 'weight' and module in names.quantized


def _layer(
    cfg: ModelConfig, tensors: TensorNames, has_experts: bool, has_indexer: bool
) -> Iterator[tuple[Path, tuple[int, ...], str, str, int, int]]:
  """Yields the pieces of a layer's tensors.

  They are paths, indices beyond the layer, names, equations, parts of the tensor and their number.
  """
  attention = {**tensors.layer, **({} if cfg.q_lora_rank else tensors.without_q_latent)}
  names = {**attention, **(tensors.moe if has_experts else tensors.mlp)}
  of_names, seen = Counter(name for name, _ in names.values()), Counter[str]()
  for path, (name, equation) in names.items():
    part, n_parts = seen[name], of_names[name]
    seen[name] += 1
    parts = tuple(path.split('/'))
    if 'indexer' in parts and not has_indexer:
      continue
    if '{}' in name:
      for expert in range(cfg.n_routed_experts):
        yield parts, (expert,), name.format(expert), equation, part, n_parts
    else:
      yield parts, (), name, equation, part, n_parts


def copies_of(cfg: ModelConfig, family: str) -> dict[str, str]:
  """Returns the names of tensors that may repeat others, each with the name of its original.

  They are the head where it is the embedding, and what the MTP layer shares with the model.
  """
  tensors, copies = FAMILIES[family].tensors, {}
  if cfg.tie_embeddings:
    copies[tensors.model['head'][0]] = tensors.model['embed'][0]
  if cfg.n_mtp_layers:
    prefix = f'{tensors.layers}{cfg.n_layers}.'
    copies |= {prefix + name: original for name, original in tensors.mtp_copies.items()}
  return copies


@functools.lru_cache(maxsize=8)
def weight_shapes(cfg: ModelConfig) -> Mapping[Path, tuple[int, ...]]:
  """Returns the shape of every weight of our model."""
  params = nnx.as_pure(nnx.state(nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))))
  return {
      tuple(key.key for key in path): x.shape for path, x in jax.tree.leaves_with_path(params)
  }
