# SPDX-License-Identifier: Apache-2.0
"""What a model loses when its attention goes sparse; each name is imported from its module."""
