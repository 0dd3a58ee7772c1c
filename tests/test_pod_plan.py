# SPDX-License-Identifier: Apache-2.0
"""The committed plans are of the models, meshes and recipe that the repository has now, and fit."""

import json
import pathlib
import sys

from jax.sharding import AbstractMesh
import pytest

PLANS = pathlib.Path(__file__).parents[1] / 'experiments' / 'pod_plan'
sys.path.insert(0, str(PLANS))
import plan  # noqa: E402

FILES = [path for path in PLANS.glob('*.json') if path.stem != 'weak_scaling']


def test_every_stage_of_every_model_is_planned_for_every_chip():
  reports = [json.loads(path.read_text()) for path in FILES]
  planned = {(report['stage'], report['model'], report['topology']) for report in reports}
  pods = [(stage, topology) for (stage, _), (topology, _) in plan.PODS.items()]
  assert planned == {(stage, model, topology) for stage, topology in pods for model in plan.MODELS}


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_a_committed_plan_is_of_the_present_configs_and_fits(path):
  report = json.loads(path.read_text())
  stage, chip = report['stage'], report['topology'].split(':')[0]
  topology, pod = plan.PODS[stage, chip]
  entry = plan.deepseek_v32.get_config().stages[stage]
  assert (report['topology'], report['mesh']) == (topology, pod.sizes)
  assert (report['sequences'], report['context']) == (entry.batch_size, entry.seq_len)
  mesh = AbstractMesh(tuple(pod.sizes.values()), plan.MESH_AXES)
  state = plan.abstract_state(plan.MODELS[report['model']], stage, mesh)
  gib, memory = report['gib'], {'weights': state.params, 'moments': state.opt_state}
  for name, tree in memory.items():
    assert gib[name] == round(plan.share_bytes(tree) / 2**30, 2)
  assert gib['arguments'] == pytest.approx(gib['weights'] + gib['moments'], abs=0.1)
  assert gib['total'] == pytest.approx(gib['arguments'] + gib['temporaries'], abs=0.02)
  assert gib['total'] < plan.HBM_GIB[chip]
