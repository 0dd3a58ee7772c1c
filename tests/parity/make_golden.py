# SPDX-License-Identifier: Apache-2.0
"""Golden numbers from Hugging Face transformers, on tiny random checkpoints in released layouts.

  python tests/parity/make_golden.py                  # Writes every case beside this file.
  python tests/parity/make_golden.py --only glm_moe_dsa
  python tests/parity/make_golden.py --check          # Makes all anew by their seeds, and compares.
  python tests/parity/make_golden.py --load FOLDER --tokens golden.npz --out live.npz

Needs torch and transformers (versions in README.md), neither jax nor dsa_jax. The last form reads
any checkpoint folder, refuses one that transformers would fill up or read in part, and writes the
arrays of a golden.npz for those tokens.
"""

import argparse
import itertools
import json
import pathlib
import shutil
import tempfile

from dense_cases import DENSE_CASES
import numpy as np
import torch
from torch.overrides import TorchFunctionMode
import transformers

HERE = pathlib.Path(__file__).parent
MARGIN = 2e-4  # Least distance of any selection's cut, relative to its row's largest |score|.
N_STEPS = 12  # Tokens decoded one by one.
CHUNKS = (40, 30)  # Lengths of two cached prefills; a third takes the rest.

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    scoring_func='sigmoid',
    topk_method='noaux_tc',
    routed_scaling_factor=2.5,
    moe_layer_freq=1,
    hidden_act='silu',
    attention_bias=False,
    attention_dropout=0.0,
    tie_word_embeddings=False,
    initializer_range=0.02,
    bos_token_id=0,
    eos_token_id=1,
    ep_size=1,
    num_nextn_predict_layers=0,
    use_cache=True,
)
INDEXER = dict(index_topk=8, index_n_heads=8, index_head_dim=16)
DEEPSEEK = SIZES | dict(
    num_hidden_layers=3,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    rms_norm_eps=1e-6,
    max_position_embeddings=2560,
    rope_theta=10000,
    # With base 10000 and 8 channels: one frequency kept, one half-way, two divided by 40.
    rope_scaling=dict(
        type='yarn',
        factor=40,
        original_max_position_embeddings=64,
        beta_fast=32,
        beta_slow=1,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    torch_dtype='float32',
)
GLM = SIZES | INDEXER | dict(
    architectures=['GlmMoeDsaForCausalLM'],
    model_type='glm_moe_dsa',
    qk_head_dim=20,
    v_head_dim=16,
    n_group=1,
    topk_group=1,
    rms_norm_eps=1e-6,  # Not the released 1e-5: see 'latent_eps' in deviations.py.
    max_position_embeddings=4096,
    indexer_rope_interleave=True,
    rope_interleave=True,
    dtype='float32',
)

AXK2 = SIZES | dict(
    architectures=['AXK2ForCausalLM'],
    model_type='axk2',
    num_hidden_layers=3,
    first_k_dense_replace=1,
    gated_norm_rank=4,
    index_topk=8,
    index_n_heads=16,
    index_head_dim=16,
    rms_norm_eps=1e-3,  # Norms of latents have 1e-6 all the same.
    max_position_embeddings=4096,
    rope_parameters=dict(rope_theta=500.0, rope_type='default'),
    dtype='float32',
)
HY = {key: value for key, value in SIZES.items() if key != 'moe_layer_freq'} | dict(
    architectures=['HYV4ForCausalLM'],
    pad_token_id=2,
    model_type='hy_v4',
    num_hidden_layers=4,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    index_topk=8,
    index_n_heads=16,
    index_head_dim=16,
    indexer_types=['full', 'full', 'shared', 'shared'],
    hc_mult=3,
    hc_magnitude=1.5,
    hc_eps=1e-3,
    learnable_sink_init=0.0,
    swiglu_limit=0.4,
    rms_norm_eps=0.02,
    max_position_embeddings=4096,
    rope_parameters=dict(rope_theta=500.0, rope_type='default'),
    dtype='float32',
    # Ours: what transformers does with these weights, and other engines do not; see README.md.
    latent_eps=1e-6,
    rope_interleave=False,
    indexer_rope_interleave=False,
)

DOTS = {key: value for key, value in SIZES.items() if key not in ('num_nextn_predict_layers', 'ep_size')} | dict(
    architectures=['Dots3NoteForCausalLM'],
    pad_token_id=2,
    model_type='dots3_note',
    num_hidden_layers=5,
    first_k_dense_replace=1,
    n_routed_experts=4,
    moe_shared_expert_intermediate_size=24,
    routed_scaling_factor=1.5,
    layer_types=['full_attention'] * 2 + ['sliding_attention'] * 2 + ['full_attention'],
    sliding_window_size=21,
    swa_num_attention_heads=2,
    swa_num_key_value_heads=2,
    swa_q_lora_rank=20,
    swa_kv_lora_rank=12,
    swa_head_dim=16,
    swa_qk_nope_head_dim=10,
    swa_qk_rope_head_dim=6,
    swa_v_head_dim=14,
    swa_rope_theta=60.0,
    attention_gate_type='headwise',
    swa_attention_gate_type='headwise',
    apply_mla_qkv_lora_rescale=True,
    index_topk=8,
    index_n_heads=16,
    index_head_dim=16,
    rms_norm_eps=0.02,
    max_position_embeddings=4096,
    rope_theta=500.0,
    rope_scaling=None,
    dtype='float32',
    # Parts that are left out must fit the width all the same.
    vision_config=dict(adapter_out_dim=32),
    audio_config=dict(adapter_out_dim=32),
)

HY_VL = dict(
    architectures=['HYV4VLForConditionalGeneration'],
    model_type='hy_v4_vl',
    dtype='float32',
    tie_word_embeddings=False,
    image_token_id=62,
    video_token_id=63,
    vision_config=dict(
        model_type='hy_v4_vl_vision', hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, patch_size=4, max_image_size=16, out_hidden_size=32,
    ),
    text_config={
        key: value for key, value in HY.items()
        if key not in ('architectures', 'latent_eps', 'rope_interleave', 'indexer_rope_interleave', 'dtype')
    } | dict(
        model_type='hy_v4_vl_text',
        rope_parameters=dict(rope_theta=500.0, rope_type='default', mrope_section=[2, 1, 1]),
    ),
)  # fmt: skip
MISTRAL_TEXT = dict(
    model_type='mistral_large4_text',
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=12,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=4,
    kv_lora_rank=16,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.5,
    first_k_dense_replace=1,
    # Layers 3 to 5 read what the last layer before 2, or 2 itself, has kept for them.
    no_rope_layers=[1, 1, 0, 1, 1, 0],
    kv_source_layers=[0, 1, 2, 1, 1, 2],
    indexer_types=['full', 'full', 'full', 'full', 'shared', 'full'],
    index_topk=8,
    index_n_heads=16,
    index_head_dim=16,
    rms_norm_eps=0.02,
    final_logit_softcapping=2.0,
    max_position_embeddings=2560,
    rope_parameters=dict(
        rope_type='yarn',
        rope_theta=10000.0,
        factor=40.0,
        original_max_position_embeddings=64,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=1.0,
    ),
    hidden_act='silu',
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
MISTRAL = dict(
    architectures=['MistralLarge4ForConditionalGeneration'],
    model_type='mistral_large4',
    dtype='float32',
    tie_word_embeddings=False,
    image_token_index=63,
    # As small as it may be: it is part of the checkpoint, and left out here.
    vision_config=dict(
        model_type='pixtral', hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, head_dim=4, patch_size=4, image_size=16, hidden_act='silu',
    ),
    text_config=MISTRAL_TEXT,
)  # fmt: skip

# config.json of each case, with the released files' keys. 'glm_moe_dsa_full' is the exception:
# its config.json is what transformers itself writes.
CASES = {
    'deepseek_v32': DEEPSEEK | INDEXER | dict(
        architectures=['DeepseekV32ForCausalLM'], model_type='deepseek_v32',
    ),
    'deepseek_v3': DEEPSEEK | dict(
        architectures=['DeepseekV3ForCausalLM'], model_type='deepseek_v3',
    ),
    'glm_moe_dsa': GLM | dict(
        num_hidden_layers=5,
        first_k_dense_replace=2,
        indexer_types=['full', 'full', 'shared', 'full', 'shared'],
        index_topk_freq=2,
        index_skip_topk_offset=2,
        index_topk_pattern=None,
        index_share_for_mtp_iteration=True,
        rope_parameters=dict(rope_theta=8_000_000, rope_type='default'),
    ),
    'glm_moe_dsa_full': GLM | dict(
        num_hidden_layers=3,
        first_k_dense_replace=1,
        rope_parameters=dict(rope_theta=1_000_000, rope_type='default'),
    ),
    'glm_moe_dsa_mixed': GLM | dict(
        num_hidden_layers=4,
        first_k_dense_replace=0,
        mlp_layer_types=['sparse', 'dense', 'sparse', 'dense'],
        indexer_types=['full', 'shared', 'full', 'shared'],
        n_routed_experts=4,
        moe_intermediate_size=8,
        intermediate_size=16,
        rope_parameters=dict(rope_theta=1_000_000, rope_type='default'),
    ),
    'axk2': AXK2 | dict(n_group=None, topk_group=None),
    'axk2_groups': AXK2 | dict(num_hidden_layers=2, first_k_dense_replace=0, n_group=4, topk_group=3),
    'hy_v4': HY,
    'hy_v4_vl': HY_VL,
    'dots3_note': DOTS,
    'mistral_large4': MISTRAL,
    # Layer 3 is to read layer 0, and reads layer 1, which is the last one that keeps anything of its kind.
    'mistral_large4_sources': MISTRAL | dict(
        text_config=MISTRAL_TEXT | dict(
            num_hidden_layers=5,
            n_group=1,
            topk_group=1,
            no_rope_layers=[1, 1, 0, 1, 1],
            kv_source_layers=[0, 1, 2, 0, 1],
            indexer_types=['full'] * 5,
        ),
    ),
    **DENSE_CASES,
}
OF_PICTURES = 'model.vision_tower.', 'model.multi_modal_projector.'
SAVED_CONFIG = ('glm_moe_dsa_full',)
SHARDED = {'glm_moe_dsa': '225KB'}
SEQ_LEN = 96
DENSE_SHAPE = 1, 80  # Of the tokens of DENSE_CASES.
NEGATIVE_BIAS = {'axk2_groups': -1.5}  # Added to the router's bias of the last layer.


class Watch(TorchFunctionMode):
  """While active, records what decoder layers' indexers and routers select, and by what margin."""

  def __init__(self, layers):
    super().__init__()
    self._layers = layers
    self._handles = []
    self._inside = None  # The indexer or router that is running.
    self.selected = []  # In order of layers, then of calls; shared layers included.
    self.experts = []
    self.margins = {'index': np.inf, 'group': np.inf, 'expert': np.inf}
    self.least_choice = np.inf  # Least sigmoid(logit) + bias.

  def __enter__(self):
    for layer in self._layers:
      indexer = getattr(layer.self_attn, 'indexer', None)
      if indexer is not None:
        self._watch(indexer, lambda out: self.selected.append(out.numpy()))
      elif hasattr(layer.self_attn, 'skip_topk'):
        self._watch(layer.self_attn, lambda out: self.selected.append(out[2].numpy()))
      elif hasattr(layer.self_attn, 'indexer'):  # A layer with a window, among those that select.
        nothing = np.full(layer.self_attn.config.index_topk, -1)
        self._watch(
            layer.self_attn,
            lambda out: self.selected.append(np.broadcast_to(nothing, (*out[0].shape[:2], len(nothing)))),
        )
      if hasattr(layer.mlp, 'gate'):
        self._watch(layer.mlp.gate, lambda out: self.experts.append(out[1:]))
    return super().__enter__()

  def __exit__(self, *error):
    for handle in self._handles:
      handle.remove()
    return super().__exit__(*error)

  def _watch(self, module, record):
    def before(module, args):
      self._inside = module
    def after(module, args, out):
      self._inside = None
      record(out)
    self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

  def __torch_function__(self, func, types, args=(), kwargs=None):
    kwargs = kwargs or {}
    if self._inside is not None and func in (torch.Tensor.topk, torch.topk):
      scores, k = args[0], args[1] if len(args) > 1 else kwargs['k']
      n_experts = getattr(self._inside, 'num_experts', None)
      if n_experts is None:
        self._margin('index', scores, k)
      elif scores.ndim == 3:  # The two best of each group: only their sum matters.
        if type(self._inside).__name__ != 'AXK2TopkRouter':  # That allows for negative scores.
          self.least_choice = min(self.least_choice, float(scores.min()))
      else:
        self._margin('expert' if scores.shape[-1] == n_experts else 'group', scores, k)
    return func(*args, **kwargs)

  def _margin(self, kind, scores, k):
    if scores.shape[-1] <= k:
      return
    scores = scores.double().reshape(-1, scores.shape[-1])
    masked = scores < torch.finfo(torch.float32).min / 2
    best = scores.masked_fill(masked, -torch.inf).sort(-1, descending=True).values
    scale = scores.masked_fill(masked, 0).abs().amax(-1)
    gaps = (best[:, k - 1] - best[:, k]) / scale
    gaps = gaps[torch.isfinite(best[:, k])]
    if len(gaps):
      self.margins[kind] = min(self.margins[kind], float(gaps.min()))


  def is_clear(self):
    """Whether float32 rounding cannot change a set, and every sigmoid + bias is positive."""
    return min(self.margins.values()) > MARGIN and self.least_choice > 0


def randomize(model):
  """Fills a model so that routing, selection and logits differ clearly from token to token."""
  with torch.no_grad():
    for name, x in itertools.chain(model.named_parameters(), model.named_buffers()):
      if 'rotary_emb' in name:
        if name.endswith('language_model.rotary_emb.alpha'):
          x.copy_(torch.randn(x.shape) * 0.3)
        continue
      if name.endswith('e_score_correction_bias'):
        x.copy_(torch.randn(x.shape) * 0.03)
      elif name.endswith('.bias'):
        x.copy_(torch.randn(x.shape) * 0.3)
      elif x.ndim == 1:
        x.copy_(torch.rand(x.shape) + 0.5)
      elif 'embed_tokens' in name:
        x.copy_(torch.randn(x.shape))
      else:
        x.copy_(torch.randn(x.shape) * x.shape[-1] ** -0.5)


def auto_class(config):
  """The class that makes the model of a config, with its head."""
  has_pictures = config.model_type in ('mistral_large4', 'hy_v4_vl')
  return transformers.AutoModelForImageTextToText if has_pictures else transformers.AutoModelForCausalLM


def layers_of(model):
  return getattr(model.model, 'language_model', model.model).layers


def load(folder, **kwargs):
  """Reads a checkpoint folder; raises ValueError unless it holds exactly the model's tensors.

  Those of an MTP layer may be there too: transformers leaves them alone. Those of parts for pictures may
  be missing: a text does not pass them.
  """
  config = transformers.AutoConfig.from_pretrained(folder)
  model, info = auto_class(config).from_pretrained(
      folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True, **kwargs
  )
  mtp = f'model.layers.{config.get_text_config().num_hidden_layers}.'
  info['unexpected_keys'] = {x for x in info['unexpected_keys'] if not x.startswith(mtp)}
  info['missing_keys'] = {x for x in info['missing_keys'] if not x.startswith(OF_PICTURES)}
  faults = {key: sorted(map(str, value)) for key, value in info.items() if value}
  if faults:
    raise ValueError(f'{folder}: {faults}')
  return model.eval()


def visible(selected, start=0):
  """int32 [B, T, K]: ascending, with the future's positions (short rows only) turned to -1."""
  positions = start + np.arange(selected.shape[1])[None, :, None]
  end = np.iinfo(np.int32).max
  rows = np.sort(np.where(selected <= positions, selected, end), -1)
  return np.where(rows == end, -1, rows).astype(np.int32)


@torch.no_grad()
def full_forward(model, tokens):
  """The arrays of a forward pass over whole rows, and its Watch."""
  with Watch(layers_of(model)) as watch:
    arrays = {'logits': model(tokens, use_cache=False).logits.numpy()}
  if watch.selected:
    arrays['selected'] = np.stack([visible(x) for x in watch.selected])
  if watch.experts:
    weights, experts = (torch.stack(x) for x in zip(*watch.experts))
    experts, order = experts.sort(-1)
    shape = (len(experts), *tokens.shape, -1)
    arrays['experts'] = experts.reshape(shape).numpy().astype(np.int32)
    arrays['expert_weights'] = weights.gather(-1, order).reshape(shape).numpy()
  return arrays, watch


@torch.no_grad()
def cached_forward(model, tokens, lengths):
  """Logits and selections of consecutive calls on `lengths` tokens, sharing one cache."""
  cache, start, logits, selected = None, 0, [], []
  for length in lengths:
    with Watch(layers_of(model)) as watch:
      out = model(tokens[:, start:start + length], past_key_values=cache, use_cache=True)
    cache = out.past_key_values
    logits.append(out.logits.numpy())
    if watch.selected:
      selected.append(np.stack([visible(x, start) for x in watch.selected]))
    start += length
  return logits, selected


def golden(model, tokens):
  """Every array of a golden.npz."""
  seq_len = tokens.shape[1]
  arrays, _ = full_forward(model, tokens)
  logits, selected = cached_forward(model, tokens, (seq_len - N_STEPS,) + (1,) * N_STEPS)
  arrays['incremental_logits'] = np.concatenate(logits[1:], 1)
  if selected:
    arrays['incremental_selected'] = np.concatenate(selected[1:], 2)
    np.testing.assert_array_equal(
        arrays['incremental_selected'], arrays['selected'][:, :, -N_STEPS:]
    )
  if seq_len > sum(CHUNKS):
    logits, selected = cached_forward(model, tokens, (*CHUNKS, seq_len - sum(CHUNKS)))
    np.testing.assert_allclose(np.concatenate(logits, 1), arrays['logits'], atol=1e-4, rtol=0)
    if selected:
      np.testing.assert_array_equal(np.concatenate(selected, 2), arrays['selected'])
  return {'tokens': tokens.numpy().astype(np.int32)} | arrays


def build(config_path, seed):
  """A random model and tokens for it."""
  torch.manual_seed(seed)
  shape = DENSE_SHAPE if config_path.parent.name in DENSE_CASES else (2, SEQ_LEN)
  config = transformers.AutoConfig.from_pretrained(config_path)
  model = auto_class(config).from_config(
      config, dtype=torch.float32, attn_implementation='eager'
  ).eval()
  randomize(model)
  if shift := NEGATIVE_BIAS.get(config_path.parent.name):
    model.model.layers[-1].mlp.gate.e_score_correction_bias += shift
  return model, torch.randint(config.get_text_config().vocab_size, shape)


def make(name, folder, seeds=range(10_000)):
  """Writes one case: config.json, safetensors (with an index where sharded) and golden.npz.

  The first of the seeds is taken whose selections are clear.
  """
  folder.mkdir(parents=True, exist_ok=True)
  config_json = folder / 'config.json'
  config_json.write_text(json.dumps(CASES[name], indent=2) + '\n')
  for seed in seeds:
    model, tokens = build(config_json, seed)
    _, watch = full_forward(model, tokens)
    if watch.is_clear():
      break
  else:
    raise AssertionError(f'{name}: no seed of {seeds} gives clear selections.')

  with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch)
    model.save_pretrained(scratch, max_shard_size=SHARDED.get(name, '1GB'))
    for old in folder.glob('model*.safetensors*'):
      old.unlink()
    for new in scratch.glob('model*.safetensors*'):
      shutil.copyfile(new, folder / new.name)
    config = 'config.json' if name in SAVED_CONFIG else 'saved_config.json'
    shutil.copyfile(scratch / 'config.json', folder / config)

  loaded = load(folder)
  for key, value in model.state_dict().items():
    assert torch.equal(value, loaded.state_dict()[key]), key
  arrays = golden(loaded, tokens)
  again, _ = full_forward(model, tokens)
  np.testing.assert_array_equal(again['logits'], arrays['logits'])
  np.savez_compressed(folder / 'golden.npz', seed=seed, **arrays)

  incremental = np.abs(arrays['logits'][:, -N_STEPS:] - arrays['incremental_logits']).max()
  margins = ', '.join(f'{kind} {value:.1e}' for kind, value in watch.margins.items())
  size = sum(path.stat().st_size for path in folder.iterdir())
  print(f'{name}: seed {seed}; margins {margins}; least sigmoid + bias {watch.least_choice:.2f}; '
        f'logits std {arrays["logits"].std():.2f}; incremental within {incremental:.1e}; {size} B')


def check(name, folder):
  """Makes a case anew by its seed, since a search takes minutes, and compares it with `folder`."""
  with np.load(folder / 'golden.npz') as arrays:
    seed = int(arrays['seed'])
  with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch) / name
    make(name, scratch, [seed])
    for path in sorted(folder.iterdir()):
      if path.suffix == '.npz':
        compare(path, scratch / path.name)
      elif path.name == 'saved_config.json':
        if _without_version(path) != _without_version(scratch / path.name):
          raise AssertionError(f'{name}/{path.name} differs.')
      elif path.read_bytes() != (scratch / path.name).read_bytes():
        raise AssertionError(f'{name}/{path.name} differs.')


def _without_version(path):
  return json.loads(path.read_text()) | {'transformers_version': None}


def compare(path, other):
  """Raises unless two npz files hold equal integers, and floats within 1e-5."""
  with np.load(path) as old, np.load(other) as new:
    assert set(old.files) == set(new.files), (old.files, new.files)
    for key in old.files:
      atol = 1e-5 if old[key].dtype.kind == 'f' else 0
      np.testing.assert_allclose(new[key], old[key], atol=atol, rtol=0, err_msg=f'{path}: {key}')


def quiet():
  """One core, and no bars or reports: `load` raises what they would warn of."""
  torch.set_num_threads(1)
  transformers.utils.logging.disable_progress_bar()
  transformers.utils.logging.set_verbosity_error()


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', choices=CASES)
  parser.add_argument('--check', action='store_true')
  parser.add_argument('--load', type=pathlib.Path, metavar='FOLDER')
  parser.add_argument('--tokens', type=pathlib.Path, metavar='NPZ')
  parser.add_argument('--out', type=pathlib.Path, metavar='NPZ')
  args = parser.parse_args()
  quiet()
  if args.load:
    if not (args.tokens and args.out):
      parser.error('--load needs --tokens and --out.')
    tokens = torch.from_numpy(np.load(args.tokens)['tokens']).long()
    np.savez_compressed(args.out, **golden(load(args.load), tokens))
    return
  for name in [args.only] if args.only else CASES:
    (check if args.check else make)(name, HERE / name)


if __name__ == '__main__':
  main()
