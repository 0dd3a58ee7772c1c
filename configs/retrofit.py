# SPDX-License-Identifier: Apache-2.0
r"""A dense model of any family becomes a sparse one.

python -m dsa_jax.convert Qwen/Qwen3-0.6B checkpoints/qwen3
python -m dsa_jax.train --config=configs/retrofit.py:checkpoints/qwen3 \
    --config.data.sources.text.files='corpus/*.jsonl.zst' --config.data.sources.text.format=jsonl

What stands behind the colon is the converted checkpoint: its sizes are the model's, its tokenizer reads
the text, and its own loss is the report's dense one. Without `files` the text is the standard library of
Python. Each query selects an eighth of the 2,048 tokens of a row, or as many as `convert --index_topk` says
if they are fewer than 2,048. The indexers learn first, while attention is dense. Then all of the model learns with sparse
attention; `--config.stages.sparse.trains="('indexer',)"` freezes the backbone instead. The variant with
`,baseline` behind the folder trains the dense model on the same tokens, too, so that what tuning gives is
not taken for what sparsity gives. Without a folder, `:tiny` makes a small model of its own, for tests.
"""

import pathlib

from configs import base
from dsa_jax.training.origin import model_record

SEQ_LEN = 2048


def get_config(variant: str = 'tiny'):
  c = base.get_config()
  c.workdir = 'runs/retrofit'
  c.data.source, c.data.packing = 'mixture', 'best_fit'
  c.data.sources.text = dict(format='text', files='')
  folder, _, option = variant.partition(',')
  if option not in ('', 'baseline'):
    raise ValueError(f"Unknown option {option!r} behind {folder!r}; expected 'baseline' or nothing.")
  size = dict(seq_len=SEQ_LEN, batch_size=4, warmup_steps=20, init_from=folder)
  tune = size | dict(steps=400, backbone_lr=1e-5, data_seed=2)
  c.stages.baseline = base.stage(stage='dense', **tune)
  c.stages.warmup = base.stage(stage='warmup', steps=400, indexer_lr=1e-3, data_seed=1, **size)
  c.stages.sparse = base.stage(
      stage='sparse', indexer_lr=3e-4, attention='auto', **tune | dict(init_from='warmup')
  )
  c.recipe = ('baseline', 'warmup', 'sparse') if option else ('warmup', 'sparse')
  c.report.update(seq_len=SEQ_LEN, batch_size=2, batches=8)
  if folder == 'tiny':
    _make_tiny(c)
    return c
  if not (sizes := model_record(pathlib.Path(folder).expanduser())):
    raise ValueError(
        f'{folder!r} must be a converted checkpoint, which `python -m dsa_jax.convert RELEASE {folder}` '
        'makes, or tiny.'
    )
  c.model.update(sizes)
  if c.model.index_topk >= SEQ_LEN:  # Nothing would be left out.
    c.model.index_topk = SEQ_LEN // 8
  return c


def _make_tiny(c):
  """Gives a config a small model with grouped-query attention, which a dense stage trains first."""
  c.model.update(
      vocab_size=258, dim=32, n_layers=2, n_dense_layers=2, inter_dim=64, attention='gqa', n_heads=4,
      n_kv_heads=2, qk_nope_head_dim=0, qk_rope_head_dim=8, v_head_dim=8, rope_interleave=False,
      q_lora_rank=0, kv_lora_rank=0, index_n_heads=2, index_head_dim=8, index_topk=8,
      rope_type='default', max_seq_len=64, original_seq_len=64, tie_embeddings=True,
  )
  c.workdir = 'runs/retrofit_tiny'
  c.stages.dense = base.stage(stage='dense', steps=2, batch_size=2, seq_len=64, backbone_lr=1e-3)
  c.stages.baseline.init_from = c.stages.warmup.init_from = 'dense'
  c.recipe = ('dense', *c.recipe)
  for entry in c.stages.values():
    entry.update(steps=2, warmup_steps=0, batch_size=2, seq_len=64)
  c.report.update(seq_len=64, batch_size=2, batches=1)
  c.measure_rows = 2
