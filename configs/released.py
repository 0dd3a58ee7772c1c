# SPDX-License-Identifier: Apache-2.0
"""What configs of released sparse models share: how they go on with their training.

How their indexers were trained has not been published, so the rate and the size of the steps are ours.
The text is yours: put `--config.data.sources.text.files=...` behind the command, which reads it with the
tokenizer of the checkpoint.
"""

import dataclasses

from configs import base
from dsa_jax.config import ModelConfig

TINY = dict(
    vocab_size=258, dim=32, n_layers=2, inter_dim=32, moe_inter_dim=16, n_routed_experts=4,
    n_activated_experts=2, n_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=8, index_n_heads=2, index_head_dim=8, index_topk=8,
    original_seq_len=64, max_seq_len=64,
)  # fmt: skip


def go_on_with(name: str, model: ModelConfig, variant: str, *, tiny: dict):
  """Returns the recipe of a model whose checkpoint was converted to `checkpoints/NAME`.

  The variant 'tiny' starts from a dense stage of its own; `tiny` is what its model has beside TINY.
  """
  c = base.get_config()
  c.workdir = f'runs/{name}'
  c.model.update(dataclasses.asdict(model))
  c.recipe = ('sparse',)
  c.stages.sparse = base.stage(
      stage='sparse', init_from=f'checkpoints/{name}', steps=1000, batch_size=64,
      micro_batches=64, seq_len=32_768, backbone_lr=7e-6, indexer_lr=7e-6, end_share=1.0,
  )
  c.report.update(seq_len=32_768, batch_size=1)
  c.data.source, c.data.packing = 'mixture', 'best_fit'
  c.data.sources.text = dict(format='jsonl', files='corpus/*.jsonl*', field='text', weight=1.0)
  if variant == 'tiny':
    c.workdir = f'runs/{name}_tiny'
    c.data = base.get_config().data
    c.model.update(TINY | tiny)
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
