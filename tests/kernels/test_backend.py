# SPDX-License-Identifier: Apache-2.0
"""Every platform gets the kernels that were built for it, or the portable ones."""

import pathlib
import subprocess
import sys
import types

import jax
import pytest

from dsa_jax.kernels.backend import check_backend, default_backend


@pytest.mark.parametrize(
    'platform, capability, want',
    [
        ('cpu', None, 'xla'), ('tpu', None, 'tpu'), ('gpu', '9.0', 'gpu'), ('gpu', '7.5', 'xla'),
        ('gpu', '8.0', 'xla'), ('gpu', 'gfx942', 'xla'),
    ],
)  # fmt: skip
def test_default_backend(platform, capability, want, monkeypatch):
  device = types.SimpleNamespace(**({'compute_capability': capability} if capability else {}))
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  assert default_backend() == want


def test_other_backends_do_without_the_compilers_of_gpus():
  script = pathlib.Path(__file__).with_name('missing_script.py')
  done = subprocess.run([sys.executable, script], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout == 'all modules but those of GPUs\n'


def test_refuses_a_backend_nobody_knows():
  with pytest.raises(ValueError, match=r"backend='cuda' must be one of \('reference', 'xla'"):
    check_backend('cuda')
