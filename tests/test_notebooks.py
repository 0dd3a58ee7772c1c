# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs from top to bottom, and is stored without outputs."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / 'notebooks').glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path):
  notebook = nbformat.read(path, as_version=4)
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert code and not any(cell.outputs or cell.execution_count for cell in code)
  small = f"quickstart.get_config('tiny'); config.workdir = {str(tmp_path / 'run')!r}"
  for cell in code:
    cell.source = cell.source.replace("quickstart.get_config('short')", small)
  assert any(small in cell.source for cell in code)
  resources = {'metadata': {'path': str(path.parent)}}
  nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
  assert any('image/png' in out.get('data', {}) for cell in code for out in cell.outputs)
