# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels for chips that this machine does not have, and reads what the compilers say."""
