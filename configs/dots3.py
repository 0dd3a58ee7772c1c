# SPDX-License-Identifier: Apache-2.0
r"""The text part of dots3-note, 280B: the released sparse model goes on with its training.

python -m dsa_jax.convert dots3-note-prev checkpoints/dots3
python -m dsa_jax.train --config=configs/dots3.py --config.workdir=runs/dots3

The first command reads the release. How it was trained has not been published, so the rate and the
size of the steps are ours. The text is yours: put `--config.data.sources.text.files=...` behind the
second command, which reads it with the tokenizer of the checkpoint. Variant `:tiny` starts from a
dense stage of its own.
"""

import dataclasses

from configs import base
from dsa_jax.families.dots3 import DOTS3_NOTE


def get_config(variant: str = 'full'):
  c = base.get_config()
  c.workdir = 'runs/dots3'
  c.model.update(dataclasses.asdict(DOTS3_NOTE))
  c.recipe = ('sparse',)
  c.stages.sparse = base.stage(
      stage='sparse', init_from='checkpoints/dots3', steps=1000, batch_size=64,
      micro_batches=64, seq_len=32_768, backbone_lr=7e-6, indexer_lr=7e-6, end_share=1.0,
  )
  c.report.update(seq_len=32_768, batch_size=1)
  c.data.source, c.data.packing = 'mixture', 'best_fit'
  c.data.sources.text = dict(format='jsonl', files='corpus/*.jsonl*', field='text', weight=1.0)
  if variant == 'tiny':
    c.workdir = 'runs/dots3_tiny'
    c.data = base.get_config().data
    c.model.update(
        vocab_size=258, dim=32, n_layers=3, inter_dim=32, moe_inter_dim=16, n_routed_experts=4,
        n_activated_experts=2, n_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, window_layers=(1,), sliding_window=16, window_n_heads=2,
        window_kv_lora_rank=24, window_qk_nope_head_dim=12, index_n_heads=2, index_head_dim=8,
        index_topk=8, original_seq_len=64, max_seq_len=64,
    )
    c.recipe = ('dense', 'warmup', 'sparse')
    c.stages.dense = base.stage(stage='dense', backbone_lr=1e-3)
    c.stages.warmup = base.stage(stage='warmup', init_from='dense', indexer_lr=1e-3)
    c.stages.sparse.init_from = 'warmup'
    for entry in c.stages.values():
      entry.update(steps=2, batch_size=2, seq_len=64, micro_batches=2)
    c.report.update(seq_len=64, batch_size=2, batches=1)
    c.measure_rows = 2
  elif variant != 'full':
    raise ValueError(f'Unknown variant {variant!r}; expected full or tiny.')
  return c
