# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept for the session: tests that start processes share them."""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix='dsa_jax_compiled_')
os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.5'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
