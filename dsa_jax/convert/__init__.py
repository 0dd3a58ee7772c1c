# SPDX-License-Identifier: Apache-2.0
"""Released checkpoints in, and out again: python -m dsa_jax.convert SOURCE TARGET"""
