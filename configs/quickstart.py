# SPDX-License-Identifier: Apache-2.0
r"""The whole recipe on real text, on a laptop.

python -m dsa_jax.train --config=configs/quickstart.py
"""

from configs import base


def get_config(variant: str = 'full'):
  c = base.get_config()
  c.workdir = 'runs/quickstart'
  c.remat = False
  c.model.update(
      vocab_size=258, dim=128, n_layers=4, n_dense_layers=2, inter_dim=256,
      n_heads=4, q_lora_rank=96, kv_lora_rank=64,
      qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
      index_n_heads=4, index_head_dim=32, index_topk=64,
      n_routed_experts=4, n_activated_experts=2, n_expert_groups=2, n_limited_groups=2,
      moe_inter_dim=64, route_scale=1.0,
      max_seq_len=512, dtype='float32',
  )
  c.recipe = ('dense', 'baseline', 'warmup', 'sparse')
  size = dict(batch_size=8, seq_len=512)
  tune = size | dict(steps=60, backbone_lr=1e-3, data_seed=1, warmup_steps=5)
  c.stages.dense = base.stage(
      stage='dense', steps=200, backbone_lr=3e-3, warmup_steps=20, end_share=0.3, **size
  )
  c.stages.baseline = base.stage(stage='dense', init_from='dense', **tune)
  c.stages.warmup = base.stage(
      stage='warmup', init_from='dense', steps=60, indexer_lr=1e-2, data_seed=2, **size
  )
  c.stages.sparse = base.stage(stage='sparse', init_from='warmup', indexer_lr=3e-3, **tune)
  if variant == 'tiny':
    c.workdir = 'runs/tiny'
    c.save_every = c.measure_every = 4
    c.log_every = c.measure_rows = 1
    c.model.update(dim=32, n_heads=2, q_lora_rank=16, kv_lora_rank=16, inter_dim=32,
                   moe_inter_dim=16, index_topk=8, n_layers=2)
    c.report.update(seq_len=64, batch_size=2, batches=2)
    for entry in c.stages.values():
      entry.update(steps=8, warmup_steps=0, batch_size=2, seq_len=64)
  elif variant != 'full':
    raise ValueError(f'Unknown variant {variant!r}; expected full or tiny.')
  return c
