# SPDX-License-Identifier: Apache-2.0
"""Attention layers: weights to views, and views to outputs."""
