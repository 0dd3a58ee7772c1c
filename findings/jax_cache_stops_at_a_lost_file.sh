#!/usr/bin/env bash
# jax 0.10.2: with `jax_compilation_cache_max_size` set, jax keeps two files for each program, NAME-cache
# and NAME-atime, the time of its last use, and writes the program first. Where a process ends
# between the two, or the small file is lost, every later write to the folder fails: looking for what
# to evict, jax reads the time of every program and gives up at the first that has none, though there
# is room. It only warns; nothing repairs the folder, and from then on no program is kept.
#
# Seen on 2026-11-28 (jax 0.12.0.1 goes on writing):
#   written before: 0 warnings
#   written after: Error writing persistent compilation cache entry ... FileNotFoundError
#
# Here: dsa_jax/training/compilation_cache.py removes programs without a time before a run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'jax==0.10.2' 'jaxlib==0.10.2' 'filelock==3.20.0'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder/programs" <<'PYTHON'
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp

folder = pathlib.Path(sys.argv[1])
folder.mkdir()
for name, value in {
    'jax_compilation_cache_dir': str(folder),
    'jax_compilation_cache_max_size': 2**30,
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
}.items():
  jax.config.update(name, value)


def compile_another(factor):
  """Returns the warnings of compiling a program that no one has compiled before."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    jax.jit(lambda x: x * factor)(jnp.ones(3)).block_until_ready()
  return [str(w.message) for w in caught if 'cache' in str(w.message)]


before = compile_another(2.0)
kept = len(list(folder.glob('*-cache')))
next(folder.glob('*-atime')).unlink()
after = compile_another(3.0)
print(f'written before: {len(before)} warnings')
print('written after:', after[0][:60] if after else 'no warning')
assert not before and kept
assert after and 'FileNotFoundError' in after[0], after
assert len(list(folder.glob('*-cache'))) == kept, 'the folder was written again'
PYTHON
