# SPDX-License-Identifier: Apache-2.0
"""Products of rows sorted by group, each with the matrix of its group."""
