# SPDX-License-Identifier: Apache-2.0
"""The Flax modules of a DeepSeek-V3.2 model."""
