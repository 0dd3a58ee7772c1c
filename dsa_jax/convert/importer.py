# SPDX-License-Identifier: Apache-2.0
"""Imports a released checkpoint: checks all of it, then streams it into one of ours."""

from collections.abc import Callable, Iterator
import dataclasses
import json
import pathlib
from typing import Any

from flax import nnx
import jax
import ml_dtypes
import numpy as np

from dsa_jax.checkpoint_paths import check_readable
from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.convert import fp8
from dsa_jax.convert.building import Summary, building, copy_kept, kept_names
from dsa_jax.convert.config_json import LARGEST_SIZE, has_indexer, read_config
from dsa_jax.convert.files import (
    CODES, DTYPES, IS_POINTER, PACKED, Place, is_pointer, open_folder,
)  # fmt: skip
from dsa_jax.convert.gguf_model import open_gguf
from dsa_jax.convert.problems import Problems
from dsa_jax.convert.stream import Streamed, write_step
from dsa_jax.convert.tensors import Array, Path, Tensor, arrays_of, copies_of, weight_shapes
from dsa_jax.data.seeds import check_seed
from dsa_jax.data.tokenizer_files import TOKENIZER_FILES, released_config, stop_ids
from dsa_jax.families import FAMILIES
from dsa_jax.families.family import TensorNames
from dsa_jax.inference.released import equation_of
from dsa_jax.json_files import read_object
from dsa_jax.nn.indexer import LightningIndexer
from dsa_jax.nn.layers import STACKS

SCALE = '_scale_inv'  # The name of an FP8 tensor's scales ends with this.
SCALE_DTYPES = 'F32', 'BF16'  # DeepSeek's scales are of the first, Qwen's of the second.
Advance = Callable[[int], None]  # Called with the number of bytes that have just been read.


@dataclasses.dataclass(frozen=True)
class Source:
  """A released checkpoint that has passed all checks."""

  folder: pathlib.Path  # A folder, or a GGUF file.
  family: str
  config: dict[str, Any]  # The released config.json, unchanged; or that which a GGUF file implies.
  model: ModelConfig
  arrays: dict[Path, Array]
  places: dict[str, Place]
  copies: dict[str, str]  # The names of tensors that repeat others, with the names of those.
  made: dict[str, str]  # The tokenizer's files out of a GGUF file, by their names.

  @property
  def nbytes(self) -> int:
    return sum(place.nbytes for place in self.places.values())

  def dtype(self, path: Path) -> str:
    return self.places[self.arrays[path].tensors[0].name].dtype


def open_source(
    folder: pathlib.Path, *, mtp: bool = True, indexer: dict[str, int] | None = None
) -> Source:
  """Reads config and headers, and checks that all tensors are there, and no others.

  Args:
    folder: A folder with config.json, safetensors files and their index; or a GGUF file.
    mtp: Whether to keep the MTP layer, where the checkpoint has one.
    indexer: Sizes of fresh indexers, for a checkpoint that has none: index_n_heads,
      index_head_dim, index_topk, index_n_selections and index_rope_head_dim. The usual ones of the family take the
      place of any that are not given.

  Raises:
    ConfigError: This is no whole checkpoint of a known family; the message lists every problem.
  """
  config, places, problems, made = _open(folder)
  family, model = read_config(config)
  for name, size in (indexer or {}).items():
    if not 0 < size < LARGEST_SIZE:
      raise ConfigError(f'{name}={size} must be positive and below {LARGEST_SIZE}.')
  has_own = has_indexer(config)
  if indexer and has_own:
    raise ConfigError(f'This {family} checkpoint has indexers: {indexer} cannot be chosen.')
  model = dataclasses.replace(model, **(indexer or {}))
  _check_kept(folder, problems)
  names = _names_in(places, family)
  unused, places = _unused(model, family, names), _renamed(places, names, problems)
  is_read = lambda name: not (_is_unused(name, unused) or name.startswith(names.unread))
  places = {name: place for name, place in places.items() if is_read(name)}
  mtp_prefix = f'{names.layers}{model.n_layers}.'
  extra_layer = [name for name in places if name.startswith(mtp_prefix)]
  if mtp and extra_layer and not model.n_mtp_layers:
    problems.add(
        f'{extra_layer[0]} and {len(extra_layer) - 1} more are of an MTP layer, and config.json '
        'has no num_nextn_predict_layers: set it to 1, or leave the layer out with --nomtp.'
    )
  if not (mtp and extra_layer and model.n_mtp_layers):
    model = dataclasses.replace(model, n_mtp_layers=0)  # `transformers` saves no MTP layer.
    places = {name: place for name, place in places.items() if name not in set(extra_layer)}
  if not _says_dtype(config) and {place.dtype for place in places.values()} == {'F32'}:
    model = dataclasses.replace(model, dtype='float32')
  arrays = arrays_of(model, family, has_indexer=has_own, names=names)
  copies = {name: of for name, of in copies_of(model, family).items() if name in places}
  if not problems:  # Otherwise a missing file would be reported once for each of its tensors.
    _check_tensors(mtp_prefix, arrays, copies, places, problems)
  if problems:
    raise ConfigError(f'{folder} cannot be converted:\n  ' + '\n  '.join(problems.lines()))
  return Source(folder, family, config, model, arrays, places, copies, made)


def _open(
    folder: pathlib.Path,
) -> tuple[Any, dict[str, Place], Problems, dict[str, str]]:
  """Returns config.json, the tensors, all that is wrong with the files, and files to be made."""
  if folder.is_file() or (folder.suffix == '.gguf' and not folder.is_dir()):
    config, places, made = open_gguf(folder)
    return config, places, Problems(), made
  config = _read_config(folder)
  return config, *open_folder(folder), {}


def _check_kept(folder: pathlib.Path, problems: Problems):
  """Looks at the files that are copied: a sampler would refuse what it cannot read."""
  kept = kept_names(folder)
  pointers = [name for name in kept if is_pointer(folder / name)]
  for name in pointers:
    problems.add(f'{name} {IS_POINTER}', 'pointer')
  objects = {*TOKENIZER_FILES} - {*pointers, 'tokenizer.json', 'chat_template.jinja'}
  try:
    for name in filter(objects.__contains__, kept):
      read_object(folder / name)
    if 'tokenizer.json' in kept and not pointers:
      stop_ids(folder, released_config(folder))
  except ConfigError as error:
    problems.add(f'{error} Repair the file, or delete it.')


def _read_config(folder: pathlib.Path) -> Any:
  try:
    if is_pointer(folder / 'config.json'):
      raise ConfigError(f'config.json {IS_POINTER}')
    config = json.loads((folder / 'config.json').read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise ConfigError(f'{folder} is no released checkpoint: config.json: {error}') from error
  if isinstance(config, dict) and isinstance(config.get('model'), dict) and 'model_type' not in config:
    raise ConfigError(f'{folder} is a checkpoint of this package already; --export gives a released one.')
  return config


def _names_in(places: dict[str, Place], family: str) -> TensorNames:
  """Returns the names of a checkpoint's tensors: those of the release, unless it has others."""
  released, others = FAMILIES[family].tensors, FAMILIES[family].in_memory
  return others if others and others.model['embed'][0] in places else released


def _says_dtype(config: dict[str, Any]) -> bool:
  """Returns whether a config.json names a dtype; loaders take that of the weights where it does not."""
  text = config.get('text_config')
  sections = (config, text) if isinstance(text, dict) else (config,)
  return any(section.get(key) for section in sections for key in ('dtype', 'torch_dtype'))


def _unused(model: ModelConfig, family: str, names: TensorNames) -> set[str]:
  """Returns the names of indexers in layers that share another's; some checkpoints have them."""
  if not model.shares_indexers:
    return set()
  arrays = lambda cfg: arrays_of(cfg, family, has_indexer=True, names=names).values()
  all_of = lambda cfg: {tensor.name for array in arrays(cfg) for tensor in array.tensors}
  return all_of(dataclasses.replace(model, indexer_types=())) - all_of(model)


def _renamed(
    places: dict[str, Place], names: TensorNames, problems: Problems
) -> dict[str, Place]:
  """Returns tensors under their usual names."""
  renamed = {}
  for name, place in places.items():
    own = name
    for alias, module in names.aliases.items():
      own = own.replace(f'.{alias}.', f'.{module}.')
    if own in renamed or (own != name and own in places):
      problems.add(f'{name} is {own} by another name, and both are there.')
    renamed[own] = place
  return renamed


def _is_unused(name: str, unused: set[str]) -> bool:
  """Returns whether a tensor is one that no loader reads."""
  return name.removesuffix(SCALE) in unused or name.endswith('rotary_emb.inv_freq')


def _check_tensors(
    mtp_prefix: str,
    arrays: dict[Path, Array],
    copies: dict[str, str],
    places: dict[str, Place],
    problems: Problems,
):
  known, scales = set[str](), dict[str, list[str]]()
  for array in arrays.values():
    for tensor in array.tensors:
      known.add(tensor.name)
      _check_tensor(tensor, array, places, known, scales, problems)
    for end in '', SCALE:
      named = [t.name + end for t in array.tensors if t.name + end in places]
      dtypes = {places[name].dtype: name for name in named}
      if len(dtypes) > 1:
        names = ' and '.join(f'{name} ({dtype})' for dtype, name in dtypes.items())
        problems.add(f'{names} are stacked and must share a dtype.', 'stack')
  for dtype, names in scales.items():
    problems.add(
        f'{len(names)} scales, such as {names[0]}, are {dtype}; they must be F32 or BF16: write them '
        'anew.'
    )
  for name, original in copies.items():
    known.add(name)
    advice = ' --nomtp leaves the MTP layer out.' if name.startswith(mtp_prefix) else ''
    if original in places and places[name][1:3] != places[original][1:3]:
      problems.add(f'{name} must be a copy of {original}: their dtypes or shapes differ.{advice}')
    elif original in places and not _same(places[name], places[original]):
      problems.add(
          f'{name} must be a copy of {original}, which the model reads in its place.{advice}'
      )
  for name in places:
    if name not in known:
      problems.add(f'{name} is in no place of this model.', 'stranger')
  missing = [name for name in known if name not in places]
  if missing and all(name.startswith(mtp_prefix) for name in missing):
    problems.add('Nothing is missing outside the MTP layer, which --nomtp leaves out.')


def _check_tensor(
    tensor: Tensor,
    array: Array,
    places: dict[str, Place],
    known: set[str],
    scales: dict[str, list[str]],
    problems: Problems,
):
  """Checks a tensor and its scales; `scales` takes those of dtypes that are not read."""
  place = places.get(tensor.name)
  if place is None:
    return problems.add(f'{tensor.name} is missing.', 'missing')
  if place.shape != tensor.shape:
    line = f'{tensor.name} has shape {place.shape}; config.json asks for {tensor.shape}.'
    return problems.add(line, 'shape')
  if place.dtype not in (*DTYPES, PACKED) or (place.dtype == 'F8_E4M3' and not array.quantizable):
    line = f'{tensor.name} has dtype {place.dtype}, which does not belong there.'
    return problems.add(line, 'dtype')
  if place.dtype != 'F8_E4M3':
    return
  name, shape = tensor.name + SCALE, fp8.scale_shape(tensor.shape)
  known.add(name)
  if name not in places:
    problems.add(f'{name} is missing: {tensor.name} is FP8.', 'scale')
  elif places[name].shape != shape:
    actual = f'{places[name].dtype} {places[name].shape}'
    problems.add(
        f'{name} is {actual}; it must be F32 {shape}, a scale for each 128 x 128 block.', 'scale'
    )
  elif places[name].dtype not in SCALE_DTYPES:
    scales.setdefault(places[name].dtype, []).append(name)


def _same(a: Place, b: Place) -> bool:
  step = 2**26
  read = lambda place, at: np.fromfile(
      place.path, np.uint8, min(step, place.nbytes - at), offset=place.offset + at
  )
  return all(np.array_equal(read(a, at), read(b, at)) for at in range(0, a.nbytes, step))


def import_checkpoint(
    source: Source,
    target: pathlib.Path,
    *,
    dtype: str = 'bfloat16',
    seed: int = 0,
    advance: Advance,
) -> Summary:
  """Writes a released checkpoint as one of ours; `target` appears when it is whole.

  A small array is assembled in memory; of a large one, memory holds two released tensors at a time.

  Args:
    source: The checkpoint, from `open_source`.
    target: A folder that does not exist yet.
    dtype: The dtype of weights that were FP8, or quantised in a GGUF file; all others keep their
      own. 'fp8' keeps the codes of those that were FP8, beside their scales.
    seed: The seed of fresh indexers, where the checkpoint has none.
    advance: A function that is called with the number of bytes that have just been read.

  Raises:
    ConfigError: `target` exists or has a name that could not be read from, the seed is out of range,
      or there are no codes to keep.
    OSError: `target` cannot be written, or the disk is full. Nothing is left there.
  """
  check_readable(target, 'TARGET')
  check_seed(seed)
  if dtype == 'fp8' and not any(source.dtype(path) == 'F8_E4M3' for path in source.arrays):
    raise ConfigError(f'{source.folder} has no weights in FP8: dtype must be bfloat16 or float32.')
  params = {
      path: _streamed(source, path, DTYPES_OF[dtype], advance) for path in source.arrays
  }
  for path, shape in weight_shapes(source.model).items():
    if path not in params:
      params[path] = _fresh(source.model, path, shape, seed)
  quantized = [path for path in source.arrays if source.dtype(path) == 'F8_E4M3']
  with building(target, needs=_disk_bytes(source, params)) as partial:
    items = {'state': {('params', *path): array for path, array in params.items()}}
    if quantized:
      items['scales'] = {path: _streamed_scales(source, path, advance) for path in quantized}
    write_step(partial / '0', items)
    copy_kept(source.folder, partial)
    for name, text in source.made.items():
      (partial / name).write_text(text, encoding='utf-8')
    origin = {
        'family': source.family,
        'config': source.config,
        'repeats_embedding': bool(source.copies),
        'dtypes': {'/'.join(path): _exported_dtype(source, path, dtype) for path in source.arrays},
        'scales': {'/'.join(path): _scale_dtype(source, path) for path in quantized},
        'files': kept_names(partial),
    }
    record = {'model': dataclasses.asdict(source.model), 'source': origin}
    (partial / 'config.json').write_text(json.dumps(record, indent=2))
  return Summary(
      source.family, source.model.n_layers,
      n_parameters=sum(array.size for array in params.values()),
      nbytes=sum(array.nbytes for array in params.values()),
      n_fresh=sum(array.size for path, array in params.items() if path not in source.arrays),
  )  # fmt: skip


def _disk_bytes(source: Source, params: dict[Path, Streamed]) -> int:
  """Returns about how many bytes are written, after the compression of what FP8 was widened to."""

  def share(path: Path) -> float:
    was_fp8 = path in source.arrays and source.dtype(path) == 'F8_E4M3'
    return WIDENED if was_fp8 and params[path].dtype.itemsize > 1 else 1.0

  return int(sum(share(path) * array.nbytes for path, array in params.items()))


WIDENED = 0.75  # Of the bytes of what FP8 was widened to, this share is left by orbax' compression (measured: 0.72).
DTYPES_OF = {
    'bfloat16': np.dtype(ml_dtypes.bfloat16), 'float32': np.dtype(np.float32),
    'fp8': np.dtype(ml_dtypes.float8_e4m3fn),
}  # fmt: skip


def _scale_dtype(source: Source, path: Path) -> str:
  return source.places[source.arrays[path].tensors[0].name + SCALE].dtype


def _exported_dtype(source: Source, path: Path, dtype: str) -> str:
  """Returns the dtype that an export gives an array's tensors back in."""
  code = source.dtype(path)
  return CODES[DTYPES_OF[dtype]] if code == PACKED else code


def _streamed(source: Source, path: Path, wide: np.dtype, advance: Advance) -> Streamed:
  array, code = source.arrays[path], source.dtype(path)
  dtype = wide if code in ('F8_E4M3', PACKED) else DTYPES[code]
  keeps_codes = wide == DTYPES_OF['fp8'] and code == 'F8_E4M3'
  if keeps_codes and equation_of(source.model, source.family, path) != array.tensors[0].equation:
    keeps_codes, dtype = False, DTYPES_OF['bfloat16']  # Blocks of a joined tensor need not end here.

  def pieces() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    for tensor in array.tensors:
      x = source.places[tensor.name].read()
      if code == 'F8_E4M3' and not keeps_codes:
        x = fp8.dequantize(x, source.places[tensor.name + SCALE].read().astype(np.float32), dtype)
      yield tensor.index, tensor.to_ours(x).astype(dtype, copy=False)
      advance(source.places[tensor.name].nbytes // tensor.n_parts)

  return Streamed(array.shape, dtype, array.n_leading, pieces)


def _streamed_scales(source: Source, path: Path, advance: Advance) -> Streamed:
  """Returns the scales of an array, in float32, so that an export gives the same bytes."""
  array = source.arrays[path]
  shape = fp8.scale_shape(array.tensors[0].shape)

  def pieces():
    for tensor in array.tensors:
      place = source.places[tensor.name + SCALE]
      yield tensor.index, place.read().astype(np.float32, copy=False)
      advance(place.nbytes)

  leading = array.shape[: array.n_leading]
  return Streamed((*leading, *shape), np.dtype(np.float32), array.n_leading, pieces)


def _fresh(cfg: ModelConfig, path: Path, shape: tuple[int, ...], seed: int) -> Streamed:
  """Returns a stack of untrained indexer weights, as the model itself would make them."""
  within = path[path.index('indexer') + 1 :]
  n_leading = 0 if path[0] == 'mtp' else 1
  key_of_stack = jax.random.fold_in(jax.random.key(seed), STACKS.index(path[0]))

  def pieces():
    for index in np.ndindex(shape[:n_leading]):
      key = jax.random.fold_in(key_of_stack, sum(index))  # One key for a layer.
      weights = nnx.as_pure(nnx.state(LightningIndexer(cfg, rngs=nnx.Rngs(key))))
      for name in within:
        weights = weights[name]
      yield index, np.asarray(weights)

  return Streamed(shape, np.dtype(np.float32), n_leading, pieces)
