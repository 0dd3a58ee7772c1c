#!/usr/bin/env bash
# When a disk is full, orbax reports it hundreds of lines before the error that it raises.
#
# Seen on 2026-11-29 with orbax-checkpoint 0.12.8, tensorstore 0.1.86, jax 0.10.2, Python 3.11, Linux.
#
# Expected: `CheckpointManager.save` and `wait_until_finished` raise one error that names the cause.
# Seen: they do, and before it the threads of TensorStore print a traceback that ends in "Event loop is
# closed" for 37 of the 60 arrays of this checkpoint, by `sys.unraisablehook`, and orbax logs the same
# failure with its own tracebacks: 547 lines. The cause, which the system calls "File too large" here,
# stands only within a line of some 1,500 characters.
# The loop in which the arrays are written ends with the first failure, and the others report to it.
#
# Here: training/checkpoint.py turns the error into one line with the words of the system, and train.py
# leaves out what is told to a closed loop.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 orbax-checkpoint==0.12.8 tensorstore==0.1.86
cat >"$folder/save.py" <<'PYTHON'
import sys

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

rng = np.random.default_rng(0)
tree = {f'array_{i}': jnp.asarray(rng.normal(size=(64, 64))) for i in range(60)}
try:
  with ocp.CheckpointManager(sys.argv[1]) as manager:
    manager.save(1, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()
except Exception as error:
  print('RAISED', type(error).__name__, flush=True)
PYTHON
# Files may have 64 KiB here, which stands for a disk that is full.
(ulimit -f 64; JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/save.py" "$folder/run") \
  >"$folder/output" 2>&1 || true
lines=$(wc -l <"$folder/output")
closed=$(grep -c 'Event loop is closed$' "$folder/output" || true)
echo "lines: $lines; of them \"Event loop is closed\": $closed; $(grep RAISED "$folder/output")"
grep -q 'RAISED ValueError' "$folder/output" && [ "$lines" -gt 300 ] && [ "$closed" -gt 20 ]
