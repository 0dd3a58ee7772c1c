# SPDX-License-Identifier: Apache-2.0
r"""SmolLM2-135M goes sparse; `run.py` makes what this needs, and README.md says what came out.

python -m dsa_jax.train --config=experiments/smollm2/recipe.py:cpu

Each query selects 128 of the 2,048 tokens of a row. `warmup` teaches the indexers while attention is
dense, `frozen` goes on with sparse attention, and neither changes the model. `sparse` then trains
all of it, beside the fair dense baseline on the same tokens. `:cpu` is for two cores, `:hopper` for one
GPU with 80 GB. A variant, such as `:cpu,each`, has a quarter of the warm-up, after which it ends, and
differs from `quarter` in one thing. `more`, `recall` and `longer` go on from the main line's warm-up.
"""

from configs import base, retrofit

CHECKPOINTS, TEXTS = 'checkpoints/smollm2', 'texts'
SOURCES = 'linux', 'python', 'faq', 'novels'
STEPS = {'cpu': (280, 20, 40), 'hopper': (600, 200, 200)}  # Of warmup, of frozen, of the others.
INDEXER = dict(index_n_heads=8, index_head_dim=64, index_rope_head_dim=32, index_topk=128)
# What each variant changes: sizes of the indexer, or the length of its rows. `shared` is the main line.
VARIANTS = {
    'shared': {},
    'quarter': {},
    'each': dict(index_n_heads=9, index_n_selections=3),  # A selection for each key head.
    'heads_4': dict(index_n_heads=4),
    'heads_16': dict(index_n_heads=16),
    'heads_32': dict(index_n_heads=32),
    'own_keys': {},  # Index keys begin as the model's own; see own_keys.py.
    'length_512': dict(seq_len=512),  # Of rows in warm-up, with as many tokens.
    'more': {},  # A quarter more of warm-up.
    'recall': {},  # As much, but a third of the rows say everything twice.
    'longer': dict(seq_len=8192, packing='full'),  # As much, in rows of one long document each.
}
GO_ON = 'more', 'recall', 'longer'  # Variants that begin from the main line's warm-up.


def indexer_of(variant: str) -> dict[str, int]:
  """Returns the sizes of a variant's indexer."""
  return INDEXER | {key: n for key, n in VARIANTS[variant].items() if key.startswith('index_')}


def checkpoint_of(variant: str) -> str:
  """Returns the folder of the checkpoint that a variant starts from."""
  has_own = variant == 'own_keys' or indexer_of(variant) != INDEXER
  return f'{CHECKPOINTS}/{variant if has_own else "shared"}'



def get_config(names: str = 'cpu'):
  scale, _, variant = names.partition(',')
  variant = variant or 'shared'
  if scale not in STEPS or variant not in VARIANTS:
    raise ValueError(f'Unknown {names!r}; expected one of {[*STEPS]}, maybe with one of {[*VARIANTS]}.')
  folder = checkpoint_of(variant)
  c = retrofit.get_config(folder)
  c.workdir = f'runs/smollm2/{scale}_{variant}'
  c.model.index_topk = INDEXER['index_topk']
  c.data.min_tokens = 1024
  for source in SOURCES:
    files = {'files': f'{TEXTS}/train/{source}.jsonl', 'validation_files': f'{TEXTS}/held_out/{source}.jsonl'}
    c.data.sources[source] = dict(format='jsonl', **files)
  del c.data.sources.text
  if variant == 'recall':
    files = {'files': f'{TEXTS}/train/recall.jsonl', 'validation_files': f'{TEXTS}/held_out/novels.jsonl'}
    c.data.sources.recall = dict(format='jsonl', weight=2.0, **files)

  steps, others = STEPS[scale], VARIANTS[variant]
  size = dict(seq_len=2048, batch_size=1 if scale == 'cpu' else 16, init_from=folder)
  tune = dict(steps=steps[2], backbone_lr=2e-5, warmup_steps=steps[2] // 10, data_seed=3)
  warmup = size | dict(steps=steps[0] if variant == 'shared' else steps[0] // 4, data_seed=1)
  if variant in GO_ON:
    warmup.update(init_from=f'runs/smollm2/{scale}_shared/checkpoints/warmup', data_seed=4)
  if length := others.get('seq_len'):  # As many tokens in all.
    rows = size['batch_size'] * 2048 / length
    warmup.update(seq_len=length, batch_size=max(int(rows), 1), steps=int(warmup['steps'] * min(rows, 1)))
  if length and length > 2048:
    c.model.update(index_rope_factor=length / 2048, index_original_seq_len=2048)
    c.data.packing = others['packing']
    warmup.update(init_may_differ=('index_rope_factor', 'index_original_seq_len'))
  c.stages = dict(
      warmup=base.stage(stage='warmup', warmup_steps=min(10, warmup['steps'] // 4), indexer_lr=3e-3, **warmup),
      frozen=base.stage(
          stage='sparse', trains=('indexer',), steps=steps[1], warmup_steps=4, indexer_lr=1e-3,
          data_seed=2, **size | dict(init_from='warmup'),
      ),
      baseline=base.stage(stage='dense', **size | tune),
      sparse=base.stage(stage='sparse', indexer_lr=3e-4, **size | tune | dict(init_from='frozen')),
  )  # fmt: skip
  c.recipe = ('warmup', 'frozen', 'baseline', 'sparse') if variant == 'shared' else ('warmup',)
  c.report.update(seq_len=2048, batch_size=1, batches=16 if variant == 'shared' else 1)
  c.measure_rows, c.log_every, c.remat = 1, 5, 'none'
  if scale == 'cpu':
    c.model.dtype = 'float32'
  return c
