# SPDX-License-Identifier: Apache-2.0
"""Reads texts into a cache and continues them."""
