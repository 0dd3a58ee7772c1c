# SPDX-License-Identifier: Apache-2.0
r"""The whole recipe at 16K and 32K tokens of context, on one Hopper: where to start with one GPU.

python -m dsa_jax.train --config=configs/one_gpu.py --config.data.sources.text.files='~/texts/**/*.txt'

A model of 309 million parameters, 127 million of which a token uses, reads 157 million bytes. Compiled
for an H200 (2026-11-29, jax 0.10.2), a step takes 8.9 GiB dense, 7.0 in the warm-up and 12.6 sparse,
weights and moments included; the report takes up to 22.0. An H100 has 74. It has not run on a GPU yet:
see experiments/model_speed. Without `files` it reads the standard library of Python some fourteen times
over, which such a model learns by heart: give it text of your own, in any format and with any tokenizer
(see configs/own_tokens.py). Variant `:tiny` is for tests.
"""

from configs import base


def get_config(variant: str = 'full'):
  c = base.get_config()
  c.workdir = 'runs/one_gpu'
  c.measure_rows = 1
  c.model.update(
      vocab_size=258, dim=1024, n_layers=12, n_dense_layers=1, inter_dim=2816,
      n_heads=16, q_lora_rank=512, kv_lora_rank=256,
      qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
      index_n_heads=8, index_head_dim=64, index_topk=1024,
      n_routed_experts=16, n_activated_experts=4, n_expert_groups=4, n_limited_groups=2,
      moe_inter_dim=448, route_scale=2.5,
      rope_type='default', max_seq_len=32_768, original_seq_len=32_768, rope_theta=500_000.0,
  )
  c.data.source, c.data.packing = 'mixture', 'best_fit'
  c.data.sources.text = dict(format='text', files='')
  c.recipe = ('short', 'dense', 'baseline', 'warmup', 'sparse')
  c.stages.short = base.stage(  # Most of what there is to learn needs no long rows.
      stage='dense', steps=1600, batch_size=4, seq_len=16_384, backbone_lr=6e-4, warmup_steps=100
  )
  size = dict(batch_size=2, seq_len=32_768)
  tune = size | dict(steps=200, backbone_lr=6e-5, data_seed=2, warmup_steps=10)
  c.stages.dense = base.stage(
      stage='dense', init_from='short', steps=200, backbone_lr=2e-4, data_seed=1, warmup_steps=10,
      **size
  )
  c.stages.baseline = base.stage(stage='dense', init_from='dense', **tune)
  c.stages.warmup = base.stage(
      stage='warmup', init_from='dense', steps=200, indexer_lr=1e-3, data_seed=3, **size
  )
  c.stages.sparse = base.stage(stage='sparse', init_from='warmup', indexer_lr=3e-4, **tune)
  c.report.update(seq_len=32_768, batch_size=1, batches=8)
  if variant == 'tiny':
    c.workdir = 'runs/one_gpu_tiny'
    c.model.update(
        dim=32, n_layers=2, inter_dim=32, n_heads=2, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, index_n_heads=2, index_head_dim=8,
        index_topk=8, n_routed_experts=4, n_activated_experts=2, n_limited_groups=2,
        moe_inter_dim=16,
    )
    for entry in c.stages.values():
      entry.update(steps=2, warmup_steps=0, batch_size=2, seq_len=64)
    c.report.update(seq_len=64, batch_size=2, batches=1)
  elif variant != 'full':
    raise ValueError(f'Unknown variant {variant!r}; expected full or tiny.')
  return c
