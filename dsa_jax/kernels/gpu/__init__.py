# SPDX-License-Identifier: Apache-2.0
"""What several ops share on GPUs; loaded only where their `gpu` backend is asked for."""
