# SPDX-License-Identifier: Apache-2.0
"""Models in one call, under the name that notebooks import."""

from dsa_jax.inference.load import load_checkpoint as load_checkpoint, load_model as load_model
