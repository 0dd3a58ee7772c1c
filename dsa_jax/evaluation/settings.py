# SPDX-License-Identifier: Apache-2.0
"""What is evaluated, on what text, and how many tokens each query may select."""

import dataclasses
import pathlib

from dsa_jax.config import ConfigError, local_path
from dsa_jax.data.corpora.sources import FORMATS
from dsa_jax.data.packing import PACKINGS
from dsa_jax.evaluation.tasks import KINDS
from dsa_jax.kernels.backend import BACKENDS, why_not_here
from dsa_jax.parallel.mesh import MeshConfig
from dsa_jax.selection import RULES

CONTEXT = 2048
DTYPES = ('float32', 'bfloat16')
PROMPTS = ('base', 'instruct')
FILE_FORMATS = tuple(name for name in FORMATS if name != 'flat')  # That one needs more than a name.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """An evaluation of one checkpoint."""

  checkpoint: str  # RUN/checkpoints/ENTRY, a converted checkpoint, or one step of either.
  out: pathlib.Path  # The folder of the results.
  files: tuple[str, ...] = ()  # Globs, files or folders. () stands for the data of the run.
  format: str = 'text'  # The format of the files.
  field: str = 'text'  # The field of JSON lines, or the column, that holds the text.
  tokenizer: str = ''  # '' stands for that of the checkpoint, and for bytes where it has none.
  packing: str = 'concat'  # The way in which documents of files share rows.
  min_tokens: int = 0  # Shorter documents of files are left out.
  context: int = 0  # Tokens of a row. 0 stands for 2048, or for all that a smaller model can read.
  rows: int = 64  # Rows that are scored.
  batch_size: int = 4  # Rows that are in memory at a time.
  index_topk: tuple[int, ...] = ()  # Budgets, in turn. () stands for the model's own.
  index_rope_factor: float | None = None  # See `load_checkpoint`.
  rules: tuple[str, ...] = ()  # () stands for all, but for an indexer that was never trained.
  dtype: str = 'float32'  # The dtype of the model's matrices.
  backend: str = ''  # The kernels that run. '' stands for the platform's default.
  mesh: MeshConfig = MeshConfig()  # The devices that share the work.
  tasks: tuple[str, ...] = ()  # Tasks of long context, keys of `tasks.KINDS`.
  lengths: tuple[int, ...] = ()  # Tokens of a task with its answer. () stands for the context.
  examples: int = 10  # Tasks of each kind and length.
  prompt: str = 'base'  # The kind of model that the prompts are for.
  chat: str = ''  # What surrounds '{prompt}' for an instruct model. '' stands for the chat template.
  haystack: str = ''  # A glob of plain text for tasks. '' stands for Python's library.

  def __post_init__(self):
    object.__setattr__(self, 'out', local_path(self.out, 'the folder of the results'))
    if self.out.exists() and not self.out.is_dir():
      raise ConfigError(f'{self.out} is a file: name a folder for the results.')
    choices = {'format': FILE_FORMATS, 'packing': PACKINGS, 'dtype': DTYPES, 'prompt': PROMPTS}
    for name, known in choices.items():
      if getattr(self, name) not in known:
        raise ConfigError(f'{name}={getattr(self, name)!r} must be one of {known}.')
    for name in ('rows', 'batch_size', 'examples'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.rows % self.batch_size:
      raise ConfigError(f'rows={self.rows} must be a multiple of batch_size={self.batch_size}.')
    if self.min_tokens < 0:
      raise ConfigError(f'min_tokens={self.min_tokens} must not be negative.')
    if self.context < 0 or self.context == 1:
      raise ConfigError(f'context={self.context} must be at least 2: one token and its target.')
    for name in 'index_topk', 'rules', 'tasks', 'lengths':
      values = getattr(self, name)
      if len(set(values)) < len(values):
        raise ConfigError(f'{name}={values} must name each of its values once.')
    if unknown := [rule for rule in self.rules if rule not in RULES]:
      raise ConfigError(f'rules={self.rules} names {unknown}; the rules are {tuple(RULES)}.')
    self._check_tasks()
    if self.backend and self.backend not in BACKENDS:
      raise ConfigError(f"backend={self.backend!r} must be one of {BACKENDS}, or ''.")
    if self.backend and (reason := why_not_here(self.backend)):
      raise ConfigError(f'backend={self.backend!r}: {reason}')

  @property
  def capacity(self) -> int:
    """The tokens of a cache for tasks: as many as the longest has, or a few more for an even split."""
    return max(self.lengths) + -max(self.lengths) % self.mesh.context

  def _check_tasks(self):
    if unknown := [kind for kind in self.tasks if kind not in KINDS]:
      raise ConfigError(f'tasks={self.tasks} names {unknown}; the kinds are {tuple(KINDS)}.')
    if self.lengths and not self.tasks:
      raise ConfigError(f'lengths={self.lengths} would change nothing without tasks.')
    if self.chat and ('{prompt}' not in self.chat or self.prompt != 'instruct'):
      raise ConfigError(f"chat={self.chat!r} must hold '{{prompt}}', and needs prompt='instruct'.")
