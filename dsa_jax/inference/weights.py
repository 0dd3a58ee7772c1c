# SPDX-License-Identifier: Apache-2.0
"""The formats in which a loaded model keeps its weights, and their loading share by share."""

from collections.abc import Collection, Iterator
import dataclasses
import functools
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.inference.released import equation_of, scales_of_blocks
from dsa_jax.inference.storage import as_bits, from_bits
from dsa_jax.kernels.block_scaled import BlockScaled, block_sizes, quantize
from dsa_jax.training.checkpoint import check_params, latest_checkpoint, reading
from dsa_jax.training.state import abstract_params
from dsa_jax.training.stored_arrays import StoredArray, open_tree, read_array, shares_of

WIDE = 'float32', 'bfloat16'
CODES = {'fp8': jnp.float8_e4m3fn, 'int8': jnp.int8}
FORMATS = (*WIDE, *CODES)
# The matrices that narrow formats quantise, as released checkpoints do. All others stay what they are:
# embeddings, heads, routers, and what weighs an indexer's heads.
NARROW = {'wq_a', 'wq_b', 'wkv_a', 'wkv_b', 'wo', 'wg', 'wq', 'wk', 'wv', 'w1', 'w2', 'w3'}

Path = tuple[str, ...]


def abstract_weights(
    cfg: ModelConfig,
    fmt: str,
    *,
    mesh: Mesh | None = None,
    stored: dict[Path, StoredArray] | None = None,
    narrow: Collection[Path] = (),
) -> nnx.State:
  """Returns the shapes, dtypes and shardings of a model's weights in a format.

  Args:
    cfg: The model.
    fmt: One of FORMATS.
    mesh: The devices that share the weights, see `abstract_params`.
    stored: The arrays of a checkpoint, whose dtypes matrices keep that a narrow format leaves wide.
      None: they are bfloat16.
    narrow: The arrays that a narrow format quantises; (): those with the names of NARROW.
  """
  if fmt not in FORMATS:
    raise ConfigError(f'the weights are in one of the formats {FORMATS}; got {fmt!r}.')
  if fmt in WIDE:
    return abstract_params(cfg, mesh=mesh, dtype=fmt)

  def leaf(path: tuple, x: nnx.Variable) -> nnx.Variable:
    names, target = _names(path), x.get_value()
    if names in narrow if narrow else names[-1] in NARROW:
      return x.replace(_abstract_scaled(target, x.get_metadata()['axes'], CODES[fmt]))
    if stored is None or target.dtype == 'float32' or stored[names].has_codes:
      return x
    dtype = stored[names].dtype
    return x.replace(jax.ShapeDtypeStruct(target.shape, dtype, sharding=target.sharding))

  params = abstract_params(cfg, mesh=mesh, dtype='bfloat16')
  return jax.tree.map_with_path(leaf, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _abstract_scaled(
    x: jax.ShapeDtypeStruct, axes: tuple[str | None, ...], dtype: Any
) -> BlockScaled:
  share = x.sharding.shard_shape(x.shape)[x.ndim - len(axes) :]
  leading = x.shape[: x.ndim - len(axes)]
  sizes = (1,) * len(leading) + block_sizes(share, axes)
  blocks = tuple(n // size for n, size in zip(x.shape, sizes))
  part = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=x.sharding)
  return BlockScaled(part(x.shape, dtype), part(blocks, jnp.float32))


def load_weights(
    folder: pathlib.Path, cfg: ModelConfig, fmt: str, *, mesh: Mesh | None = None, family: str = ''
) -> nnx.State:
  """Returns the weights of a checkpoint. Every device reads its own share only, a layer at a time.

  Args:
    folder: The checkpoint, or one step of it.
    cfg: Its model.
    fmt: One of FORMATS. In 'fp8', an import that was in FP8 has the codes and scales that it was
      released with, and what else it has stays as it is.
    mesh: The devices that share the weights; None: the first has all.
    family: The family of the import, if it is one.

  Raises:
    ConfigError: There is no checkpoint, it is of another model, or there is no such format.
    DamagedCheckpoint: An array is not what was saved.
  """
  stores = check_params(folder, abstract_params(cfg, mesh=mesh))
  step = latest_checkpoint(folder)
  has_scales = family and (step / 'scales').is_dir()
  with reading(step):
    scales = open_tree(step / 'scales') if has_scales else {}
  narrow = scales.keys() if fmt == 'fp8' else ()
  like = abstract_weights(cfg, fmt, mesh=mesh, stored=stores, narrow=narrow)

  def load(path: tuple, x: nnx.Variable) -> nnx.Variable:
    names, target, store = _names(path), x.get_value(), stores[_names(path)]
    if not isinstance(target, BlockScaled) and not store.has_codes:
      return x.replace(read_array(store, target))
    blocks = target
    if not isinstance(target, BlockScaled):
      blocks = _abstract_scaled(target, x.get_metadata()['axes'], store.dtype)
    if store.has_codes and names not in scales:
      raise ConfigError(f'{folder} lacks the scales of {".".join(names)}: the copy is not whole.')
    equation = equation_of(cfg, family, names) if names in narrow or store.has_codes else None
    sizes, scale = _sizes(blocks), None
    if equation is not None:
      n = target.ndim - len(equation.split(' -> ')[1].split())
      released = scales[names].read().result()
      scale = scales_of_blocks(released, equation, target.shape[n:], sizes[n:])
    return x.replace(_read_blocks(store, target, sizes, scale))

  with reading(step):
    return jax.tree.map_with_path(load, like, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _names(path: tuple) -> Path:
  return tuple(str(key.key) for key in path)


def _sizes(x: BlockScaled) -> tuple[int, ...]:
  """Returns the sizes of its blocks."""
  return tuple(n // n_blocks for n, n_blocks in zip(x.shape, x.scale.shape))


def _read_blocks(
    store: StoredArray,
    target: BlockScaled | jax.ShapeDtypeStruct,
    sizes: tuple[int, ...],
    scale: np.ndarray | None,
) -> BlockScaled | Array:
  """Reads numbers into codes, or codes into either, the shards of this process's devices only.

  Args:
    store: Numbers or codes.
    target: What becomes of them.
    sizes: Those of their blocks.
    scale: The scales of stored codes, or of those that numbers become; None: such as fit the numbers.
  """
  parts, whole = [], target.codes if isinstance(target, BlockScaled) else target
  for share, (first, *others) in shares_of(store, whole):
    own = tuple(slice(r.start // size, r.stop // size) for r, size in zip(share.part, sizes))
    part = _read_share(share, sizes, whole.dtype, None if scale is None else scale[own], first)
    parts += [part, *(jax.device_put(part, device) for device in others)]
  join = lambda like, *parts: jax.make_array_from_single_device_arrays(
      like.shape, like.sharding, list(parts)
  )
  return jax.tree.map(join, target, *parts)


def _read_share(
    share: StoredArray,
    sizes: tuple[int, ...],
    dtype: Any,
    scale: np.ndarray | None,
    device: jax.Device,
) -> BlockScaled | Array:
  """Reads a share onto a device, one layer, expert or head after another where there are any."""
  if sizes[0] > 1:
    return _convert(*jax.device_put((share.read().result(), scale), device), sizes=sizes, dtype=dtype)
  with jax.default_device(device):
    filled = as_bits(jnp.zeros(share.shape, dtype))
    if dtype in CODES.values():
      blocks = tuple(n // size for n, size in zip(share.shape, sizes))
      filled = BlockScaled(filled, jnp.zeros(blocks, jnp.float32))
  for i, piece in enumerate(_pieces(share)):
    of_piece = piece, None if scale is None else scale[i]
    of_piece = jax.device_put(of_piece, device)
    filled = jax.block_until_ready(_fill(filled, i, *of_piece, sizes=sizes[1:], dtype=dtype))
  if isinstance(filled, BlockScaled):
    return BlockScaled(from_bits(filled.codes, dtype), filled.scale)
  return from_bits(filled, dtype)


def _pieces(share: StoredArray) -> Iterator[np.ndarray]:
  """Yields the parts of a share along its first axis, and reads the next one meanwhile.

  A chunk of its file that holds several parts is read once: a run's checkpoint has a stack in one.
  """
  if share.rows_per_file > 1:
    yield from share.read().result()
    return
  following, last = share.piece((0,)).read(), share.shape[0] - 1
  for i in range(last + 1):
    piece, following = following.result(), share.piece((min(i + 1, last),)).read()
    yield piece


@functools.partial(jax.jit, static_argnames=('sizes', 'dtype'))
def _convert(
    x: Float[Array, '*any'], scale: Float[Array, '*blocks'] | None, *, sizes: tuple, dtype: Any
) -> BlockScaled | Array:
  """Returns numbers or codes as either; see `_read_blocks`."""
  if x.dtype == CODES['fp8']:
    codes = BlockScaled(x, scale)
    if x.dtype == dtype:
      return codes
    x, scale = codes.astype(jnp.float32), None
  return quantize(x, sizes, dtype, scale) if dtype in CODES.values() else x.astype(dtype)


@functools.partial(jax.jit, static_argnames=('sizes', 'dtype'), donate_argnames='filled')
def _fill(
    filled: BlockScaled | Array,
    i: Int[Array, ''],
    piece: Float[Array, '*any'],
    scale: Float[Array, '*blocks'] | None,
    *,
    sizes: tuple,
    dtype: Any,
) -> BlockScaled | Array:
  """Returns the bits of numbers or codes, with those of one piece."""
  new = _convert(piece, scale, sizes=sizes, dtype=dtype)
  new = dataclasses.replace(new, codes=as_bits(new.codes)) if isinstance(new, BlockScaled) else as_bits(new)
  return jax.tree.map(lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, i, 0), filled, new)
