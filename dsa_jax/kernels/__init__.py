# SPDX-License-Identifier: Apache-2.0
"""The ops of DSA: pure functions on arrays, each with a definition and fast backends."""

from dsa_jax.kernels.dense_attention.op import dense_attention
from dsa_jax.kernels.grouped_matmul.op import grouped_matmul
from dsa_jax.kernels.index_kl.op import index_kl
from dsa_jax.kernels.index_scores import index_scores
from dsa_jax.kernels.index_topk.op import index_topk
from dsa_jax.kernels.indexed_attention.op import indexed_attention
from dsa_jax.kernels.sparse_attention.op import sparse_attention
