#!/usr/bin/env bash
# orbax-checkpoint 0.12.8, jax 0.10.2, 2026-11-30: a tree that holds one array under the key 'a.b' and
# another under 'a', then 'b'. One would expect both to come back, or a refusal to save. orbax joins the
# keys of a path by dots and stores both arrays under the same name, so that one of them is lost without
# a word, and both paths have the same numbers when they are read. (Where their shapes differ, saving
# fails with an error of TensorStore about a shape.)
#
# Seen, saved {'a.b': [0, 1, 2, 3], 'a': {'b': [1, 1, 1, 1]}}:
#   StandardCheckpointer: both are restored as one array
#   PyTreeCheckpointHandler(use_ocdbt=False): the same
# Trees that mix flat names of released weights ('layers.0.wq') with nested ones are where it can happen.
#
# Here: no name of a parameter has a dot.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'orbax-checkpoint==0.12.8' 'jax==0.10.2' 'jaxlib==0.10.2'
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import pathlib

import jax.numpy as jnp
import orbax.checkpoint as ocp

folder = pathlib.Path.cwd()
tree = {'a.b': jnp.arange(4.0), 'a': {'b': jnp.ones(4)}}


def report(name, restored):
  flat, nested = restored['a.b'].tolist(), restored['a']['b'].tolist()
  print(f"{name}: saved {tree['a.b'].tolist()} and {tree['a']['b'].tolist()}, restored {flat} and {nested}")
  assert flat == nested and flat in ([0, 1, 2, 3], [1, 1, 1, 1])


with ocp.StandardCheckpointer() as checkpointer:
  checkpointer.save(folder / 'standard', tree)
  checkpointer.wait_until_finished()
  report('StandardCheckpointer', checkpointer.restore(folder / 'standard'))
with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
  checkpointer.save(folder / 'files', args=ocp.args.PyTreeSave(tree))
  report('one file for each array', checkpointer.restore(folder / 'files'))
PYTHON
