# SPDX-License-Identifier: Apache-2.0
"""Measures what neighbouring queries of finished runs select in common.

python experiments/kernel_speed/overlap.py runs/quickstart runs/recall

Writes, by position, layer and stage, the share of a query's selected tokens that the query before
it also selected, for queries that have to choose.
"""

import json
import pathlib
import sys

from flax import nnx
import numpy as np

from dsa_jax.data.pipeline import first_batches
from dsa_jax.inference.load import load_model
from dsa_jax.kernels.backend import default_backend
from dsa_jax.nn.attention.types import Mode
from dsa_jax.reporting.evaluate import measure

STAGES = {'warmup': 'dense', 'sparse': 'sparse'}  # The attention of each stage.
# Ranges of positions begin at these multiples of the budget.
FACTORS = 1, 1.5, 2, 3, 4, 6, 8


def main(folders: list[str]):
  rows = [row for folder in folders for stage in STAGES for row in overlaps(folder, stage)]
  for row in rows:
    cells = [f'{a} to {b}: {x:.2f}' for (a, b), x in zip(row['sees'], row['overlap'])]
    print(row['run'], row['stage'], f'layer {row["layer"]}', *cells, sep=' | ')
  path = pathlib.Path(__file__).with_suffix('.json')
  path.write_text(json.dumps(rows, indent=1) + '\n')


def overlaps(folder: str, stage: str):
  """Yields a row for each layer: the mean overlap, by the number of tokens that a query sees."""
  model, recipe = load_model(folder, stage)
  report, budget = recipe.report, recipe.model.index_topk
  source = recipe.data.rows(report.seq_len, 'validation')
  batches = first_batches(source, report.batch_size, report.batches, seed=0)
  visible = np.concatenate([np.ravel(batch.end - batch.start) for batch in batches])
  begins = [int(f * budget) for f in FACTORS if f * budget < visible.max()]
  mode = Mode(attention=STAGES[stage], backend=default_backend(), measure=('indexer',))
  measures = measure(*nnx.split(model), batches, mode, beyond=tuple(begins))
  counts = [np.sum(visible > n) for n in begins]
  sums = [n * x['indexer']['neighbour_overlap'] for n, x in zip(counts, measures)]
  in_range = lambda x: np.asarray(x) - np.asarray([*x[1:], 0 * x[0]])
  for layer, means in enumerate((in_range(sums) / in_range(counts)[:, None]).T):
    yield {
        'run': pathlib.Path(folder).name,
        'stage': stage,
        'layer': layer,
        'sees': [(a + 1, b) for a, b in zip(begins, [*begins[1:], int(visible.max())])],
        'queries': in_range(counts).tolist(),
        'overlap': means.tolist(),
    }


if __name__ == '__main__':
  main(sys.argv[1:])
