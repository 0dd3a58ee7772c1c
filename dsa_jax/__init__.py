# SPDX-License-Identifier: Apache-2.0
"""DeepSeek Sparse Attention in JAX."""

__version__ = '0.1.0'
