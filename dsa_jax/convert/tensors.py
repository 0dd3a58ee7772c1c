# SPDX-License-Identifier: Apache-2.0
"""Where every tensor of a released checkpoint belongs: one table, read in both directions."""

from collections.abc import Iterator
import dataclasses
import math

import einops
from flax import nnx
import jax
import numpy as np

from dsa_jax.config import ModelConfig
from dsa_jax.convert.config_json import FAMILIES
from dsa_jax.nn.transformer import Transformer

Path = tuple[str, ...]  # Of a weight in our tree.

# Our path -> their name, and their axes -> ours.
MODEL = {
    'embed': ('model.embed_tokens.weight', 'w d -> w d'),
    'norm/scale': ('model.norm.weight', 'd -> d'),
    'head': ('lm_head.weight', 'w d -> d w'),
}
LAYER = {
    'attn_norm/scale': ('input_layernorm.weight', 'd -> d'),
    'attn/wq_a': ('self_attn.q_a_proj.weight', 'q d -> d q'),
    'attn/q_norm/scale': ('self_attn.q_a_layernorm.weight', 'q -> q'),
    'attn/wq_b': ('self_attn.q_b_proj.weight', '(h e) q -> q h e'),
    'attn/wkv_a': ('self_attn.kv_a_proj_with_mqa.weight', 'e d -> d e'),
    'attn/kv_norm/scale': ('self_attn.kv_a_layernorm.weight', 'c -> c'),
    'attn/wkv_b': ('self_attn.kv_b_proj.weight', '(h e) c -> c h e'),
    'attn/wo': ('self_attn.o_proj.weight', 'd (h v) -> h v d'),
    'attn/indexer/wq_b': ('self_attn.indexer.wq_b.weight', '(i j) q -> q i j'),
    'attn/indexer/wk': ('self_attn.indexer.wk.weight', 'j d -> d j'),
    'attn/indexer/k_norm/scale': ('self_attn.indexer.k_norm.weight', 'j -> j'),
    'attn/indexer/k_norm/bias': ('self_attn.indexer.k_norm.bias', 'j -> j'),
    'attn/indexer/weights_proj': ('self_attn.indexer.weights_proj.weight', 'i d -> d i'),
    'ffn_norm/scale': ('post_attention_layernorm.weight', 'd -> d'),
}
MLP = {
    'ffn/w1': ('mlp.gate_proj.weight', 'f d -> d f'),
    'ffn/w3': ('mlp.up_proj.weight', 'f d -> d f'),
    'ffn/w2': ('mlp.down_proj.weight', 'd f -> f d'),
}
MOE = {
    'ffn/gate': ('mlp.gate.weight', 'x d -> d x'),
    'ffn/bias': ('mlp.gate.e_score_correction_bias', 'x -> x'),
    'ffn/w1': ('mlp.experts.{}.gate_proj.weight', 'f d -> d f'),  # Each expert on its own.
    'ffn/w3': ('mlp.experts.{}.up_proj.weight', 'f d -> d f'),
    'ffn/w2': ('mlp.experts.{}.down_proj.weight', 'd f -> f d'),
    'ffn/shared/w1': ('mlp.shared_experts.gate_proj.weight', 'f d -> d f'),
    'ffn/shared/w3': ('mlp.shared_experts.up_proj.weight', 'f d -> d f'),
    'ffn/shared/w2': ('mlp.shared_experts.down_proj.weight', 'd f -> f d'),
}
MTP = {
    'enorm/scale': ('enorm.weight', 'd -> d'),
    'hnorm/scale': ('hnorm.weight', 'd -> d'),
    'eh_proj': ('eh_proj.weight', 'd e -> e d'),
    'norm/scale': ('shared_head.norm.weight', 'd -> d'),
}
MTP_COPIES = {  # Of tensors that our MTP layer shares with the model.
    'embed_tokens.weight': 'model.embed_tokens.weight',
    'shared_head.head.weight': 'lm_head.weight',
}
# What a model quantised to FP8 keeps in FP8: the large matrices of its layers.
QUANTIZED = (
    'q_a_proj', 'q_b_proj', 'kv_a_proj_with_mqa', 'kv_b_proj', 'o_proj', 'wq_b', 'wk',
    'gate_proj', 'up_proj', 'down_proj',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of theirs, and the piece of our array that it is."""

  name: str
  index: tuple[int, ...]  # Within our array: layer, expert.
  equation: str  # Their axes -> those of the piece.
  piece: tuple[int, ...]  # Shape of the piece.

  @property
  def shape(self) -> tuple[int, ...]:
    """Their shape."""
    sizes, theirs = self._sizes(), self.equation.split(' -> ')[0]
    for group in _groups(theirs):
      theirs = theirs.replace(f'({group})', group.replace(' ', '*'))
    return tuple(math.prod(sizes[axis] for axis in axes.split('*')) for axes in theirs.split())

  def to_ours(self, x: np.ndarray) -> np.ndarray:
    return einops.rearrange(x, self.equation, **self._grouped())

  def to_theirs(self, x: np.ndarray) -> np.ndarray:
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
  """One array of ours, and the tensors that it is made of."""

  shape: tuple[int, ...]
  tensors: list[Tensor]

  @property
  def n_leading(self) -> int:
    return len(self.tensors[0].index)

  @property
  def quantizable(self) -> bool:
    return self.tensors[0].name.split('.')[-2] in QUANTIZED


def arrays_of(cfg: ModelConfig, family: str) -> dict[Path, Array]:
  """Returns every array of the model that the family's checkpoints hold, and whence it comes."""
  shapes = weight_shapes(cfg)
  names = {tuple(path.split('/')): [((), *MODEL[path])] for path in MODEL}
  leading = cfg.n_dense_layers
  for i in range(cfg.n_layers):
    stack, first = ('dense_blocks', 0) if i < leading else ('moe_blocks', leading)
    full = [layer for layer in cfg.full_layers if first <= layer < i]
    has_indexer = cfg.is_full(i) and FAMILIES[family].has_indexer
    for path, index, name, equation in _layer(cfg, i >= leading, has_indexer):
      layer = len(full) if 'indexer' in path else i - first
      source = (layer, *index), f'model.layers.{i}.{name}', equation
      names.setdefault((stack, *path), []).append(source)
  if cfg.n_mtp_layers:
    prefix = f'model.layers.{cfg.n_layers}.'
    for path, (name, equation) in MTP.items():
      names['mtp', *path.split('/')] = [((), prefix + name, equation)]
    has_indexer = FAMILIES[family].has_indexer
    for path, index, name, equation in _layer(cfg, leading < cfg.n_layers, has_indexer):
      names.setdefault(('mtp', 'block', *path), []).append((index, prefix + name, equation))
  return {
      path: Array(
          shapes[path],
          [Tensor(name, i, equation, shapes[path][len(i) :]) for i, name, equation in sources],
      )
      for path, sources in names.items()
  }


def _layer(
    cfg: ModelConfig, experts: bool, has_indexer: bool
) -> Iterator[tuple[Path, tuple[int, ...], str, str]]:
  """Our path, index beyond the layer, their name and equation, of everything in a layer."""
  for path, (name, equation) in (LAYER | (MOE if experts else MLP)).items():
    parts = tuple(path.split('/'))
    if 'indexer' in parts and not has_indexer:
      continue
    if '{}' in name:
      for expert in range(cfg.n_routed_experts):
        yield parts, (expert,), name.format(expert), equation
    else:
      yield parts, (), name, equation


def mtp_copies(cfg: ModelConfig) -> dict[str, str]:
  """Their names of what the MTP layer repeats, and of what it repeats."""
  if not cfg.n_mtp_layers:
    return {}
  return {f'model.layers.{cfg.n_layers}.{name}': of for name, of in MTP_COPIES.items()}


def weight_shapes(cfg: ModelConfig) -> dict[Path, tuple[int, ...]]:
  """Returns the shape of every weight of our model."""
  params = nnx.as_pure(nnx.state(nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))))
  return {
      tuple(key.key for key in path): x.shape for path, x in jax.tree.leaves_with_path(params)
  }
