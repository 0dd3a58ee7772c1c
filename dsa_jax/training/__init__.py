# SPDX-License-Identifier: Apache-2.0
"""The recipe: stages, losses, optimisers, state, steps and checkpoints."""
