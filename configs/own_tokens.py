# SPDX-License-Identifier: Apache-2.0
r"""The recipe on a mixture of three sources of one's own, by a tokenizer of one's own.

python -m dsa_jax.train --config=configs/own_tokens.py --config.data.tokenizer=FOLDER

Copy it and change the mixture: the sources' names are free, `weight` is the share of the rows, and
each file is tokenized once, before the first step. Where a recipe starts from a converted checkpoint
(see configs/deepseek_v32.py), that one's tokenizer is the default. Variant `:tiny` is for tests.
"""

from configs import base, quickstart


def get_config(variant: str = 'full'):
  if variant not in ('full', 'tiny'):
    raise ValueError(f'Unknown variant {variant!r}; expected full or tiny.')
  c = quickstart.get_config(variant)
  c.workdir = 'runs/own_tokens'
  c.data = base.get_config().data
  c.data.source, c.data.packing = 'mixture', 'best_fit'
  if variant == 'tiny':
    c.data.validation_share = 0.1
    c.data.sources.one = dict(format='text', files='dsa_jax/**/*.py', weight=0.75)
    c.data.sources.other = dict(format='text', files='', weight=0.25)
    return c
  c.data.tokenizer = 'tokenizer.json'
  c.data.sources.web = dict(format='jsonl', files='corpus/web/*.jsonl.zst', field='text', weight=0.6)
  c.data.sources.code = dict(format='parquet', files='corpus/code', field='content', weight=0.3)
  c.data.sources.books = dict(format='text', files='corpus/books/**/*.txt', weight=0.1)
  c.model.vocab_size = 32_768  # At least the tokenizer's.
  c.report.checks = {}  # The quickstart's bars are of another text.
  return c
