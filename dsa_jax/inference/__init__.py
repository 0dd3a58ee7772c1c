# SPDX-License-Identifier: Apache-2.0
"""Reading and continuing texts from a cache."""
