# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs from top to bottom, and is stored without outputs."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / 'notebooks').glob('*.ipynb'))


@pytest.mark.nightly
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path):
  notebook = nbformat.read(path, as_version=4)
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert code and not any(cell.outputs or cell.execution_count for cell in code)
  changes = {
      "quickstart.get_config('short')": f"quickstart.get_config('tiny'); config.workdir = '{tmp_path}/run'",
      'recall.get_config()': f"recall.get_config('tiny'); needle.workdir = '{tmp_path}/recall'",
      '--longest 8192': '--longest 4096',
  }
  for cell in code:
    for full, tiny in changes.items():
      cell.source = cell.source.replace(full, tiny)
  assert any(str(tmp_path) in cell.source for cell in code)
  resources = {'metadata': {'path': str(path.parent)}}
  nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
  assert any('image/png' in out.get('data', {}) for cell in code for out in cell.outputs)
