# SPDX-License-Identifier: Apache-2.0
r"""Where selection decides everything: key-value recall with evidence anywhere in the context.

python -m dsa_jax.train --config=configs/recall.py

Measured on two busy cores without an accelerator (2026-11-24): 13 min 53 s; dense baseline 98.16 %
right, sparse 97.75 % at 32 of 512 tokens, the same with a window 8.46 %. Variant `:tiny` is for tests.
"""

from configs import base


def get_config(variant: str = 'full'):
  c = base.get_config()
  c.workdir = 'runs/recall'
  c.remat = 'none'
  c.data.update(source='recall', n_keys=128, n_values=16, tokens_per_pair=4, tokens_per_query=8)
  c.measure_every = 50
  c.model.update(
      vocab_size=2208, dim=64, n_layers=2, n_dense_layers=2, inter_dim=128,
      n_heads=2, q_lora_rank=64, kv_lora_rank=64,
      qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
      index_n_heads=8, index_head_dim=64, index_topk=32,  # 48 channels free of rotation tell keys.
      rope_type='default', dtype='float32',
      max_seq_len=8192, original_seq_len=8192,  # Trained on 512; notebook 4 reads on.
  )
  c.recipe = ('short', 'dense', 'baseline', 'warmup', 'sparse')
  c.stages.short = base.stage(  # Retrieval is learnt where rows are cheap, then stretched.
      stage='dense', steps=2500, batch_size=32, seq_len=64, backbone_lr=3e-3, warmup_steps=100
  )
  size = dict(batch_size=8, seq_len=512)
  tune = size | dict(steps=120, backbone_lr=3e-4, data_seed=1, warmup_steps=10)
  c.stages.dense = base.stage(
      stage='dense', init_from='short', steps=240, backbone_lr=2e-3, warmup_steps=20, **size
  )
  c.stages.baseline = base.stage(stage='dense', init_from='dense', **tune)
  c.stages.warmup = base.stage(
      stage='warmup', init_from='dense', steps=240, indexer_lr=1e-2, data_seed=2, **size
  )
  c.stages.sparse = base.stage(stage='sparse', init_from='warmup', indexer_lr=2e-3, **tune)
  c.report.update(seq_len=512, batch_size=8, batches=16)
  if variant == 'full':
    c.report.checks = dict(accuracy_share=0.98, window_accuracy_share=0.5, mass_above_window=0.0)
  if variant == 'tiny':
    c.workdir = 'runs/recall_tiny'
    c.model.update(dim=32, q_lora_rank=16, kv_lora_rank=16, index_topk=8, max_seq_len=512)
    for entry in c.stages.values():
      entry.update(steps=2, warmup_steps=0, batch_size=2, seq_len=64)
    c.report.update(seq_len=64, batch_size=2, batches=1)
    c.measure_rows = 2
  elif variant != 'full':
    raise ValueError(f'Unknown variant {variant!r}; expected full or tiny.')
  return c
