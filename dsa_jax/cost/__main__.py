# SPDX-License-Identifier: Apache-2.0
r"""Prints what a token costs on a chip, dense and sparse, by part.

python -m dsa_jax.cost --model=configs/deepseek_v32.py --chip=h800 --context=131072
python -m dsa_jax.cost --model=qwen3_30b_a3b --weights=bf16 --cache=bf16 --queries=1
python -m dsa_jax.cost --model=hy_v4 --context=131072
"""

from collections.abc import Sequence
import dataclasses
import math
import pathlib
import runpy
import sys

from absl import app, flags
import rich.box
import rich.console
import rich.table

from dsa_jax.command_line import check_no_words, find_configs
from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.cost.calls import cheaper_from, crossover, model_curve
from dsa_jax.cost.chips import CHIPS
from dsa_jax.cost.serving import Part, Serving, dollars_per_million, token_parts
from dsa_jax.cost.work import cache_bytes
from dsa_jax.families import FAMILIES, SIZES

PHASES = 'prefill', 'decode'
FORMATS = {'fp8': 'FP8', 'bf16': 'bfloat16'}


def read_model(name: str) -> ModelConfig:
  """Returns a released model by its short name or its family's, or the `model` of a file of configs/.

  Of a family it is the first one that is named in dsa_jax/families.
  """
  file, _, variant = name.partition(':')
  if pathlib.Path(file).is_file() and file.endswith('.py'):
    find_configs()
    module = runpy.run_path(file)
    if 'get_config' not in module:
      raise ConfigError(f'--model={name}: {file} must have a function get_config, as files of configs/ do.')
    try:
      return ModelConfig(**module['get_config'](*[variant] if variant else []).model)
    except (TypeError, ValueError) as error:  # An unknown variant, or a field that is none.
      raise ConfigError(f'--model={name}: {error}') from error
  of_families = {family: [*x.sizes.values()][0] for family, x in FAMILIES.items() if x.sizes}
  if name not in SIZES | of_families:
    raise ConfigError(
        f'--model={name} must be a file such as configs/deepseek_v32.py, a model ({", ".join(SIZES)}) or a '
        f'family ({", ".join(of_families)}).'
    )
  return (SIZES | of_families)[name]


def paragraph(
    cfg: ModelConfig,
    serving: Serving,
    context: int,
    *,
    price: float,
    output_share: float,
    hit_share: float,
) -> str:
  """Returns the answer in words."""
  said = [
      f'Weights are in {FORMATS[serving.weights]}, stored keys in {FORMATS[serving.cache]}; a decode step has'
      f' {serving.batch} x {serving.queries} tokens (sequences x tokens of each).'
  ]
  curves = {'dense': {}, 'sparse': {}}
  for phase in PHASES:
    parts = {
        kind: token_parts(cfg, context, phase, sparse=kind == 'sparse', serving=serving)
        for kind in curves
    }
    for kind in curves:
      curves[kind][phase] = model_curve(
          cfg, phase, sparse=kind == 'sparse', serving=serving, limit=cfg.max_seq_len
      )
    dense, sparse = (sum(p.seconds for p in parts[kind].values()) for kind in curves)
    of_indexer = (p.seconds for name, p in parts['sparse'].items() if name in ('index scores', 'selection'))
    indexer = sum(of_indexer) / sparse
    start = crossover(curves['dense'][phase], curves['sparse'][phase])
    said.append(
        f'On {serving.chip.name}{_of_experts(cfg, serving)}, {phase} of a token that sees {context:,} tokens takes'
        f' {_number(1e6 * sparse)} µs sparse and {_number(1e6 * dense)} µs dense, a factor of'
        f' {dense / sparse:.1f} (${_dollars(sparse, price)} and ${_dollars(dense, price)} per'
        f' million tokens, ${price:g} per chip-hour);'
        f' scoring and selecting are {indexer:.0%} of the sparse time; sparse is the cheaper one'
        f' {_from(start, cfg.max_seq_len)}.'
    )
  half = cheaper_from(curves['dense'], curves['sparse'], output_share, hit_share)
  said.append(
      f'A call with {output_share:.0%} of its tokens generated and {hit_share:.0%} of its prompt'
      f' cached costs half as much sparse as dense {_from(half, cfg.max_seq_len)}.'
  )
  said.append(_memory(cfg, serving, context))
  return ' '.join(said)


def _of_experts(cfg: ModelConfig, serving: Serving) -> str:
  has_experts = cfg.n_dense_layers < cfg.n_layers and serving.chips_of(cfg) > 1
  return f', one of {serving.chips_of(cfg)} that share the experts' if has_experts else ''


def _memory(cfg: ModelConfig, serving: Serving, context: int) -> str:
  per_token = cache_bytes(cfg, serving.cache)
  needed, memory = per_token * context * serving.batch, serving.chip.memory
  text = (
      f'A cached token takes {per_token:,} bytes{_of_windows(cfg)}, so {serving.batch} sequences of this'
      f' length take {_number(needed / 1e9)} GB per chip; {serving.chip.name} has {memory / 1e9:.0f} GB'
  )
  if needed <= memory:
    return f'{text}.'
  return f'{text}, enough for {memory // (per_token * context):.0f}, weights aside: try --batch.'


def _of_windows(cfg: ModelConfig) -> str:
  return ', also in layers with a window, as the sampler here keeps them all' if cfg.window_layers else ''


def phase_table(
    cfg: ModelConfig, serving: Serving, context: int, phase: str, price: float
) -> rich.table.Table:
  """Returns a table with the work and time of each part, dense and sparse."""
  table = rich.table.Table(
      title=f'{phase}, per token at context {context:,}, {serving.chip.name}',
      title_justify='left', box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
  )  # fmt: skip
  table.add_column('', no_wrap=True)
  for unit in ('GFLOP', 'MB', 'µs'):
    for kind in ('dense', 'sparse'):
      table.add_column(f'{unit}\n{kind}', justify='right', overflow='fold')
  table.add_column('\nbound by', no_wrap=True)
  both = [token_parts(cfg, context, phase, sparse=kind, serving=serving) for kind in (False, True)]
  for name in both[1]:
    present = [parts[name] for parts in both if name in parts]
    bound = ' / '.join(dict.fromkeys(part.bound for part in present))
    table.add_row(name, *_cells([parts.get(name) for parts in both]), bound,
                  end_section=name == [*both[1]][-1])  # fmt: skip
  totals = [Part(*(sum(p[i] for p in parts.values()) for i in range(3)), '') for parts in both]
  table.add_row('all', *_cells(totals))
  dollars = [_dollars(total.seconds, price) for total in totals]
  table.add_row('$ per million', *[''] * 4, *dollars)
  return table


def _cells(parts: Sequence[Part | None]) -> list[str]:
  scaled = [p and (p.flops / 1e9, p.bytes / 1e6, p.seconds * 1e6) for p in parts]
  return [_number(values[i]) if values else '' for i in range(3) for values in scaled]


def _dollars(seconds: float, price: float) -> str:
  dollars = dollars_per_million(seconds, price)
  return f'{dollars:.3f}' if dollars >= 0.01 or not dollars else f'{dollars:.2g}'


def _number(x: float) -> str:
  return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def _from(context: float, limit: int) -> str:
  if math.isnan(context):
    return f'at no length up to {limit:,}'
  return f'from {context:,.0f} tokens on'


def main(argv: list[str]):
  console = rich.console.Console(width=None if sys.stdout.isatty() else 120)  # No number is cut off.
  try:
    check_no_words(argv)
    cfg = read_model(MODEL.value)
    serving = Serving(
        chip=CHIPS[CHIP.value], cache=CACHE.value, weights=WEIGHTS.value, batch=BATCH.value,
        queries=QUERIES.value, expert_chips=EXPERT_CHIPS.value,
    )  # fmt: skip
    answer = paragraph(
        cfg, serving, CONTEXT.value,
        price=PRICE.value, output_share=OUTPUT_SHARE.value, hit_share=HIT_SHARE.value,
    )  # fmt: skip
    tables = [phase_table(cfg, serving, CONTEXT.value, p, PRICE.value) for p in PHASES]
  except ConfigError as error:
    sys.exit(f'error: {error}')
  console.print(f'model: {MODEL.value}', markup=False, highlight=False)
  for table in tables:
    console.print(table)
  console.print(answer, markup=False, highlight=False)
  for phase in PHASES:
    shares = dataclasses.asdict(getattr(serving, phase)).items()
    console.print(
        f'Shares of peak, {phase}: {", ".join(f"{n} {x:.3g}" for n, x in shares)}.', highlight=False
    )


if __name__ == '__main__':
  DEFAULTS = Serving()
  MODEL = flags.DEFINE_string(
      'model', 'v32', 'A released model, a family, or a file of configs/, of which only `model` is read.'
  )
  CHIP = flags.DEFINE_enum('chip', 'h800', [*CHIPS], 'The chip to run on.')
  CONTEXT = flags.DEFINE_integer(
      'context', 131_072, 'The number of tokens that a token sees, itself included.'
  )
  PRICE = flags.DEFINE_float('price', 2.0, 'Dollars per chip and hour.', lower_bound=0)
  CACHE = flags.DEFINE_enum('cache', DEFAULTS.cache, [*FORMATS], 'The format of stored keys.')
  WEIGHTS = flags.DEFINE_enum('weights', DEFAULTS.weights, [*FORMATS], 'The format of weights.')
  BATCH = flags.DEFINE_integer('batch', DEFAULTS.batch, 'Sequences per chip that decode together.')
  QUERIES = flags.DEFINE_integer(
      'queries', DEFAULTS.queries, 'Tokens per sequence and decode step: 1 without MTP.'
  )
  EXPERT_CHIPS = flags.DEFINE_integer(
      'expert_chips', DEFAULTS.expert_chips, 'Chips that share the routed experts, no more than there are; 1 for a model on one chip.'
  )
  OUTPUT_SHARE = flags.DEFINE_float(
      'output_share', 0.1, "The share of a call's tokens that are generated."
  )
  HIT_SHARE = flags.DEFINE_float('hit_share', 0.0, 'The share of its prompt that is cached.')
  app.run(main)
