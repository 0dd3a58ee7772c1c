# SPDX-License-Identifier: Apache-2.0
"""A whole layer of DeepSeek-V3.2, its 256 experts included, and what a roofline says of its parts."""

from collections.abc import Callable
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from dsa_jax.chips import Device
from dsa_jax.compile.cases import BF16, Dims, Op, int32, shape
from dsa_jax.cost.layer import layer_parts
from dsa_jax.families import SIZES
from dsa_jax.nn.attention.types import Mode
from dsa_jax.nn.block import Block
from dsa_jax.training.stages import PARTS, STAGES

CFG = SIZES['v32']

def stage_layer(stage: str, backend: str) -> Callable:
  """Returns a function from weights, inputs and the output's gradient to the results of a layer.

  These are the output, the divergence, the load of the experts, and the gradients of what the stage
  trains: of the indexer in a warm-up, of everything and of the inputs in the sparse stage.
  """
  trains = STAGES[stage].trains
  mode = Mode(attention=STAGES[stage].attention[0], backend=backend, index_loss=True)
  kinds = nnx.filterlib.Any(*(PARTS[part] for part in trains))

  def layer(params, x, start, end, dx):
    graph, _ = _graph_and_weights()
    learning, rest = nnx.split_state(params, kinds, ...)

    def forward(learning, x):
      block = nnx.merge(graph, nnx.merge_state(learning, rest))
      out, _, report = block(x, start, end, jax.random.key(0), mode)
      return (out, jnp.sum(report.index_kl)), report.expert_load

    if 'backbone' in trains:
      results, vjp, load = jax.vjp(forward, learning, x, has_aux=True)
    else:
      results, vjp, load = jax.vjp(lambda learning: forward(learning, x), learning, has_aux=True)
    return results, load, vjp((dx, jnp.float32(1)))

  return layer


def layer_shapes(dims: Dims):
  _, params = _graph_and_weights()
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, BF16), params)
  x, rows = shape(dims.n_keys, CFG.dim), int32(dims.n_keys)
  return params, x, rows, rows, x


def roofline(stage: str, n_tokens: int, device: Device) -> dict[str, dict[str, float]]:
  """Returns FLOPs, bytes and milliseconds of each part; arithmetic or memory bounds each of them."""
  parts = {}
  for part in layer_parts(CFG, STAGES[stage].trains, n_tokens):
    seconds = max(part.flops / device.bf16, part.bytes / device.bandwidth)
    parts[part.part] = {'tflop': part.flops / 1e12, 'gib': part.bytes / 2**30, 'ms': 1e3 * seconds}
  return parts


def print_parts(row: dict):
  """Prints a line for each part of a layer, and their sums."""
  total = {key: sum(part[key] for part in row['parts'].values()) for key in ('tflop', 'gib', 'ms')}
  print(f'{row["op"]}, {row["model"]}, {row["S"]} tokens, {row["chip"]}: temporaries '
        f'{row["temporaries_mib"] / 1024:.1f} GiB.')  # fmt: skip
  print('| part | TFLOP | GiB | ms at the peaks |\n| --- |' + ' ---: |' * 3)
  for name, part in [*row['parts'].items(), ('all', total)]:
    print(f'| {name} | {part["tflop"]:.2f} | {part["gib"]:.2f} | {part["ms"]:.2f} |')


def stage_of(op: Op) -> str:
  return op.name.removeprefix('layer_')


def layer_op(stage: str, backend: str, chips: tuple[str, ...]) -> Op:
  """Returns the row of a stage's layer."""
  flops = lambda dims: sum(p.flops for p in layer_parts(CFG, STAGES[stage].trains, dims.n_keys))
  return Op(
      f'layer_{stage}',
      stage_layer(stage, backend),
      layer_shapes,
      lambda dims: flops(dims) / dims.n_keys,
      chips=chips,
      models=('v32',),
  )


@functools.cache
def _graph_and_weights():
  make = lambda: Block(CFG, experts=True, rngs=nnx.Rngs(0))
  return nnx.split(nnx.eval_shape(make))
