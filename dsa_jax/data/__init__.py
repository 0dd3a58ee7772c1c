# SPDX-License-Identifier: Apache-2.0
"""Training rows from local text and a synthetic recall task, and the iterator that batches them."""
