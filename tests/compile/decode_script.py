# SPDX-License-Identifier: Apache-2.0
"""Compiles a step that decodes on a TPU, and prints its temporaries and the bytes of the cache.

Run by test_decode.py in a process of its own, with the environment of the compiler.
"""

import json

from flax import nnx
import jax
import jax.numpy as jnp

from dsa_jax.compile.chips import make_mesh
from dsa_jax.config import ModelConfig
from dsa_jax.inference.cache import init_cache
from dsa_jax.inference.programs import make_reader, read_chunk
from dsa_jax.training.state import abstract_params, model_graph

CFG = ModelConfig(
    vocab_size=512, dim=512, n_layers=4, n_dense_layers=4, inter_dim=512, n_heads=16, q_lora_rank=256,
    index_n_heads=8, index_topk=256, n_routed_experts=0, max_seq_len=32_768, original_seq_len=32_768,
)  # fmt: skip


def main():
  mesh, batch = make_mesh('v5p'), 2
  place = jax.NamedSharding(mesh, jax.P())
  put = lambda tree: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
  )
  model = nnx.merge(model_graph(CFG), abstract_params(CFG, dtype='bfloat16'))
  weights, structure = jax.tree.flatten((model, None))
  reader = make_reader(structure, 'sparse', 'tpu', 'indexer', False, None)
  cache = jax.eval_shape(lambda: init_cache(CFG, batch, CFG.max_seq_len, whole_lines=True))
  shapes = ((batch, 1), jnp.int32), ((batch,), jnp.int32), ((batch, CFG.vocab_size), jnp.float32)
  arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  with jax.set_mesh(mesh):
    lowered = read_chunk.lower(put(weights), *put((cache, *arrays)), reader=reader, visible=0)
  temporaries = lowered.compile().memory_analysis().temp_size_in_bytes
  print(json.dumps({'temporaries': temporaries, 'rows': cache.kv.rows.size * 2}))


if __name__ == '__main__':
  main()
