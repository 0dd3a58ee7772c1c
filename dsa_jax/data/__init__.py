# SPDX-License-Identifier: Apache-2.0
"""Training rows: local text, a synthetic recall task, and the iterator that batches them."""
