# SPDX-License-Identifier: Apache-2.0
"""What a run has shown: evaluation, results, report, plots and metrics."""
