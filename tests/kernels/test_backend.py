# SPDX-License-Identifier: Apache-2.0
"""Every platform gets the kernels that were built for it, or the portable ones."""

import types

import jax
import pytest

from dsa_jax.kernels.backend import default_backend


@pytest.mark.parametrize(
    'platform, capability, backend',
    [
        ('cpu', None, 'xla'), ('tpu', None, 'tpu'), ('gpu', '9.0', 'gpu'), ('gpu', '7.5', 'xla'),
        ('gpu', '8.0', 'xla'), ('gpu', 'gfx942', 'xla'),
    ],
)  # fmt: skip
def test_default_backend(platform, capability, backend, monkeypatch):
  device = types.SimpleNamespace(**({'compute_capability': capability} if capability else {}))
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  assert default_backend() == backend
