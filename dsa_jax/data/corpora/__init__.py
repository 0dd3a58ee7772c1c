# SPDX-License-Identifier: Apache-2.0
"""Files that hold documents, as text or as tokens: a class for each format."""
