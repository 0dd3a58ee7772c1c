# SPDX-License-Identifier: Apache-2.0
"""What several ops share on TPUs; loaded only where their `tpu` backend is asked for."""
