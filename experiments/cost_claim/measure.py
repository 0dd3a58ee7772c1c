# SPDX-License-Identifier: Apache-2.0
"""Measures the claim on this machine: prefill and decode, dense and sparse, by context.

python experiments/cost_claim/measure.py                                   # a small model with MLA
python experiments/cost_claim/measure.py --attention=gqa --mesh.context=4 --name=mesh_gqa
python experiments/cost_claim/measure.py --model=chip --attention=mla,gqa --name=hopper

Writes NAME.json, NAME.md and NAME.png, with `_gqa` behind the name of a second kind of attention.
The weights and the rows of the cache are random, because time does not depend on them. The programs
are those of a sampler: prefill reads one chunk that ends where the context does, and decoding runs
over consecutive tokens, so that the context grows by one with each. Dense and sparse decoding take
turns, and a figure is the least of the turns' medians, but for the first turn, which compiles: what
else runs on a machine can only add to it. 'indexer' is the scoring and selecting of sparse decoding,
run by itself.

Predictions are the arithmetic of dsa_jax.cost at the peaks of the chip, shared evenly by the devices
of a mesh; what they send is not counted. Of a machine that is in no table, the peaks are what it
reaches in one large matrix product and in one large copy. Devices that a CPU simulates share its
cores, so the prediction for them is that for one device.
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import json
import pathlib
import platform
import sys
import time
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from dsa_jax.chips import device_of_kind  # noqa: E402
from dsa_jax.config import ConfigError, ModelConfig  # noqa: E402
from dsa_jax.cost.chips import Chip  # noqa: E402
from dsa_jax.cost.work import Work, token_work  # noqa: E402
from dsa_jax.families import SIZES as RELEASED  # noqa: E402
from dsa_jax.inference.cache import Cache  # noqa: E402
from dsa_jax.inference.programs import Engine, make_engine, read_chunk  # noqa: E402
from dsa_jax.inference.shares import check_mesh, check_texts  # noqa: E402
from dsa_jax.inference.split_selection import select_by_scores  # noqa: E402
from dsa_jax.nn.indexer import IndexInputs  # noqa: E402
from dsa_jax.parallel.mesh import MESH_AXES, TOKENS, MeshConfig, make_mesh  # noqa: E402
from dsa_jax.training.state import init_params, model_graph  # noqa: E402

STEPS = {'prefill': 1, 'decode': 12}  # Steps of a turn.
TURNS = {'prefill': 4, 'decode': 6}
KINDS = {'prefill': ('dense', 'sparse'), 'decode': ('dense', 'sparse', 'indexer')}
FIRST = 4096  # Tokens of the shortest context.
LONGEST = {'small': 65_536, 'chip': 131_072}
CHUNK = {'small': 512, 'chip': 2048}
SMALL = {
    'vocab_size': 1024, 'dim': 256, 'n_layers': 2, 'n_dense_layers': 2, 'inter_dim': 512, 'n_heads': 16,
    'index_n_heads': 4, 'index_head_dim': 32, 'index_topk': 512, 'dtype': 'float32',
}  # fmt: skip
LARGE = {
    'vocab_size': 1024, 'dim': 4096, 'n_layers': 4, 'n_dense_layers': 4, 'inter_dim': 12_288,
    'n_heads': 32, 'index_n_heads': 16, 'index_head_dim': 64, 'index_topk': 2048, 'dtype': 'bfloat16',
}  # fmt: skip
SIZES = {  # By model and kind of attention.
    ('small', 'mla'): SMALL | {
        'q_lora_rank': 128, 'kv_lora_rank': 128, 'qk_nope_head_dim': 32, 'qk_rope_head_dim': 32, 'v_head_dim': 32,
    },
    ('small', 'gqa'): SMALL | {
        'n_kv_heads': 4, 'qk_nope_head_dim': 0, 'qk_rope_head_dim': 32, 'v_head_dim': 32,
    },
    # The attention of DeepSeek-V3.2, in four layers with MLPs.
    ('chip', 'mla'): dataclasses.asdict(RELEASED['v32']) | {
        'rope_type': 'default',
        **{name: LARGE[name] for name in ('vocab_size', 'n_layers', 'n_dense_layers', 'dtype')},
    },
    # Four layers of Qwen3-8B's sizes.
    ('chip', 'gqa'): LARGE | {
        'n_kv_heads': 8, 'qk_nope_head_dim': 0, 'qk_rope_head_dim': 128, 'v_head_dim': 128,
    },
}  # fmt: skip


class Case(NamedTuple):
  """What is measured."""

  model: str  # A name in SIZES.
  attention: str
  contexts: list[int]
  batch: int  # Texts that are read side by side.
  mesh: Mesh | None

  @property
  def cfg(self) -> ModelConfig:
    sizes = SIZES[self.model, self.attention]
    if self.attention == 'gqa':
      sizes = sizes | {'attention': 'gqa', 'q_lora_rank': 0, 'kv_lora_rank': 0, 'index_rope_head_dim': 32}
    longest = max(self.contexts)
    return ModelConfig(**sizes | {'max_seq_len': longest, 'original_seq_len': longest})

  @property
  def widths(self) -> dict[str, int]:
    """The tokens of each text that a step of a phase reads."""
    return {'prefill': CHUNK[self.model], 'decode': 1}


def this_chip() -> Chip:
  """Returns the peaks of this machine: those of its chip or, if it is in no table, those that it reaches."""
  kind = jax.devices()[0].device_kind
  if device := device_of_kind(kind):
    return Chip(name=kind, bf16=device.bf16, fp8=device.fp8, bandwidth=device.bandwidth, memory=device.memory)
  a = jnp.ones((2048, 2048))
  product = fastest(jax.jit(lambda a: a @ a), a, runs=5)
  b = jnp.ones(2**26)
  copy = fastest(jax.jit(lambda b: b + 1), b, runs=5)
  flops = 2 * 2048**3 / product
  return Chip(name='here', bf16=flops, fp8=flops, bandwidth=2 * b.nbytes / copy, memory=0)


def fastest(f, *arguments, runs: int) -> float:
  jax.block_until_ready(f(*arguments))
  seconds = []
  for _ in range(runs):
    began = time.perf_counter()
    jax.block_until_ready(f(*arguments))
    seconds.append(time.perf_counter() - began)
  return min(seconds)


def measure(case: Case) -> dict[str, dict[str, list[float]]]:
  """Returns seconds per token at each context, by phase and by kind."""
  engines = make_engines(case)
  per_token = {phase: {kind: [] for kind in kinds} for phase, kinds in KINDS.items()}
  for context in case.contexts:
    cache = full_cache(engines['sparse'], case, context)
    for phase, width in case.widths.items():
      programs = make_programs(engines, case, width, context)
      seconds = {kind: [] for kind in KINDS[phase]}
      for _ in range(TURNS[phase] + 1):  # By turns, so that all see the same machine.
        for kind, of_turns in seconds.items():
          length = np.full(case.batch, context - width * STEPS[phase], np.int32)
          cache = cache._replace(length=jax.device_put(length, cache.length.sharding))
          cache, of_turn = take_turn(programs[kind], cache, STEPS[phase])
          of_turns.append(of_turn / width / case.batch)
      for kind, (_, *of_turns) in seconds.items():
        per_token[phase][kind].append(min(of_turns))
      row = {kind: per_token[phase][kind][-1] for kind in seconds}
      times = ', '.join(f'{kind} {1e3 * s:.3f} ms' for kind, s in row.items())
      print(f'{case.attention}, {phase} at {context:,}: {times}', flush=True)
  return per_token


def take_turn(program: Callable, cache: Cache, n_steps: int) -> tuple[Cache, float]:
  """Runs steps one after another; returns the last cache, and the median seconds of a step."""
  seconds = []
  for _ in range(n_steps):
    began = time.perf_counter()
    out, cache = program(cache)
    jax.block_until_ready((out, cache))
    seconds.append(time.perf_counter() - began)
  return cache, float(np.median(seconds))


def make_engines(case: Case) -> dict[str, Engine]:
  """Returns what reads densely and what reads sparsely, with the same weights."""
  cfg = case.cfg
  cast = lambda x: x.astype(cfg.dtype) if x.ndim > 1 else x
  params = jax.tree.map(cast, init_params(cfg, seed=0, mesh=case.mesh))
  model = nnx.merge(model_graph(cfg), params)
  make = functools.partial(
      make_engine, model, rule='indexer', cache=cfg.dtype, chunk=CHUNK[case.model], backend='',
      drafts=False, mesh=case.mesh,
  )  # fmt: skip
  return {kind: make(attention=kind) for kind in ('dense', 'sparse')}


def full_cache(engine: Engine, case: Case, capacity: int) -> Cache:
  """Returns a cache with random rows that holds just the context."""
  cache = engine.empty_cache(case.batch, capacity)

  def fill(x):
    draw = lambda: jax.random.normal(jax.random.key(0, impl='rbg'), x.shape, x.dtype)
    return jax.jit(draw, out_shardings=x.sharding)()

  return cache._replace(**jax.tree.map(fill, {'kv': cache.kv, 'index_key': cache.index_key}))


def make_programs(
    engines: dict[str, Engine], case: Case, width: int, capacity: int
) -> dict[str, Callable]:
  """Returns the step of each kind, which turns a cache into its output and the next cache."""
  tokens = np.ones((case.batch, width), np.int32)
  n_new, logits = np.full(case.batch, width, np.int32), engines['dense'].empty_logits(case.batch)

  def step(cache, engine):
    visible = engine.visible(capacity - width, width, capacity)
    return read_chunk(
        engine.weights, cache, tokens, n_new, logits, reader=engine.reader, visible=visible
    )

  programs = {kind: functools.partial(step, engine=engine) for kind, engine in engines.items()}
  return programs | {'indexer': make_indexer(engines['sparse'], case)}


def make_indexer(engine: Engine, case: Case) -> Callable:
  """Returns what scores and selects for one token of each text, in every layer."""
  cfg, (backend, shares) = engine.cfg, (engine.reader.backend, engine.reader.shares)
  heads = case.batch, 1, cfg.index_n_heads
  q = jax.random.normal(jax.random.key(0), (*heads, cfg.index_head_dim), cfg.dtype)
  index = IndexInputs(q, q[:, :, 0], jax.random.normal(jax.random.key(1), heads))

  def select(cache, index, shared):
    end, capacity = (cache.length + 1)[:, None], cache.capacity(cfg)
    layer = lambda first: select_by_scores(
        index, cache.index_key, (first, capacity), end, cfg, backend, shared
    )
    return jax.lax.map(layer, capacity * jnp.arange(cfg.n_layers))

  run = functools.partial(select, shared=TOKENS)
  if shares is not None:
    run = functools.partial(select, shared=shares.shared(case.batch))
    spec = lambda cache, index: shares.specs((cache, index), case.batch)
    out = P(None, shares.sequences(case.batch) or None)
    whole = run
    run = lambda *args: shares.run(whole, spec(*args), out)(*args)
  program = jax.jit(run)
  return lambda cache: (program(cache, index), cache)


def predict(case: Case, chip: Chip) -> dict[str, dict[str, list[float]]]:
  """Returns the seconds per token of all devices at their peaks, by phase and by kind."""
  cfg, width = case.cfg, jnp.dtype(case.cfg.dtype).itemsize
  simulated = jax.default_backend() == 'cpu'
  n_devices = 1 if simulated or case.mesh is None else case.mesh.size

  def seconds_of(work: Work) -> float:
    of_weights = work.kind == 'weights' and work.unit == 'fp8'  # They count as bytes, others as two.
    is_float32 = work.part == 'selection'  # Scores are, whatever the dtype of the model.
    n_bytes = work.bytes * (1 if is_float32 else width if of_weights else width / 2)
    return max(work.flops / chip.bf16, n_bytes / chip.bandwidth) / n_devices

  def seconds(context, phase, kind):
    n = case.widths[phase]
    forms = {'decode': ('mqa',), 'prefill': ('mha', 'mqa') if kind == 'sparse' else ('mha',)}
    of_forms = []
    for form in forms[phase]:
      works = token_work(
          cfg, context, sparse=kind != 'dense', form=form, cache='bf16', readers=n,
          pass_tokens=case.batch * n, logits=phase == 'decode',
      )  # fmt: skip
      names = ('index scores', 'selection') if kind == 'indexer' else {work.part for work in works}
      of_forms.append(sum(seconds_of(work) for work in works if work.part in names))
    return min(of_forms)

  return {p: {k: [seconds(c, p, k) for c in case.contexts] for k in kinds} for p, kinds in KINDS.items()}


def slope(contexts: list[int], seconds: list[float]) -> float:
  """Returns the seconds per token that each further token of context adds, by least squares."""
  x, y = np.array(contexts, float), np.array(seconds)
  design = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
  return float(np.linalg.lstsq(design, np.ones_like(y), rcond=None)[0][1])


def table(report: dict) -> str:
  measured, predicted, contexts = (report[k] for k in ('measured', 'predicted', 'contexts'))
  columns = [(phase, kind) for phase, kinds in KINDS.items() for kind in kinds]
  names = [f'{phase} {kind}, ms' for phase, kind in columns]
  names += [f'{phase}, times cheaper' for phase in KINDS]
  axes = [f'{axis}={n}' for axis, n in report['mesh'].items() if n > 1]
  devices = ' simulated devices, which share its cores,' if report['simulated'] else ' devices'
  devices = f"{report['devices']}{devices} on the mesh {', '.join(axes)}" if axes else 'one device'
  lines = [
      f"{report['machine']}; {devices}; {report['model']['attention']};"
      f" {report['gflops']:.0f} GFLOP/s in a product, {report['gbytes']:.1f} GB/s in a copy.",
      '',
      f"| context | {' | '.join(names)} |",
      '| ---: |' + ' ---: |' * len(names),
  ]  # fmt: skip
  for i, context in enumerate(contexts):
    cells = [f'{1e3 * measured[p][k][i]:.3g}' for p, k in columns]
    cells += [f"{measured[p]['dense'][i] / measured[p]['sparse'][i]:.2f}" for p in KINDS]
    lines.append(f"| {context:,} | {' | '.join(cells)} |")
  lines += [
      '',
      '| | measured, from first to last | µs per token and 1K of context: measured'
      ' | at peak speed | share of peak |',
      '| --- | ---: | ---: | ---: | ---: |',
  ]
  for phase, kind in columns:
    values, peak = measured[phase][kind], predicted[phase][kind]
    slope_here, slope_at_peak = (1e9 * slope(contexts, v) for v in (values, peak))
    lines.append(
        f'| {phase}, {kind} | {values[-1] / values[0]:.2f} x | {slope_here:.3g}'
        f' | {slope_at_peak:.3g} | {slope_at_peak / slope_here:.0%} |'
    )
  if len(contexts) > 1:
    lines += ['', residual(measured['decode'])]
  return '\n'.join(lines) + '\n'


def residual(decode: dict[str, list[float]]) -> str:
  """Returns a sentence on the indexer's share of the growth of a sparse token's time."""
  sparse, indexer = (1e3 * (decode[kind][-1] - decode[kind][0]) for kind in ('sparse', 'indexer'))
  share = f', {indexer / sparse:.0%} of it' if sparse > 0 else ''
  return (
      f'From the first context to the last a sparse decoded token takes {sparse:.2f} ms more;'
      f' scoring and selecting, run by themselves, take {indexer:.2f} ms more{share}.'
  )


def plot(report: dict, path: pathlib.Path):
  figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
  colors = {'dense': 'C1', 'sparse': 'C0', 'indexer': 'C2'}
  for panel, (phase, kinds) in zip(panels, KINDS.items()):
    for kind in kinds:
      measured, peak = (1e3 * np.array(report[x][phase][kind]) for x in ('measured', 'predicted'))
      panel.plot(report['contexts'], measured, 'o-', color=colors[kind], label=f'{kind}, measured')
      panel.plot(report['contexts'], peak, ':', color=colors[kind], label=f'{kind}, at peak speed')
    panel.set(xscale='log', yscale='log', title=phase)
    panel.set(xlabel='tokens of context', ylabel='ms per token')
    panel.set_xticks(report['contexts'], [f'{c // 1024}K' for c in report['contexts']])
    panel.set_xticks([], minor=True)
    panel.set_ylim(top=10 * panel.get_ylim()[1])  # Room for the legend.
    panel.legend(frameon=False, ncols=2, loc='upper left')
  figure.savefig(path, dpi=120)


def main():
  options = read_options()
  mesh_sizes = MeshConfig(**{axis: getattr(options, f'mesh.{axis}') for axis in MESH_AXES})
  if mesh_sizes.n_devices > 1:
    jax.config.update('jax_num_cpu_devices', mesh_sizes.n_devices)  # Other platforms have their own.
  contexts = [c for c in (2**n for n in range(12, 30)) if c <= (options.longest or LONGEST[options.model])]
  check_texts(mesh_sizes, '--batch', options.batch)
  cases = [Case(options.model, kind, contexts, options.batch, None) for kind in options.attention]
  for case in cases:  # Nothing is measured where one does not fit.
    check_mesh(mesh_sizes, case.cfg, capacity=FIRST)
  mesh = make_mesh(**mesh_sizes.sizes) if mesh_sizes.n_devices > 1 else None
  options.out.mkdir(parents=True, exist_ok=True)
  chip = this_chip()
  for i, case in enumerate(cases):
    report = measured_report(case._replace(mesh=mesh), mesh_sizes, chip)
    path = options.out / (options.name + f'_{case.attention}' * bool(i))
    path.with_suffix('.json').write_text(json.dumps(report, indent=2) + '\n')
    path.with_suffix('.md').write_text(table(report))
    plot(report, path.with_suffix('.png'))
    print(table(report))


def read_options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  kinds = sorted({kind for _, kind in SIZES})
  parser.add_argument('--model', choices=LONGEST, default='small', help='chip: four layers of large models')
  parser.add_argument('--attention', default='mla', help=f'separated by commas: {", ".join(kinds)}')
  parser.add_argument('--longest', type=int, help=f'tokens of context; default: {LONGEST}')
  parser.add_argument('--batch', type=int, default=1, help='texts that are read side by side')
  for axis in MESH_AXES:
    parser.add_argument(f'--mesh.{axis}', type=int, default=1, help='devices along this axis')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path(__file__).parent)
  parser.add_argument('--name', default='measured', help='of the files')
  options = parser.parse_args()
  options.attention = options.attention.split(',')
  if wrong := [kind for kind in options.attention if kind not in kinds]:
    parser.error(f'--attention={wrong} must be of {kinds}.')
  if options.longest is not None and options.longest < FIRST:
    parser.error(f'--longest {options.longest} must be at least {FIRST}.')
  if options.batch < 1:
    parser.error(f'--batch {options.batch} must be at least 1.')
  return options


def measured_report(case: Case, mesh: MeshConfig, chip: Chip) -> dict:
  simulated = jax.default_backend() == 'cpu' and mesh.n_devices > 1
  return {
      'machine': ', '.join(
          [jax.devices()[0].device_kind, platform.processor() or platform.machine(),
           f'jax {jax.__version__}']
      ),
      'devices': mesh.n_devices,
      'simulated': simulated,
      'mesh': mesh.sizes,
      'model': dataclasses.asdict(case.cfg),
      'batch': case.batch,
      'chunk': CHUNK[case.model],
      'gflops': chip.bf16 / 1e9,
      'gbytes': chip.bandwidth / 1e9,
      'contexts': case.contexts,
      'measured': measure(case),
      'predicted': predict(case, chip),
  }  # fmt: skip


if __name__ == '__main__':
  try:
    main()
  except ConfigError as error:
    sys.exit(f'error: {error}')
