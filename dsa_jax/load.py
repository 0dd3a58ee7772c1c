# SPDX-License-Identifier: Apache-2.0
"""A trained model in one call, for notebooks."""

import json
import pathlib

from flax import nnx
from ml_collections import ConfigDict

from dsa_jax.checkpoint import restore_params
from dsa_jax.nn.transformer import Transformer
from dsa_jax.recipe import Recipe, read_recipe
from dsa_jax.state import abstract_params, model_graph


def load_model(workdir: str | pathlib.Path, entry: str) -> tuple[Transformer, Recipe]:
  """Returns the model as one entry of a finished recipe left it, and the recipe.

  Args:
    workdir: Of a run.
    entry: A name in its recipe: 'dense', 'warmup', 'sparse'.

  Raises:
    ValueError: The folder is no workdir, or the entry has no checkpoint.
  """
  path = pathlib.Path(workdir).expanduser() / 'config.json'
  if not path.exists():
    raise ValueError(f'{workdir} is not the workdir of a run: it has no config.json.')
  recipe = read_recipe(ConfigDict(json.loads(path.read_text()) | {'workdir': str(workdir)}))
  if entry not in recipe.stages:
    raise ValueError(f'{entry=} must be one of the recipe, {tuple(recipe.stages)}.')
  like = abstract_params(recipe.model)
  params = restore_params(recipe.checkpoint_folder(entry), like)
  return nnx.merge(model_graph(recipe.model), params), recipe
