# SPDX-License-Identifier: Apache-2.0
"""Refuses what a config.json says and this package would pass over."""

from typing import Any

from dsa_jax.config import ConfigError
from dsa_jax.families.family import Family

# What none of these says can change the numbers that a model computes: names, ids of tokens,
# training, serving, and the generation settings that older files hold. A key that begins with an
# underscore is of this kind too.
HARMLESS = frozenset("""
    architectures auto_map transformers_version name_or_path model_name base_model license
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class
    initializer_range attention_dropout hidden_dropout classifier_dropout model_max_length
    max_sequence_length
    aux_loss_alpha seq_aux router_aux_loss_coef
    output_router_logits gradient_checkpointing pretraining_tp ep_size use_cache
    index_share_for_mtp_iteration unsloth_fixed unsloth_version attn_implementation
    output_attentions output_hidden_states return_dict torchscript use_bfloat16 tf_legacy_loss
    id2label label2id problem_type finetuning_task task_specific_params prefix is_decoder
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    transformers.js_config exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
""".split())

# Keys with the value that the model is built for.
NEUTRAL = {
    'use_sliding_window': False,
    'is_causal': True,
    'is_encoder_decoder': False,
    'add_cross_attention': False,
    'tie_encoder_decoder': False,
    'chunk_size_feed_forward': 0,
    'pruned_heads': {},
}

# The names that `transformers` has had for attention over all or over selected tokens.
DENSE_LAYERS = ('full_attention',)
WINDOW = 'sliding_attention'  # What layer_types calls a layer with a window.
SPARSE_LAYERS = ('full_attention', 'deepseek_sparse_attention', 'indexed_attention')


def check_keys(
    config: dict[str, Any],
    known: set[str],
    family: Family,
    sizes: dict[str, Any],
    *,
    has_indexer: bool,
    problems: list[str],
):
  """Notes every key that is neither read, nor harmless, nor at the value we are built for.

  A key whose value is null is as good as absent.

  Args:
    config: The config.json.
    known: The keys that are read elsewhere.
    family: The model's family.
    sizes: The fields of ModelConfig that they gave.
    has_indexer: Whether the checkpoint has indexers.
    problems: The list that takes a line for each such key.
  """
  neutral = {**NEUTRAL, **family.neutral}
  allowed = {key: (value,) for key, value in neutral.items()} | _implied(sizes)
  for key, value in config.items():
    if key in known or key in HARMLESS or key.startswith('_') or value is None:
      continue
    if key == 'layer_types':
      _check_layer_types(value, SPARSE_LAYERS if has_indexer else DENSE_LAYERS, problems)
    elif key not in allowed:
      problems.append(
          f'{key}={value!r} is unknown here and may change what the model computes: delete it if '
          'it does not.'
      )
    elif value not in allowed[key]:
      choices = ' or '.join(repr(choice) for choice in dict.fromkeys(allowed[key]))
      problems.append(f'{key}={value!r} must be {choices}.')


def _implied(sizes: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
  """Returns the values of keys that other keys determine."""
  names = 'qk_rope_head_dim', 'qk_nope_head_dim', 'v_head_dim'
  rope, nope, v = (sizes.get(name) or 0 for name in names)
  near = [sizes.get(f'window_{name}') or 0 for name in names[:2]]
  values = {
      'head_dim': (rope, nope + rope, v),
      'qk_head_dim': (nope + rope,),
      'num_key_value_heads': (sizes.get('n_heads'),),
      'num_experts': (sizes.get('n_routed_experts'),),
      'num_local_experts': (sizes.get('n_routed_experts'),),
      'swa_head_dim': (sum(near),),
      'swa_num_key_value_heads': (sizes.get('window_n_heads'),),
  }
  return {key: allowed for key, allowed in values.items() if None not in allowed}


def _check_layer_types(types: Any, names: tuple[str, ...], problems: list[str]):
  kinds = types if isinstance(types, list) else [types]
  if any(kind not in names or kind != kinds[0] for kind in kinds):
    problems.append(f'layer_types={types!r} must be all of one kind, one of {names}.')


def check_quantization(config: dict[str, Any]):
  """Checks that the weights are FP8 as DeepSeek's are, or not quantised.

  Raises:
    ConfigError: They are of another format.
  """
  key = next((k for k in ('quantization_config', 'compression_config') if config.get(k)), None)
  if key is None:
    return
  section = config[key]
  method = section.get('quant_method') if isinstance(section, dict) else section
  if method != 'fp8':
    raise ConfigError(
        f"config.json: {key}: quant_method={method!r} must be 'fp8', with scales of 128 x 128 "
        'blocks: take the released FP8 or bfloat16 checkpoint, or dequantise this one.'
    )
  if not isinstance(section, dict):
    raise ConfigError(f'config.json: {key}={section!r} must be a section, which says how blocks are scaled.')
  for name, value in (
      ('weight_block_size', [128, 128]), ('fmt', 'e4m3'), ('activation_scheme', 'dynamic'),
      ('is_checkpoint_fp8_serialized', True), ('weight_per_tensor', False),
  ):  # fmt: skip
    if section.get(name) not in (None, value):
      raise ConfigError(f'config.json: {key}: {name}={section[name]!r} must be {value!r}.')
