# SPDX-License-Identifier: Apache-2.0
"""Samplers on meshes of eight simulated devices: prints how far each is from one device.

Run by test_sampler_meshes.py in a process of its own, which has the devices. `--few` takes some cases.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import laws
import numpy as np

from dsa_jax.compile.hlo import collectives, total_bytes
from dsa_jax.inference.load import load_checkpoint
from dsa_jax.inference.programs import logits_of, make_engine, of_texts, read_hidden
from dsa_jax.inference.sampler import SampleConfig, Sampler
from dsa_jax.inference.slots import filled_slots, write
from dsa_jax.kernels.block_scaled import BlockScaled
from dsa_jax.kernels import index_scores
from dsa_jax.kernels.select_topk import select_topk
from dsa_jax.parallel.mesh import make_mesh
from dsa_jax.selection import RULES, Candidates
from dsa_jax.training import checkpoint
from dsa_jax.training.state import new_state

CFG = dataclasses.replace(laws.CFG, n_heads=4, vocab_size=40, n_mtp_layers=1)
GQA = dataclasses.replace(laws.GQA, n_heads=8, vocab_size=40)
GQA_EACH = dataclasses.replace(laws.GQA_EACH, n_heads=8, vocab_size=40)
SHARING = dataclasses.replace(CFG, indexer_types=('full', 'shared'))
SINKS = dataclasses.replace(laws.SINKS, n_heads=4, vocab_size=40)
WINDOWED = dataclasses.replace(laws.WINDOWED, n_heads=4, vocab_size=40)
READING = dataclasses.replace(laws.READING, n_heads=4)
SHORT = dataclasses.replace(CFG, index_topk=12)  # The first piece attends under a mask.
SHORTER = dataclasses.replace(GQA_EACH, index_topk=20)  # It selects all.
FP8 = dataclasses.replace(CFG, index_head_dim=16)
GQA_FP8 = dataclasses.replace(GQA, index_head_dim=16, v_head_dim=10)

MIXED = {'fsdp': 2, 'context': 2, 'tensor': 2}
DATA = {'fsdp': 2, 'expert': 2, 'context': 2}
OWNERS = {'expert': 2, 'tensor': 2, 'context': 2}
EVERY = {'fsdp': 4}, {'context': 8}, {'expert': 4}, {'tensor': 4}, MIXED, DATA, OWNERS
BOTH = 'sparse', 'dense'
READ = [  # Mesh, model, attention, texts, format of the cache; and the rule, if it is not the indexer.
    *((sizes, CFG, attention, 4, 'float32') for sizes in EVERY for attention in BOTH),
    (OWNERS, CFG, 'masked', 2, 'float32'),
    (MIXED, WINDOWED, 'sparse', 2, 'float32'),
    (MIXED, SHARING, 'sparse', 1, 'float32'),
    (MIXED, READING, 'sparse', 2, 'float32'),
    (OWNERS, SINKS, 'sparse', 2, 'float32'),
    (OWNERS, GQA, 'dense', 2, 'float32'),
    ({'tensor': 8}, GQA, 'sparse', 1, 'float32'),  # Four devices share each of two key heads.
    (MIXED, GQA_FP8, 'sparse', 2, 'fp8'),
    ({'context': 4}, FP8, 'sparse', 2, 'fp8'),
    (MIXED, SHORT, 'sparse', 2, 'float32'),
    (OWNERS, SHORTER, 'sparse', 2, 'float32'),
    (DATA, WINDOWED, 'sparse', 1, 'float32'),
    (OWNERS, CFG, 'sparse', 2, 'float32', 'oracle'),
    ({'tensor': 8}, GQA, 'masked', 1, 'float32', 'oracle'),
    (MIXED, GQA_FP8, 'sparse', 2, 'fp8', 'oracle'),
    (DATA, CFG, 'sparse', 4, 'float32', 'random'),
    (DATA, SHARING, 'sparse', 1, 'float32', 'random'),
    (OWNERS, WINDOWED, 'sparse', 2, 'float32', 'window_sinks'),
    (MIXED, GQA_EACH, 'sparse', 2, 'float32'),
    (MIXED, GQA_EACH, 'sparse', 2, 'float32', 'mine'),
]  # fmt: skip
STEPS = ('sparse', 'indexer'), ('dense', 'indexer'), ('sparse', 'window_sinks')
WRITTEN = [(DATA, False, 'random')]
WRITTEN += [(sizes, drafts, 'indexer') for sizes in (MIXED, DATA, OWNERS) for drafts in (True, False)]
LENGTHS = (26, 3, 26, 21)
PIECES = {'all': (0, 15, 19, 20, 26), 'few': (0, 16, 20)}  # Of many tokens, few, and one.
CAPACITY = 32


def mine(c: Candidates):
  """A rule that looks at everything: index keys, the keys and queries of all heads, and rows."""
  scores = index_scores(c.index_q, c.index_k, c.index_weights)
  scores += jnp.einsum('BTHE,BSGE,H->BTS', c.q, c.k, 1.0 + jnp.arange(c.q.shape[2]))
  row = jnp.arange(len(c.start)) if c.row is None else c.row
  scores *= jnp.where(row % 2, 1, -1)[:, None, None]
  return select_topk(scores, c.start, c.end, topk=c.topk)


RULES['mine'] = mine


def model_of(cfg):
  return laws.model_of(laws.weights(cfg), cfg)


@functools.partial(jax.jit, static_argnames=('reader', 'visible'))
def read_piece(weights, cache, tokens, n_new, *, reader, visible):
  """The logits and selections of all tokens, and the cache."""

  def run(weights, cache, tokens, n_new, reader):
    model, reading = read_hidden(weights, cache, tokens, n_new, reader=reader, visible=visible)
    return logits_of(model, reading.hidden, reader), reading.selected, reading.cache

  args = cache, tokens, n_new
  if (shares := reader.shares) is None:
    return run(weights, *args, reader)
  n = len(tokens)
  here = functools.partial(run, reader=of_texts(reader, n))
  specs, texts = shares.specs(args, n), shares.sequences(n) or None
  out_specs = jax.P(texts), jax.P(None, texts), specs[0]
  return shares.run(here, (list(shares.weights), *specs), out_specs)(weights, *args)


@functools.cache
def read(pieces: str, cfg, attention: str, texts: int, fmt: str, rule: str, mesh=None):
  """The logits and selections of a text that is read piece by piece."""
  engine = make_engine(
      model_of(cfg), attention=attention, rule=rule, cache=fmt, chunk=8, backend='xla',
      drafts=False, mesh=mesh,
  )  # fmt: skip
  tokens = np.random.default_rng(0).integers(cfg.vocab_size, size=(texts, 26)).astype(np.int32)
  cache, logits, selected = engine.empty_cache(texts, CAPACITY), [], []
  for first, last in itertools.pairwise(PIECES[pieces]):
    width = last - first
    n_new = np.clip(np.array(LENGTHS[:texts]) - first, 0, width).astype(np.int32)
    *new, cache = read_piece(
        engine.weights, cache, tokens[:, first:last], n_new,
        reader=engine.reader, visible=engine.visible(first, width, CAPACITY),
    )  # fmt: skip
    counted = np.arange(width) < n_new[:, None]
    logits.append(np.where(counted[..., None], new[0], 0))
    of_layers = counted[None, ..., *[None] * (new[1].ndim - 3)]
    selected.append(np.where(of_layers, new[1], -2))
  return np.concatenate(logits, 1), np.concatenate(selected, 2)


def written(drafts: bool, rule: str, mesh=None, model=None):
  """What a running batch writes, in how many steps, and how much of each prompt it has not read again."""
  sampler = Sampler(model or model_of(CFG), chunk=16, drafts=drafts, rule=rule, mesh=mesh)
  long = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 7] * 3
  prompts = [long, [2, 7], [9] * 12, [*long, 1]]
  config = SampleConfig(max_new_tokens=6, temperature=1.0)
  completions = sampler.complete(prompts, config, slots=4)
  return sorted((x.prompt, x.ids, x.steps, x.reused_tokens) for x in completions)


def step_bytes(capacity: int, attention: str, rule: str) -> tuple[dict[str, int], int]:
  """What a step of decoding says to the devices that share positions; and the size of the cache."""
  cfg = dataclasses.replace(CFG, max_seq_len=4096, n_mtp_layers=0)
  mesh = make_mesh(context=8)
  engine = make_engine(
      model_of(cfg), attention=attention, rule=rule, cache='', chunk=8, backend='xla',
      drafts=False, mesh=mesh,
  )  # fmt: skip
  cache = engine.empty_cache(2, capacity)
  size = sum(x.nbytes for x in jax.tree.leaves((cache.kv, cache.index_key)))
  slots = filled_slots(cache, engine.empty_logits(2), np.uint32(0), 5, shares=engine.reader.shares)
  step = write.lower(
      engine.weights, slots, np.ones(2, bool), np.float32(0), np.float32(1), np.full(8, -1, np.int32),
      top_k=0, reader=engine.reader,
  )  # fmt: skip
  return total_bytes(collectives(step.compile().as_text(), dict(mesh.shape))), size


def loading() -> dict[str, bool]:
  """Whether each shard is read once, for all devices that hold it, and nothing else is read."""
  reads = []

  class Counted:
    def __init__(self, name, stored):
      self.name, self.stored = name, stored
      self.shape, self.has_codes = stored.shape, stored.has_codes

    def share(self, part):
      share = self.stored.share(part)
      reads.append((self.name, part, share.shape))
      return share

  opened = checkpoint.open_tree
  counted = lambda folder: {name: Counted(name, stored) for name, stored in opened(folder).items()}
  with saved() as folder, mock.patch.object(checkpoint, 'open_tree', counted):
    model = load_checkpoint(folder, mesh=make_mesh(**OWNERS))
  weights = jax.tree.leaves(model)
  wanted = sorted(x.addressable_shards[0].data.shape for x in weights for _ in range(n_shards(x)))
  return {
      'once': len({(name, str(index)) for name, index, _ in reads}) == len(reads),
      'shards': sorted(shape for *_, shape in reads) == wanted,
  }


@contextlib.contextmanager
def saved():
  """A checkpoint of the model."""
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    state = new_state(laws.weights(CFG), ('backbone',), laws.OPTIM, seed=0)
    with checkpoint.Checkpoints(folder / 'checkpoints' / 'sparse') as checkpoints:
      checkpoints.save(1, state, checkpoint.Progress({}, 0.0))
    (folder / 'config.json').write_text(json.dumps({'model': dataclasses.asdict(CFG)}))
    yield folder / 'checkpoints' / 'sparse'


def narrow(sizes) -> bool:
  """Whether a mesh that keeps weights in FP8 writes what one device does with what they stand for."""
  is_scaled = lambda x: isinstance(x, BlockScaled)
  widened = lambda x: np.asarray(x.astype('float32') if is_scaled(x) else x)
  mesh = make_mesh(**sizes)
  with saved() as folder:
    model = load_checkpoint(folder, mesh=mesh, dtype='fp8')
  wide = jax.tree.map(lambda x: jax.numpy.asarray(widened(x)), model, is_leaf=is_scaled)
  return written(False, 'indexer', mesh, model) == written(False, 'indexer', None, wide)


def n_shards(x: jax.Array) -> int:
  return x.size // x.addressable_shards[0].data.size


def main(few: bool, part: int, n_parts: int):
  """Runs one part of n of the cases."""
  print_row(case='loading', same=all(loading().values()))
  for case in STEPS[:1] if few else STEPS[part::n_parts]:
    (short, size), (long, _) = (step_bytes(n, *case) for n in (512, 4096))
    print_row(case=f'bytes, {case}', short=short, long=long, size=size)
  for sizes, cfg, attention, texts, fmt, *rule in READ[-1:] if few else READ[part::n_parts]:
    case = 'few' if few else 'all', cfg, attention, texts, fmt, *(rule or ['indexer'])
    wanted, (logits, selected) = read(*case), read(*case, make_mesh(**sizes))
    print_row(
        case=f'{attention} {sizes} {cfg.attention} {texts} {fmt} {rule}',
        logits=float(np.abs(logits - wanted[0]).max()), same=np.array_equal(selected, wanted[1]),
    )  # fmt: skip
  for sizes, *case in WRITTEN[-1:] if few else WRITTEN[part::n_parts]:
    same = written(*case, make_mesh(**sizes)) == written(*case)
    print_row(case=f'written {sizes} {case}', same=same)
  if part == n_parts - 1 > 0:
    for sizes in MIXED, OWNERS:
      print_row(case=f'weights in FP8, {sizes}', same=narrow(sizes))


def print_row(**row):
  print(json.dumps(row), flush=True)


if __name__ == '__main__':
  jax.config.update('jax_disable_most_optimizations', True)
  few = '--few' in sys.argv
  main(few, *(0, 1) if few else map(int, sys.argv[1:]))
