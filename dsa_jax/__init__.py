# SPDX-License-Identifier: Apache-2.0
"""DeepSeek Sparse Attention in JAX.

What a notebook begins with can be imported from here; each name is loaded when it is asked for, so
`import dsa_jax` costs nothing and needs nothing.
"""

import importlib

__version__ = '0.1.0'

_HOMES = {
    'ConfigError': 'config',
    'ModelConfig': 'config',
    'SampleConfig': 'inference.sampler',
    'Sampler': 'inference.sampler',
    'inspect': 'reporting.inspect',
    'load_checkpoint': 'inference.load',
    'load_model': 'inference.load',
    'make_mesh': 'parallel.mesh',
    'open_tokenizer': 'data.tokenizer_files',
}


def __getattr__(name: str):
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)


def __dir__():
  return sorted({*globals(), *_HOMES})
