# SPDX-License-Identifier: Apache-2.0
"""Every field of a run, its meaning and its default. Other configs change what differs."""

import dataclasses

from ml_collections import ConfigDict

from dsa_jax.config import ModelConfig
from dsa_jax.data.sources import DataConfig
from dsa_jax.parallel.mesh import MeshConfig
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.recipe import ReportConfig
from dsa_jax.training.stages import StageConfig


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.workdir = ''  # Checkpoints, metrics and the report; a run resumes from here.
  c.seed = 0  # Determines fresh weights, and what every rule that draws lots draws.
  # The kernels that run: 'reference', 'xla', 'tpu' or 'gpu'. '' stands for the platform's default.
  c.backend = ''
  c.selection = 'indexer'  # What selects, a key of dsa_jax.selection.RULES.
  # What the backward pass computes again, to save memory. 'none' computes nothing again, 'products'
  # keeps the products with weights, 'selection' the selected indices, and 'layer' nothing but the
  # input of each layer.
  c.remat = 'layer'
  # The folder in which compiled programs are kept for the next start. '' stands for dsa_jax/compiled
  # in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another. 'off' keeps none.
  c.compilation_cache = ''
  c.resume = 'latest'  # 'last_good' skips checkpoints that are damaged.
  c.on_changed_data = 'stop'  # 'go_on' resumes even if files of the corpus have changed.
  # Several runs by one command, each a dictionary of the fields in which it differs, such as
  # ({'seed': 0}, {'seed': 1, 'model.index_topk': 16}). Their folders lie in `workdir`.
  c.sweep = ()
  c.log_every = 10  # Steps between rows of metrics.csv and TensorBoard.
  c.measure_every = 100  # Steps between looks at what the selection captures.
  c.measure_rows = 4  # Validation rows of such a look.
  c.save_every = 100  # Steps between checkpoints.
  c.recipe = ()  # The stages to run, in order: keys of `stages`.
  c.stages = ConfigDict()  # name -> the fields of dsa_jax.training.stages.StageConfig.
  c.mesh = dataclasses.asdict(MeshConfig())  # How many devices share what; one device by default.
  c.model = dataclasses.asdict(ModelConfig())  # The released 671B model.
  c.data = dataclasses.asdict(DataConfig())
  c.optim = dataclasses.asdict(OptimConfig())
  c.report = dataclasses.asdict(ReportConfig())
  return c


def stage(**fields) -> ConfigDict:
  """Returns a stage with every field of StageConfig, the given ones changed."""
  defaults = {
      f.name: f.default
      for f in dataclasses.fields(StageConfig)
      if f.default is not dataclasses.MISSING
  }
  return ConfigDict(defaults | fields)
