# SPDX-License-Identifier: Apache-2.0
"""Imports released checkpoints and exports ours: python -m dsa_jax.convert SOURCE TARGET"""
