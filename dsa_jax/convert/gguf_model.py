# SPDX-License-Identifier: Apache-2.0
"""Reads a GGUF file as the checkpoint that it was made of: a config.json, tensors, a tokenizer.

Source:
  ggml-org/llama.cpp, commit 0274f0fc: conversion/llama.py for the order of rotated channels and the
  factors of rotary frequencies; gguf 0.19.0 for the names of keys and tensors.
"""

import functools
import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.convert.config_json import read_config
from dsa_jax.convert.files import DTYPES, PACKED, Place
from dsa_jax.convert.gguf_file import Header, Stored, library, read_header
from dsa_jax.convert.gguf_tokenizer import read_tokenizer
from dsa_jax.convert.problems import first_ten
from dsa_jax.convert.rope_json import is_number
from dsa_jax.nn.rope import rope_frequencies

MODEL_TYPES = {'llama': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3', 'qwen3moe': 'qwen3_moe'}
PERMUTED = ('llama',)  # The architectures whose queries and keys lie in pairs that are rotated.
FLOATS = ('F32', 'F16', 'BF16')
QUANTIZED = (
    'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K',
)  # fmt: skip
NAME = re.compile(r'(?:blk\.(\d+)\.)?(.*?)(?:\.(\w+))?', re.DOTALL)
SPLIT = re.compile(r'-\d{5}-of-\d{5}\.gguf$')

REQUIRED = {  # Keys without their architecture, and the keys of config.json.
    'context_length': 'max_position_embeddings',
    'embedding_length': 'hidden_size',
    'block_count': 'num_hidden_layers',
    'feed_forward_length': 'intermediate_size',
    'attention.head_count': 'num_attention_heads',
    'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
}
OPTIONAL = {
    'attention.head_count_kv': 'num_key_value_heads',
    'attention.key_length': 'head_dim',
    'rope.freq_base': 'rope_theta',
}
EXPERTS = {
    'expert_count': 'num_experts',
    'expert_used_count': 'num_experts_per_tok',
    'expert_feed_forward_length': 'moe_intermediate_size',
}
HARMLESS = ('tensor_data_layout', 'rope.scaling.finetuned')
ROPES = {  # The keys of each kind of scaling, after `rope.scaling.`.
    'none': {},
    'linear': {'factor': 'factor'},
    'yarn': {
        'factor': 'factor',
        'original_context_length': 'original_max_position_embeddings',
        'yarn_beta_fast': 'beta_fast',
        'yarn_beta_slow': 'beta_slow',
        'yarn_ext_factor': 'extrapolation_factor',
        'yarn_attn_factor': 'yarn_attn_factor',
        'attn_factor': 'attn_factor',
    },
}
LLAMA3 = {  # What Llama 3.1 to 3.3 make their factors of rotary frequencies of, beside the largest.
    'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192,
}  # fmt: skip
FREQUENCIES = 'rope_freqs.weight'
CHUNK = 2**22  # So many elements are dequantised at once, because the library needs twice the room.

TOP = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
LAYER = {
    'attn_norm': 'input_layernorm',
    'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj',
    'attn_q_norm': 'self_attn.q_norm',
    'attn_k_norm': 'self_attn.k_norm',
    'ffn_norm': 'post_attention_layernorm',
    'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj',
    'ffn_gate_inp': 'mlp.gate',
}
STACKED = {  # Tensors that hold all experts of a layer.
    'ffn_gate_exps': 'mlp.experts.{}.gate_proj',
    'ffn_up_exps': 'mlp.experts.{}.up_proj',
    'ffn_down_exps': 'mlp.experts.{}.down_proj',
}


class Opened(NamedTuple):
  """A GGUF file as a checkpoint."""

  config: dict[str, Any]  # The config.json of the same model.
  places: dict[str, Place]  # The tensors, by the names that they have in safetensors files.
  made: dict[str, str]  # The files of the tokenizer, by their names.


def open_gguf(path: pathlib.Path) -> Opened:
  """Reads the header of a GGUF file.

  Raises:
    ConfigError: The file is damaged or one of several, or of an architecture, a type of tensors or
      a tokenizer that is unknown here; the message names every reason.
  """
  header = read_header(path)
  count = header.fields.get('split.count', 1)
  if SPLIT.search(path.name) or count not in (0, 1):
    raise ConfigError(
        f'{path} is one of several files of a model: merge them first, by `llama-gguf-split '
        '--merge FIRST MERGED`.'
    )
  arch = header.fields.get('general.architecture')
  if arch not in MODEL_TYPES:
    choices = ', '.join(MODEL_TYPES)
    raise ConfigError(f'{path}: general.architecture={arch!r} must be one of {choices}.')
  problems = list[str]()
  config = _read_config(header, arch, problems)
  for name, stored in header.tensors.items():
    if stored.kind not in FLOATS + QUANTIZED:
      choices = ', '.join(FLOATS + QUANTIZED)
      problems.append(f'{name} is {stored.kind}; it must be one of {choices}.')
  made, ids = read_tokenizer(header.fields, config['vocab_size'], problems)
  if problems:
    raise ConfigError(f'{path} cannot be converted:\n  ' + '\n  '.join(first_ten(problems)))
  try:
    config |= ids
    read_config(config)
    if arch in PERMUTED:
      config |= _read_frequencies(path, header, config)
  except ConfigError as error:
    raise ConfigError(f'{path} implies a config.json that is refused: {error}') from error
  return Opened(config, _places(path, header, config, permuted=arch in PERMUTED), made)


def _read_config(header: Header, arch: str, problems: list[str]) -> dict[str, Any]:
  """Returns the config.json of a model; every key is read, harmless, or a problem."""
  prefix = f'{arch}.'
  fields = {k.removeprefix(prefix): v for k, v in header.fields.items() if k.startswith(prefix)}
  experts = EXPERTS if arch == 'qwen3moe' else {}
  config: dict[str, Any] = {'model_type': MODEL_TYPES[arch], 'rope_theta': 10_000.0}
  missing = [key for key in REQUIRED | experts if key not in fields]
  problems += [f'{prefix}{key} is missing.' for key in missing]
  for key, ours in (REQUIRED | OPTIONAL | experts).items():
    if key in fields:
      config[ours] = fields.pop(key)
  if header.fields.get('general.type', 'model') != 'model':
    problems.append(f"general.type={header.fields['general.type']!r} must be 'model'.")
  embedding = header.tensors.get('token_embd.weight')
  config['vocab_size'] = embedding.shape[0] if embedding else fields.get('vocab_size', 0)
  config['tie_word_embeddings'] = 'output.weight' not in header.tensors
  kinds = {stored.kind for stored in header.tensors.values() if len(stored.shape) > 1}
  dtypes = {'F32': 'float32', 'F16': 'float16'}
  config['torch_dtype'] = dtypes.get(kinds.pop(), 'bfloat16') if len(kinds) == 1 else 'bfloat16'
  config |= _read_scaling(fields, prefix, problems)
  counts = {'block_count': _depth(header)}
  if experts:
    stacks = [stored for name, stored in header.tensors.items() if 'ffn_gate_exps.' in name]
    counts['expert_count'] = stacks[0].shape[0] if stacks else 0
  for key, count in counts.items():  # A wrong one would fill the memory with missing tensors.
    if config.get((REQUIRED | experts)[key], count) != count:
      problems.append(f'{prefix}{key} must be {count}, by the names and shapes of the tensors.')
  if experts:
    config |= {'norm_topk_prob': True, 'decoder_sparse_step': 1, 'mlp_only_layers': []}
  _check_others(fields, config, prefix, problems)
  return config


def _depth(header: Header) -> int:
  layers = [NAME.fullmatch(name)[1] for name in header.tensors]
  return 1 + max((int(layer) for layer in layers if layer), default=-1)


def _read_scaling(fields: dict[str, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
  """Takes the keys of the scaling of rotary positions out of the fields."""
  kind = fields.pop('rope.scaling.type', 'none')
  if kind not in ROPES:
    problems.append(f'{prefix}rope.scaling.type={kind!r} must be one of {tuple(ROPES)}.')
    return {}
  keys = {f'rope.scaling.{key}': ours for key, ours in ROPES[kind].items()}
  section = {ours: fields.pop(key) for key, ours in keys.items() if key in fields}
  if kind == 'yarn' and is_number(section.get('factor')) and section['factor'] >= 1:
    _read_attention_factor(section, prefix, problems)
  return {} if kind == 'none' else {'rope_scaling': {'rope_type': kind, **section}}


def _read_attention_factor(section: dict[str, Any], prefix: str, problems: list[str]):
  """Puts what YaRN multiplies cosines and sines by into a section, as `attention_factor`.

  llama.cpp multiplies the usual factor by `attn_factor`. In these families it does not read
  `yarn_attn_factor`, into which its converter writes the whole factor, or nothing but 1.
  """
  usual = 0.1 * math.log(section['factor']) + 1
  times, whole = section.pop('attn_factor', 1), section.pop('yarn_attn_factor', 1)
  if not is_number(times) or not times > 0:
    problems.append(f'{prefix}rope.scaling.attn_factor={times!r} must be a number above 0.')
    return
  if not is_number(whole) or not any(math.isclose(whole, x, rel_tol=1e-6) for x in (1, usual)):
    problems.append(
        f'{prefix}rope.scaling.yarn_attn_factor={whole!r} must be 1 or {usual:.6g}: loaders read others in two '
        'ways.'
    )
  section['attention_factor'] = times * usual


def _check_others(
    fields: dict[str, Any], config: dict[str, Any], prefix: str, problems: list[str]
):
  """Notes every field that is not at the value which others imply, or is unknown."""
  dim, heads = config.get('hidden_size'), config.get('num_attention_heads')
  is_plain = isinstance(dim, int) and isinstance(heads, int) and heads > 0
  width = config.get('head_dim', dim // heads if is_plain else None)
  implied = {
      'vocab_size': config['vocab_size'],
      'rope.dimension_count': width,
      'attention.value_length': width,
      'attention.causal': True,
      'expert_weights_norm': True,
      'expert_gating_func': 1,  # Softmax.
      'expert_shared_feed_forward_length': 0,
      'expert_shared_count': 0,
  }
  for key, value in fields.items():
    if key in HARMLESS:
      continue
    if key not in implied:
      problems.append(f'{prefix}{key}={value!r} is unknown here and may change the model.')
    elif value != implied[key]:
      problems.append(f'{prefix}{key}={value!r} must be {implied[key]!r}.')


def _read_frequencies(
    path: pathlib.Path, header: Header, config: dict[str, Any]
) -> dict[str, Any]:
  """Returns the scaling that gives the file's factors of rotary frequencies."""
  stored = header.tensors.get(FREQUENCIES)
  if stored is None:
    return {}
  if stored.kind != 'F32':
    raise ConfigError(f'{FREQUENCIES} is {stored.kind} and must be F32.')
  factors = _place(path, stored).read().ravel()
  if (factors == 1).all():
    return {}
  llama3 = {'rope_scaling': {'rope_type': 'llama3', 'factor': float(factors.max()), **LLAMA3}}
  width = 2 * len(factors)
  plain = read_config(config)[1]
  scaled = read_config({**config, **llama3})[1]
  wanted = rope_frequencies(plain, width) / rope_frequencies(scaled, width)
  if 'rope_scaling' in config or width != plain.head_dim or not np.allclose(factors, wanted, 1e-4):
    raise ConfigError(f'{FREQUENCIES} must hold the factors of Llama 3.1, which come of {LLAMA3}.')
  return llama3


def _places(
    path: pathlib.Path, header: Header, config: dict[str, Any], *, permuted: bool
) -> dict[str, Place]:
  """Returns the places of all tensors; those of experts are parts of larger ones."""
  kinds: dict[str, set[str]] = {}
  for name, stored in header.tensors.items():
    kinds.setdefault(_in_any_layer(name), set()).add(stored.kind)
  n_heads = config['num_attention_heads']
  heads = {'attn_q': n_heads, 'attn_k': config.get('num_key_value_heads', n_heads)}
  places = {}
  for name, stored in header.tensors.items():
    if name == FREQUENCIES and permuted:
      continue
    is_packed = len(kinds[_in_any_layer(name)]) > 1 or stored.kind in QUANTIZED
    layer, module, suffix = NAME.fullmatch(name).groups()
    place = functools.partial(
        _place, path, packed=is_packed, heads=heads.get(module, 0) if permuted else 0
    )
    prefix = f'model.layers.{layer}.' if layer else ''
    names = LAYER if layer else TOP
    if layer and module in STACKED and len(stored.shape) == 3:
      for i in range(stored.shape[0]):
        places[f'{prefix}{STACKED[module].format(i)}.{suffix}'] = place(_part(stored, i))
    elif module in names:
      places[f'{prefix}{names[module]}.{suffix}'] = place(stored)
    else:
      places[name] = place(stored)  # Which will be found to be in no place of the model.
  return places


def _in_any_layer(name: str) -> str:
  return re.sub(r'^blk\.\d+', 'blk', name)


def _part(stored: Stored, i: int) -> Stored:
  """Returns one of the tensors that lie along the first axis."""
  nbytes = stored.nbytes // stored.shape[0]
  return Stored(stored.kind, stored.shape[1:], stored.offset + i * nbytes, nbytes)


def _place(path: pathlib.Path, stored: Stored, *, packed: bool = False, heads: int = 0) -> Place:
  """Returns the place of a tensor, which is read as float32 where it is packed.

  Args:
    path: The file.
    stored: The tensor.
    packed: Whether it is quantised, or of another type than the same one of other layers.
    heads: So many heads have their channels in pairs that are rotated; 0 if none have.
  """
  unpack = None
  if packed or heads:
    unpack = functools.partial(
        _unpack, kind=stored.kind, shape=stored.shape, packed=packed, heads=heads
    )
  dtype = PACKED if packed else stored.kind
  return Place(path, dtype, stored.shape, stored.offset, stored.nbytes, unpack)


def _unpack(
    raw: np.ndarray, *, kind: str, shape: tuple[int, ...], packed: bool, heads: int
) -> np.ndarray:
  """Returns a tensor whose heads have their channels in halves, from its bytes."""
  if kind in FLOATS:
    x = raw.view(DTYPES[kind]).reshape(shape)
    x = x.astype(np.float32) if packed else x
  else:
    gguf = library()
    x, rows = np.empty(shape, np.float32), raw.reshape(shape[0], -1)
    step = max(1, CHUNK * shape[0] // x.size)
    for i in range(0, shape[0], step):
      x[i : i + step] = gguf.dequantize(rows[i : i + step], gguf.GGMLQuantizationType[kind])
  if not heads:
    return x
  pairs = x.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
  return pairs.swapaxes(1, 2).reshape(shape)
