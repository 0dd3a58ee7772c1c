# SPDX-License-Identifier: Apache-2.0
r"""DeepSeek-V3.2-Exp, 671B: a dense model becomes a sparse one, as published (report, section 2.1).

python -m dsa_jax.convert --nomtp DeepSeek-V3.1-Terminus checkpoints/deepseek_v31
python -m dsa_jax.train --config=configs/deepseek_v32.py --config.workdir=runs/deepseek_v32

The first command reads the released dense model and gives it fresh indexers; the second warms them
up and then trains sparsely. To start from the weights of V3.2 itself, let `recipe` be ('sparse',)
and set its `init_from`. The report does not give the optimiser, the shape of the schedule or the
clipping; a constant rate is assumed. The text is yours: put `--config.data.sources.text.files=...` behind
the second command. The checkpoint's own tokenizer reads it, once, before the first step; for a corpus of
a real size run `python -m dsa_jax.tokenize` before. Variant `:tiny` starts from a dense stage of its own.
"""

import dataclasses

from configs import base
from dsa_jax.families.deepseek import DEEPSEEK_V32


def get_config(variant: str = 'full'):
  c = base.get_config()
  c.workdir = 'runs/deepseek_v32'
  c.model.update(dataclasses.asdict(DEEPSEEK_V32))
  c.recipe = ('warmup', 'sparse')
  size = dict(seq_len=131_072, end_share=1.0)
  c.stages.warmup = base.stage(
      stage='warmup', init_from='checkpoints/deepseek_v31', steps=1000, batch_size=16,
      indexer_lr=1e-3, data_seed=1, **size
  )
  c.stages.sparse = base.stage(
      stage='sparse', init_from='warmup', steps=15_000, batch_size=480, micro_batches=480,
      backbone_lr=7.3e-6, indexer_lr=7.3e-6, data_seed=2, **size
  )
  c.report.update(seq_len=131_072, batch_size=1)
  c.data.source, c.data.packing = 'mixture', 'best_fit'
  c.data.sources.text = dict(format='jsonl', files='corpus/*.jsonl*', field='text', weight=1.0)
  if variant == 'tiny':
    c.workdir = 'runs/deepseek_v32_tiny'
    c.data = base.get_config().data
    c.model.update(
        vocab_size=258, dim=32, n_layers=2, n_dense_layers=1, n_mtp_layers=1, inter_dim=32,
        moe_inter_dim=16, n_routed_experts=4, n_activated_experts=2, n_expert_groups=2,
        n_limited_groups=1, n_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, index_n_heads=2, index_head_dim=8, index_topk=8,
        original_seq_len=32, max_seq_len=64,
    )
    c.recipe = ('dense', 'warmup', 'sparse')
    c.stages.dense = base.stage(stage='dense', steps=1, batch_size=2, seq_len=64, backbone_lr=1e-3)
    c.stages.warmup.init_from = 'dense'
    for entry in c.stages.values():
      entry.update(steps=2, batch_size=2, seq_len=64, micro_batches=2)
    c.report.update(seq_len=64, batch_size=2, batches=1)
    c.measure_rows = 2
  elif variant != 'full':
    raise ValueError(f'Unknown variant {variant!r}; expected full or tiny.')
  return c
