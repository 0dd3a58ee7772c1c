# SPDX-License-Identifier: Apache-2.0
"""Prints what the adapter of lm-evaluation-harness answers on a mesh, and on one device.

Run by test_evaluation_meshes.py in a process of its own, which has eight devices.
"""

import json
import sys

from dsa_jax.evaluation.harness import Harness
from dsa_jax.parallel.mesh import MeshConfig

PAIRS = [('the cat', ' sat'), ('', 'a'), ('x ', 'yz'), ('a long context of thirty letters', ' and more')]


def main(checkpoint: str):
  meshes = MeshConfig(expert=2, context=3), MeshConfig(tensor=2, fsdp=2), MeshConfig()
  answers = {'likelihoods': [], 'rolling': [], 'continuations': []}
  for mesh in meshes:
    harness = Harness(checkpoint, batch_size=4, mesh=mesh, rule='random', index_topk=8)
    answers['likelihoods'].append([x for x, _ in harness.likelihoods(PAIRS)])
    answers['rolling'].append(harness.rolling(['hello there', 'abcdefgh' * 9]))
    answers['continuations'].append(harness.continuations([('the cat', {'max_gen_toks': 8})]))
  print(json.dumps(answers))


if __name__ == '__main__':
  main(sys.argv[1])
