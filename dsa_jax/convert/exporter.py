# SPDX-License-Identifier: Apache-2.0
"""Exports one of our checkpoints as a folder that the loaders of its family read."""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.convert import fp8, quantization
from dsa_jax.convert.building import Summary, building, copy_kept
from dsa_jax.convert.config_json import read_config, write_config
from dsa_jax.convert.files import CODES, DTYPES, SINGLE, write_file, write_index
from dsa_jax.convert.importer import SCALE, Advance
from dsa_jax.convert.problems import first_ten
from dsa_jax.convert.tensors import Array, Path, Tensor, arrays_of, copies_of
from dsa_jax.data.corpora.sources import RAW
from dsa_jax.data.text import BOS, VOCAB_SIZE
from dsa_jax.data.tokenizer import Bytes
from dsa_jax.data.tokenizer_files import find_tokenizer
from dsa_jax.families import FAMILIES
from dsa_jax.inference.load import StoredModel, find_checkpoint
from dsa_jax.training.checkpoint import latest_checkpoint, reading
from dsa_jax.training.origin import differing_fields
from dsa_jax.training.stored_arrays import StoredArray, open_tree


class Checkpoint(NamedTuple):
  """One of our checkpoints, opened."""

  step: pathlib.Path  # The folder that holds its arrays.
  family: str
  model: ModelConfig
  has_indexer: bool  # Whether the export will have indexers.
  # What the import recorded of the source, for a training run too that began there; otherwise {}.
  origin: dict[str, Any]
  arrays: dict[Path, Array]
  stores: dict[Path, StoredArray]
  scales: dict[Path, StoredArray]  # The scales of weights that were imported from FP8.
  kept: pathlib.Path = pathlib.Path()  # The folder that holds the source's tokenizer.
  # The ids that begin and end a text, where there is no source.
  ids: Mapping[str, int | list[int] | None] = {}

  @property
  def was_fp8(self) -> bool:
    return 'F8_E4M3' in self.origin.get('dtypes', {}).values()


class Out(NamedTuple):
  """A tensor to write."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  path: Path
  tensor: Tensor
  others: tuple[tuple[Path, Tensor], ...] = ()  # The parts behind the first, and their arrays.

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  @property
  def is_quantized(self) -> bool:
    return CODES[self.dtype] == 'F8_E4M3'


def open_checkpoint(folder: pathlib.Path, family: str = '') -> Checkpoint:
  """Opens a converted checkpoint, or RUN/checkpoints/ENTRY.

  Args:
    folder: The checkpoint.
    family: The family to export as. '' stands for the one it was imported as. A training run that
      did not begin with an import, or has trained indexers that the import's family cannot have,
      becomes one of the first family that can hold it.

  Raises:
    ConfigError: The folder is no checkpoint, or the family cannot hold it.
  """
  stored = find_checkpoint(folder)
  model, origin = ModelConfig(**stored.record['model']), stored.source
  family = _choose_family(family or _imported_family(stored), model, stored)
  has_indexer = _has_indexer(family, stored.has_trained_indexer)
  if has_indexer and not FAMILIES[family].has_indexer:  # So that its reader may ask for another factor.
    model = dataclasses.replace(model, index_original_seq_len=stored.index_seq_len)
  step = latest_checkpoint(stored.step or stored.folder)
  with reading(step):
    flat = open_tree(step / 'state')
    scales = open_tree(step / 'scales') if (step / 'scales').is_dir() else {}
  stores = {path[1:]: store for path, store in flat.items() if path[0] == 'params'}
  arrays = arrays_of(model, family, has_indexer=has_indexer)
  wrong = [
      '.'.join(path)
      for path, array in arrays.items()
      if path not in stores or stores[path].shape != array.shape
  ]
  if wrong:
    lines = '\n  '.join(first_ten(wrong))
    raise ConfigError(f'{folder} lacks, or has in another shape:\n  {lines}')
  for path in arrays:
    if stores[path].has_codes and path not in scales:
      raise ConfigError(f'{folder} lacks the scales of {".".join(path)}: the copy is not whole.')
  ids = {} if origin else _ids_of_data(stored, model.vocab_size)
  return Checkpoint(
      step, family, model, has_indexer, origin, arrays, stores, scales, stored.origin, ids
  )


def _imported_family(stored: StoredModel) -> str:
  """Returns the family of the import, or '' if it cannot hold what has been trained since."""
  family = stored.source.get('family', '')
  lacks_indexer = family in FAMILIES and not _has_indexer(family, True)
  return '' if lacks_indexer and stored.has_trained_indexer else family


def _ids_of_data(stored: StoredModel, vocab_size: int) -> dict[str, int | list[int] | None]:
  """Returns the ids that begin and end a text of a run's data, null where they are not known.

  Loaders would take ids of their own for keys that are absent.
  """
  data, tokenizer = stored.record.get('data', {}), find_tokenizer(stored.origin)
  source = data.get('source', 'text')
  reads_bytes = source == 'text'
  if source == 'mixture' and data.get('tokenizer', '') in ('', 'bytes'):
    reads_bytes = any(fields.get('format') in RAW for fields in data.get('sources', {}).values())
  if isinstance(tokenizer, Bytes) and (not reads_bytes or vocab_size < VOCAB_SIZE):
    return {'bos_token_id': None, 'eos_token_id': None}
  bos = BOS if isinstance(tokenizer, Bytes) else tokenizer.bos
  ends = list(tokenizer.stop)
  return {'bos_token_id': bos, 'eos_token_id': ends if len(ends) > 1 else next(iter(ends), None)}


def _choose_family(family: str, model: ModelConfig, stored: StoredModel) -> str:
  """Returns the given family, or the first one that can hold a model.

  A family without indexers is chosen for a model whose indexers are not trained only.

  Raises:
    ConfigError: There is no such family, or it cannot hold the model.
  """
  if family and family not in FAMILIES:
    raise ConfigError(f'{family=} must be one of {tuple(FAMILIES)}.')
  if family and not (lost := _lost_fields(family, model, stored)):
    return family
  trained = stored.has_trained_indexer
  names = [name for name in FAMILIES if _has_indexer(name, trained) or not trained]
  fit = [name for name in names if not _lost_fields(name, model, stored)]
  if not family and fit:
    return fit[0]
  if not family:
    raise ConfigError(f'none of {tuple(FAMILIES)} can hold {model}.')
  right = f'export as {" or ".join(map(repr, fit))}' if fit else 'no other family can either'
  raise ConfigError(f'{family=} cannot hold this model ({", ".join(lost)}): {right}.')


def _has_indexer(family: str, trained: bool) -> bool:
  """Returns whether an export to a family has indexers."""
  return FAMILIES[family].has_indexer or (FAMILIES[family].may_have_indexer and trained)


def _lost_fields(family: str, model: ModelConfig, stored: StoredModel) -> list[str]:
  """Returns the fields of a model that its config.json in a family would not give back."""
  traits, has_indexer = FAMILIES[family], _has_indexer(family, stored.has_trained_indexer)
  base = stored.source.get('config', {}) if stored.source.get('family') == family else {}
  try:
    back = read_config(write_config(family, model, base, has_indexer=has_indexer))[1]
  except ConfigError as error:  # What an earlier version imported may be refused today.
    return [] if base else [' '.join(str(error).split())]
  # Other loaders go by the family, whatever config.json says, unless they are known to disagree.
  if traits.has_indexer and not traits.disputes_rotation:
    back = dataclasses.replace(back, indexer_rope_interleave=traits.indexer_rope_interleave)
  lost = differing_fields(back, model) + ['rope_type'] * (back.rope_kind != model.rope_kind)
  return [name for name in lost if has_indexer or not name.startswith('index')]


def export_checkpoint(
    source: Checkpoint,
    target: pathlib.Path,
    *,
    quantized: bool | None = None,
    shard_bytes: int = 4 * 2**30,
    advance: Advance = lambda _: None,
) -> Summary:
  """Writes config.json, safetensors files and their index; `target` appears when it is whole.

  Tensors have the dtypes they were imported in, those of a training run that began with an import
  too. All others are bfloat16, except norms and biases, which have the dtypes that the family gives
  them. Memory holds one file at a time.

  Args:
    source: The checkpoint, from `open_checkpoint`.
    target: A folder that does not exist yet.
    quantized: Whether to write the large matrices in FP8; None means each as it was imported. The
      scales of an import are used again, so that its bytes come back; other scales are powers of
      two.
    shard_bytes: The largest size of a file that holds several tensors.
    advance: A function that is called with the number of bytes that have just been written.

  Raises:
    ConfigError: `target` exists.
    DamagedCheckpoint: An array is not what was saved. Nothing is left at `target`.
    OSError: `target` cannot be written, or the disk is full. Nothing is left there.
  """
  outs = list(_outs(source, quantized))
  files = _into_files(outs, shard_bytes)
  nbytes = sum(out.nbytes for out in outs)
  with building(target, needs=nbytes) as partial:
    for file, members in files.items():
      write_file(partial / file, {out.name: _read(source, out) for out in members})
      advance(sum(out.nbytes for out in members))
    if len(files) > 1:
      names = {out.name: file for file, members in files.items() for out in members}
      write_index(partial, names, nbytes)
    copy_kept(source.kept, partial)
    config = _config(source, outs)
    (partial / 'config.json').write_text(json.dumps(config, indent=2, sort_keys=True))
  weights = [out for out in outs if not out.name.endswith(SCALE)]
  return Summary(
      family=source.family,
      n_layers=source.model.n_layers,
      n_parameters=sum(math.prod(out.shape) for out in weights),
      nbytes=nbytes,
  )


def _config(source: Checkpoint, outs: list[Out]) -> dict[str, Any]:
  """Returns the config.json that fits the tensors."""
  base = source.origin.get('config') or dict(source.ids)
  config = write_config(source.family, source.model, base, has_indexer=source.has_indexer)
  if source.family != source.origin.get('family') or not _has_code(source, config):
    config.pop('auto_map', None)  # It names the classes of a model by files of code.
  before = config.pop('compression_config', None)  # Another name of the same section.
  before = config.pop('quantization_config', before)
  modules: dict[bool, list[str]] = {True: [], False: []}
  for out in outs:
    if source.arrays[out.path].quantizable and not out.name.endswith(SCALE):
      modules[out.is_quantized].append(out.name.removesuffix('.weight'))
  if modules[True]:
    modules[False] += FAMILIES[source.family].tensors.never_quantized
    config['quantization_config'] = quantization.describe(before, modules[True], modules[False])
  return config


def _has_code(source: Checkpoint, config: dict[str, Any]) -> bool:
  """Returns whether all files of code that a config.json names were kept."""
  classes = config.get('auto_map') or {}
  names = {str(name).partition('.')[0] + '.py' for name in classes.values()}
  return all((source.kept / name).is_file() for name in names)


def export_bytes(source: Checkpoint, quantized: bool | None = None) -> int:
  """Returns the number of bytes that `export_checkpoint` will write."""
  return sum(out.nbytes for out in _outs(source, quantized))


def _outs(source: Checkpoint, quantized: bool | None) -> Iterator[Out]:
  """Yields every tensor to write, layer after layer."""
  usual = FAMILIES[source.family].repeats_embedding
  copies = {}
  if source.origin.get('repeats_embedding', usual):
    names = copies_of(source.model, source.family)
    copies = {original: name for name, original in names.items()}
  outs, parts = [], dict[str, list[tuple[Path, Tensor]]]()
  for path, array in source.arrays.items():
    for tensor in array.tensors:
      if tensor.part:
        parts.setdefault(tensor.name, []).append((path, tensor))
  for path, array in source.arrays.items():
    dtype = DTYPES[_code(source, path, array, quantized)]
    for tensor in array.tensors:
      if tensor.part:
        continue
      others = tuple(parts.get(tensor.name, ()))
      outs.append(Out(tensor.name, dtype, tensor.shape, path, tensor, others))
      if copy := copies.get(tensor.name):
        outs.append(Out(copy, dtype, tensor.shape, path, tensor))
      if CODES[dtype] == 'F8_E4M3':
        shape = fp8.scale_shape(tensor.shape)
        code = source.origin.get('scales', {}).get('/'.join(path), 'F32')
        scaled = DTYPES[code if path in source.scales else 'F32']
        outs.append(Out(tensor.name + SCALE, scaled, shape, path, tensor))
  prefix = FAMILIES[source.family].tensors.layers
  number = lambda out: int(out.name.removeprefix(prefix).split('.')[0])
  layer = lambda out: number(out) if out.name.startswith(prefix) else -1
  return iter(sorted(outs, key=layer))


def _code(source: Checkpoint, path: Path, array: Array, quantized: bool | None) -> str:
  """Returns the dtype of an array's tensors, by its name in safetensors files.

  What an import has not recorded, such as indexers that training added, is as narrow as the model computes.
  """
  recorded = source.origin.get('dtypes', {}).get('/'.join(path))
  if quantized is None:
    quantized = recorded == 'F8_E4M3' or (recorded is None and source.was_fp8)
  if array.quantizable and quantized:
    return 'F8_E4M3'
  if recorded not in (None, 'F8_E4M3'):
    return recorded
  is_matrix = len(array.tensors[0].shape) > 1
  if source.model.dtype == 'float32':
    return 'F32'
  if is_matrix:
    return 'BF16'
  return 'F32' if path[-1:] == ('bias',) and 'ffn' in path else FAMILIES[source.family].norms


def _into_files(outs: list[Out], shard_bytes: int) -> dict[str, list[Out]]:
  """Distributes tensors over files, so that a tensor and its scales stay together."""
  shards: list[list[Out]] = [[]]
  filled = 0
  for out in outs:
    if shards[-1] and filled + out.nbytes > shard_bytes and not out.name.endswith(SCALE):
      shards.append([])
      filled = 0
    shards[-1].append(out)
    filled += out.nbytes
  if len(shards) == 1:
    return {SINGLE: shards[0]}
  total = len(shards)
  return {f'model-{i:05}-of-{total:05}.safetensors': s for i, s in enumerate(shards, start=1)}


def _piece(source: Checkpoint, stored: StoredArray, index: tuple[int, ...]) -> np.ndarray:
  with reading(source.step):
    return stored.piece(index).read().result()


def _read(source: Checkpoint, out: Out) -> np.ndarray:
  """Returns a tensor to write, or the scales of one."""
  index = out.tensor.index
  is_scale, kept_codes = out.name.endswith(SCALE), source.stores[out.path].has_codes
  if (is_scale or out.is_quantized or kept_codes) and out.path in source.scales:
    scale = _piece(source, source.scales[out.path], index)
    if is_scale:
      return scale.astype(out.dtype, copy=False)
  read = lambda path, tensor: tensor.to_theirs(_piece(source, source.stores[path], tensor.index))
  weight = read(out.path, out.tensor)
  if out.others:
    weight = np.concatenate([weight, *(read(*other) for other in out.others)], axis=-2)
  if kept_codes:
    return weight if out.is_quantized else fp8.dequantize(weight, scale, out.dtype)
  if not is_scale and not out.is_quantized:
    return np.ascontiguousarray(weight.astype(out.dtype, copy=False))
  if out.path not in source.scales:
    scale = fp8.block_scales(weight)
  return scale if is_scale else fp8.quantize(weight, scale)
