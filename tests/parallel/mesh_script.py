# SPDX-License-Identifier: Apache-2.0
"""One step, and one layer, on meshes of eight simulated devices: prints how far each is from one device.

Run by test_meshes.py in a process of its own, which has the devices. `--few` takes the last step, and
a mixed mesh for the layers.
"""

import dataclasses
import functools
import json
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import laws
import numpy as np

from dsa_jax.compile.hlo import collectives, total_bytes
from dsa_jax.nn.attention.types import Mode
from dsa_jax.parallel.mesh import BATCH as BATCH_SPEC, SEQUENCES, make_mesh, shardings_of
from dsa_jax.parallel.zigzag import zigzag
from dsa_jax.training import losses
from dsa_jax.training.stages import STAGES
from dsa_jax.training.state import model_graph, new_state
from dsa_jax.training.step import make_train_step

CFG = dataclasses.replace(laws.CFG, n_heads=4, vocab_size=40, n_mtp_layers=1)
# Two key heads: `tensor` of 2 divides them, and 4 of these devices share each of them.
GQA = dataclasses.replace(laws.GQA, n_heads=8, vocab_size=40)
GQA_EACH = dataclasses.replace(laws.GQA_EACH, n_heads=8, vocab_size=40)
SHARING = dataclasses.replace(CFG, indexer_types=('full', 'shared'))
GATED = dataclasses.replace(laws.GATED, n_heads=4, vocab_size=40)
SINKS = dataclasses.replace(laws.SINKS, n_heads=4, vocab_size=40)
UNLIKE = dataclasses.replace(
    laws.MIXED, n_heads=4, vocab_size=40, window_layers=(0, 3), sliding_window=7
)
TWO_SIZES = dataclasses.replace(laws.TWO_SIZES, n_heads=4, vocab_size=40)
READING = dataclasses.replace(laws.READING, n_heads=4)
BATCH = laws.make_batch(((17, 15), (21, 5), (32,), (3, 9, 14)), 32)  # Packed, uneven, padded.
losses.LOGITS_AT_ONCE = 256  # So every device goes over its rows in several chunks.
MIXED = {'fsdp': 2, 'context': 2, 'tensor': 2}
STEPS = [  # Stage, mesh, micro-batches, model, what is computed again (on one device: nothing).
    ('sparse', {'fsdp': 4}, 1, CFG, 'products'),
    ('sparse', {'context': 8}, 4, CFG, 'selection'),
    ('sparse', {'expert': 4}, 1, CFG, 'none'),
    ('sparse', {'tensor': 4}, 4, CFG, 'layer'),
    ('dense', {'expert': 4, 'tensor': 2}, 1, CFG, 'none'),
    ('warmup', {'tensor': 4, 'fsdp': 2}, 1, GQA, 'none'),
    ('sparse', {'fsdp': 2, 'expert': 2, 'tensor': 2}, 1, UNLIKE, 'layer'),
    ('warmup', {'tensor': 2, 'context': 4}, 1, TWO_SIZES, 'products'),
    ('sparse', MIXED, 1, TWO_SIZES, 'layer'),
    ('sparse', MIXED, 1, READING, 'layer'),
    ('warmup', {'tensor': 4, 'context': 2}, 1, GATED, 'products'),
    ('sparse', MIXED, 1, GATED, 'selection'),
    ('warmup', {'tensor': 2, 'context': 4}, 1, SINKS, 'products'),
    ('sparse', MIXED, 1, GQA_EACH, 'selection'),
    ('warmup', MIXED, 1, CFG, 'layer'),
    ('sparse', MIXED, 1, SINKS, 'selection'),
    ('sparse', {'fsdp': 2, 'expert': 2, 'context': 2}, 1, SHARING, 'selection'),
]


@functools.cache
def step(stage: str, mesh, micro_batches: int, cfg, remat: str = 'none'):
  """The state and metrics after one step."""
  trains = STAGES[stage].trains
  how = {'backend': 'xla', 'index_loss': 'indexer' in trains, 'remat': remat}
  mode = Mode(attention=STAGES[stage].attention[0], **how)
  state = new_state(laws.weights(cfg), trains, laws.OPTIM, seed=0, mesh=mesh)
  batch = jax.device_put(BATCH, jax.NamedSharding(mesh, jax.P(SEQUENCES))) if mesh else BATCH
  take = make_train_step(model_graph(cfg), trains, mode, laws.OPTIM, micro_batches=micro_batches)
  state, metrics = take(state, batch, dict.fromkeys(trains, 0.1))
  if mesh:  # Weights and moments stay where they were.
    jax.tree.map(lambda x, place: None if x.sharding.is_equivalent_to(place, x.ndim) else 1 / 0,
                 state, shardings_of(state, mesh))  # fmt: skip
  return jax.tree.map(np.asarray, (state, metrics))


def error(found, wanted) -> float:
  """The largest difference, against the largest number of each array."""
  differences = jax.tree.map(lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-9), found, wanted)
  return float(max(jax.tree.leaves(differences)))


def attend(attention: str, mesh):
  """One layer's output, selections and divergence, its tokens shared in zig-zag where there is a mesh."""
  n = mesh.shape['context'] * mesh.shape['tensor'] if mesh else 1
  turn = lambda x: zigzag(x, n)
  x = jax.random.normal(jax.random.key(1), (4, 32, CFG.dim))
  block = laws.model_of(laws.weights(CFG), CFG).block(0)
  mode = Mode(attention=attention, backend='xla', index_loss=True, zigzag=n > 1)
  run = jax.jit(lambda x, start, end: block.attn(x, start, end, jax.random.key(0), mode))
  out, selections, report = run(*map(turn, (x, BATCH.start, BATCH.end)))
  found = out, selections.get('indexer', 0), report.index_kl
  wanted_order = np.argsort(turn(jnp.arange(32)[None])[0])
  return [np.asarray(a)[:, wanted_order] for a in found if np.ndim(a) > 1]


def layer_bytes(stage: str, sizes: dict) -> dict[str, int]:
  """What a layer of the compiled program, forward and backward, says to the devices that share its tokens."""
  with jax.set_mesh(mesh := make_mesh(**sizes)):
    block = laws.model_of(laws.weights(CFG), CFG).block(0)
    mode = Mode(attention=STAGES[stage].attention[0], backend='xla', index_loss=True, zigzag=True)

    def loss(weights, x, start, end):
      attn = nnx.merge(graph, weights)
      out, _, report = attn(x, start, end, jax.random.key(0), mode)
      return out.sum() + report.index_kl.sum()

    graph, weights = nnx.split(block.attn)
    arrays = jnp.zeros((4, 32, CFG.dim)), BATCH.start, BATCH.end
    arrays = jax.device_put(arrays, jax.NamedSharding(mesh, BATCH_SPEC))
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    text = step.lower(weights, *arrays).compile().as_text()
  return total_bytes(collectives(text, dict(mesh.shape)))


def main(few: bool):
  for stage in ('sparse',) if few else ('warmup', 'sparse'):
    latent, index_key = CFG.kv_lora_rank + CFG.qk_rope_head_dim, CFG.index_head_dim
    arithmetic = 4 * 4 * 32 * (latent + index_key)
    print_row(case=f'bytes, {stage}', bytes=layer_bytes(stage, {'context': 8}), arithmetic=arithmetic)
  for stage, sizes, micro_batches, cfg, remat in STEPS[-1:] if few else STEPS:
    wanted = step(stage, None, micro_batches, cfg)
    with jax.set_mesh(mesh := make_mesh(**sizes)):
      found = step(stage, mesh, micro_batches, cfg, remat)
    keys = found[0].key, wanted[0].key
    print_row(
        case=f'{stage} {sizes} {remat}', state=error(found[0][:3], wanted[0][:3]),
        metrics=error(found[1], wanted[1]), same=bool((keys[0] == keys[1]).all()),
        nearly_cancels=bool(cfg.n_streams or cfg.query_log_scale),
    )
  for attention in ('dense', 'masked', 'sparse'):
    wanted = attend(attention, None)
    for sizes in (MIXED,) if few else ({'context': 4}, {'tensor': 4}, MIXED):
      with jax.set_mesh(mesh := make_mesh(**sizes)):
        found = attend(attention, mesh)
      same = attention == 'dense' or bool((found[1] == wanted[1]).all())  # The selection.
      print_row(case=f'layer {attention} {sizes}', layer=error(found, wanted), same=same)


def print_row(**row):
  print(json.dumps(row), flush=True)


if __name__ == '__main__':
  jax.config.update('jax_disable_most_optimizations', True)
  main(few='--few' in sys.argv)
