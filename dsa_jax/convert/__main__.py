# SPDX-License-Identifier: Apache-2.0
r"""Converts checkpoints between the released layouts and ours.

python -m dsa_jax.convert SOURCE TARGET            released -> ours
python -m dsa_jax.convert OWNER/MODEL TARGET       the same, from the Hugging Face hub
python -m dsa_jax.convert MODEL.gguf TARGET        the same, from a GGUF file
python -m dsa_jax.convert --export SOURCE TARGET   ours -> released
"""

import logging
import pathlib
import sys

from absl import app, flags

from dsa_jax.checkpoint_paths import check_readable
from dsa_jax.command_line import end_stopped
from dsa_jax.config import ConfigError, local_path
from dsa_jax.convert.exporter import export_bytes, export_checkpoint, open_checkpoint
from dsa_jax.convert.hub import find_source
from dsa_jax.convert.importer import DTYPES_OF, import_checkpoint, open_source
from dsa_jax.families import FAMILIES
from dsa_jax.reporting.progress import ByteProgress

EXPORT = flags.DEFINE_bool(
    'export', False, 'SOURCE is one of our checkpoints; TARGET gets the released layout.'
)
MTP = flags.DEFINE_bool('mtp', True, 'Import the multi-token-prediction layer where there is one.')
DTYPE = flags.DEFINE_enum(
    'dtype', 'bfloat16', list(DTYPES_OF),
    'The dtype that FP8 weights, and those that a GGUF file quantises, are imported as.'
)
SEED = flags.DEFINE_integer('seed', 0, 'The seed of fresh indexers, where the checkpoint has none.')
INDEXER = {  # The sizes of fresh indexers; each family has usual ones.
    'index_n_heads': flags.DEFINE_integer(
        'index_n_heads', None, 'The number of heads of a fresh indexer.'
    ),
    'index_head_dim': flags.DEFINE_integer(
        'index_head_dim', None, 'The width of each of its heads.'
    ),
    'index_topk': flags.DEFINE_integer(
        'index_topk', None, 'The number of tokens that it will select.'
    ),
    'index_n_selections': flags.DEFINE_integer(
        'index_n_selections', None, 'The number of key heads, for a selection for each of them.'
    ),
    'index_rope_head_dim': flags.DEFINE_integer(
        'index_rope_head_dim', None, 'The channels of each of its heads that it rotates.'
    ),
}
FAMILY = flags.DEFINE_enum(
    'family', '', ['', *FAMILIES], 'The family to export as; by default the one it was imported as.'
)
FP8 = flags.DEFINE_bool('fp8', None, 'Export in FP8; by default each matrix as it was imported.')
SHARD_GB = flags.DEFINE_float(
    'shard_gb', 4, 'The largest size of an exported file, in GiB.', lower_bound=0
)


def main(argv: list[str]):
  logging.getLogger('absl').setLevel(logging.CRITICAL)  # Silences orbax: errors are raised anyway.
  if len(argv) != 3:
    sys.exit(f'usage: python -m dsa_jax.convert [--export] SOURCE TARGET; got {argv[1:]}.')
  try:
    check_direction()
    target = local_path(argv[2], 'TARGET')
    if EXPORT.value:
      summary = run_export(local_path(argv[1], 'SOURCE'), target)
    else:
      check_readable(target, 'TARGET')  # Before anything is downloaded.
      summary = run_import(find_source(argv[1]), target)
  except (ConfigError, OSError) as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    end_stopped(f'stopped; nothing was written to {argv[2]}')
  print(summary)
  print(f'written to {target}')


def check_direction():
  """Raises a ConfigError for flags that would change nothing in the direction that was asked for."""
  of_import, of_export = [MTP, DTYPE, SEED, *INDEXER.values()], [FAMILY, FP8, SHARD_GB]
  others, of = (of_import, 'an import') if EXPORT.value else (of_export, '--export')
  if given := [f'--{flag.name}' for flag in others if flag.present]:
    advice = ': --dtype=fp8 keeps codes that are FP8' if FP8.present and not EXPORT.value else ''
    raise ConfigError(f'{", ".join(given)} would change nothing: that is for {of}{advice}.')


def run_import(folder: pathlib.Path, target: pathlib.Path):
  indexer = {name: flag.value for name, flag in INDEXER.items() if flag.value is not None}
  source = open_source(folder, mtp=MTP.value, indexer=indexer)
  with ByteProgress('convert', source.nbytes) as bar:
    return import_checkpoint(
        source, target, dtype=DTYPE.value, seed=SEED.value, advance=bar.advance
    )


def run_export(folder: pathlib.Path, target: pathlib.Path):
  if not SHARD_GB.value < 2**20:
    raise ConfigError(f'--shard_gb={SHARD_GB.value} must be below {2**20}.')
  source = open_checkpoint(folder, FAMILY.value)
  with ByteProgress('export', export_bytes(source, FP8.value)) as bar:
    summary = export_checkpoint(
        source,
        target,
        quantized=FP8.value,
        shard_bytes=int(SHARD_GB.value * 2**30),
        advance=bar.advance,
    )
  if source.has_indexer and not FAMILIES[source.family].has_indexer:
    print(f'Other loaders of {source.family} models leave the indexers out, and attend densely.')
  elif source.has_indexer and source.model.index_rope_factor > 1:
    print('Other loaders know no index_rope_factor: their indexers select otherwise.')
  return summary


if __name__ == '__main__':
  app.run(main)
