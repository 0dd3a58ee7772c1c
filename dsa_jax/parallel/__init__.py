# SPDX-License-Identifier: Apache-2.0
"""Meshes of devices, what they exchange, and jobs of several processes."""
