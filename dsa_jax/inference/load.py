# SPDX-License-Identifier: Apache-2.0
"""Loads a model in one call, from a converted checkpoint or from a run."""

import json
import pathlib
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.nn.transformer import Transformer
from dsa_jax.training.checkpoint import restore_params
from dsa_jax.training.recipe import Recipe, read_recipe
from dsa_jax.training.state import abstract_params, model_graph


def load_checkpoint(
    folder: str | pathlib.Path, *, mesh: Mesh | None = None, dtype: str = 'float32'
) -> Transformer:
  """Returns the model of a converted checkpoint, or of a run's `checkpoints/<entry>`.

  Args:
    folder: The checkpoint.
    mesh: Devices to split the weights over. Each reads its own share only. None stands for the
      first device.
    dtype: The dtype of matrices, whatever they are stored in. Norms and the router's bias are
      float32.

  Raises:
    ConfigError: The folder holds no checkpoint, or the mesh does not divide its weights.
  """
  folder = pathlib.Path(folder).expanduser()
  cfg = ModelConfig(**read_record(folder)['model'])
  params = restore_params(folder, abstract_params(cfg, mesh=mesh, dtype=dtype))
  return nnx.merge(model_graph(cfg), params)


def read_record(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the config.json of a converted checkpoint, or of the run that a checkpoint is from."""
  for path in (folder / 'config.json', folder.parent.parent / 'config.json'):
    if path.exists():
      break
  else:
    raise ConfigError(f'{folder} is neither a converted checkpoint nor RUN/checkpoints/ENTRY.')
  if (folder / 'checkpoints').is_dir():
    entries = ', '.join(sorted(p.name for p in (folder / 'checkpoints').iterdir()))
    raise ConfigError(
        f'{folder} is a run: choose {folder}/checkpoints/ENTRY, ENTRY one of {entries}.'
    )
  return json.loads(path.read_text())


def has_trained_indexer(folder: pathlib.Path, record: dict[str, Any]) -> bool:
  """Returns whether a converted checkpoint had an indexer, or a run's stage is not `dense`."""
  if 'source' in record:
    return any('indexer' in path for path in record['source']['dtypes'])
  return record.get('stages', {}).get(folder.name, {}).get('stage') != 'dense'


def load_model(workdir: str | pathlib.Path, entry: str) -> tuple[Transformer, Recipe]:
  """Returns the model as one entry of a finished recipe left it, and the recipe.

  Args:
    workdir: The folder of a run.
    entry: A name in its recipe, such as 'dense', 'warmup' or 'sparse'.

  Raises:
    ConfigError: The folder is no workdir, or the entry has no checkpoint.
  """
  path = pathlib.Path(workdir).expanduser() / 'config.json'
  if not path.exists():
    raise ConfigError(f'{workdir} is not the workdir of a run: it has no config.json.')
  config = json.loads(path.read_text()) | {'workdir': str(workdir)}
  recipe = read_recipe(ConfigDict(config))
  if entry not in recipe.stages:
    raise ConfigError(f'{entry=} must be one of the recipe, {tuple(recipe.stages)}.')
  return load_checkpoint(recipe.checkpoint_folder(entry)), recipe
