# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are damaged, or cannot be written, are named in one line and cost nothing else."""

import errno
import json
import shutil

import jax
import numpy as np
import pytest

from configs import quickstart
from dsa_jax import train
from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.training import checkpoint
from dsa_jax.training.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    Progress,
    restore_params,
    saved_stage,
    saved_steps,
)
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.recipe import read_recipe
from dsa_jax.training.run import Run
from dsa_jax.training.state import abstract_params, init_params, new_state
from dsa_jax.training.stored_arrays import CHECKSUMS

CFG = ModelConfig(**quickstart.get_config('tiny').model)


@pytest.fixture(scope='module')
def state():
  return new_state(init_params(CFG, seed=0), ('backbone', 'indexer'), OptimConfig(), seed=0)


@pytest.fixture(scope='module')
def saved(state, tmp_path_factory):
  folder = tmp_path_factory.mktemp('run') / 'checkpoints' / 'dense'
  with Checkpoints(folder) as checkpoints:
    for step in 2, 4:
      checkpoints.save(step, state, Progress({'next_index': step}, float(step)))
  return folder


def moved(state, by):
  """Returns a state with another embedding."""
  embed = state.params['embed']
  return state._replace(params=state.params | {'embed': embed.replace(embed[...] + by)})


def test_a_path_is_not_an_address(state, tmp_path):
  """As an address, `a%20b` is `a b`, and `100%` is none."""
  like = abstract_params(CFG)
  for i, name in enumerate(('a b', 'a%20b', '100%', 'a#b')):
    with Checkpoints(tmp_path / name) as checkpoints:
      checkpoints.save(1, moved(state, i), Progress({}, 0.0))
    read = restore_params(tmp_path / name, like)['embed'][...]
    np.testing.assert_array_equal(read, moved(state, i).params['embed'][...], err_msg=name)


def test_the_stage_lies_beside_the_weights(saved, state, tmp_path):
  assert saved_stage(tmp_path) == saved_stage(saved) == ''
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, Progress({}, 0.0, 'dense'))
    checkpoints.save(2, state, Progress({}, 0.0, 'sparse'))
  assert [saved_stage(x) for x in (tmp_path / '1', tmp_path / '2', tmp_path)] == ['dense', 'sparse', 'sparse']
  path = tmp_path / '2' / 'progress' / 'metadata'
  path.write_text(path.read_text().replace('"sparse"', 'sparse'))
  with pytest.raises(DamagedCheckpoint, match='2 is damaged'):
    saved_stage(tmp_path)
  assert saved_stage(tmp_path / '1') == 'dense'


def test_a_checkpoint_of_before_the_stage_was_recorded_goes_on(state, tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, Progress({'next_index': 1}, 2.0))
  path = tmp_path / '1' / 'progress' / 'metadata'
  values = json.loads(path.read_text())
  del values['stage']
  path.write_text(json.dumps(values))
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.progress() == Progress({'next_index': 1}, 2.0, '')


def damage_array(step):
  for path in (step / 'state').rglob('d/*'):
    path.write_bytes(path.read_bytes()[:100])


def turn_a_bit(step):
  """Another number in the file of all arrays, which has no checksum of its own for them."""
  path = max((step / 'state').rglob('d/*'), key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


DAMAGES = {
    'a bit is another': turn_a_bit,
    'the checksums are cut': lambda step: (step / CHECKSUMS).write_text('{"state": {'),
    'the checksums are others': lambda step: (step / CHECKSUMS).write_text('{"state": {}}'),
    'an array is cut short': damage_array,
    'the manifest is empty': lambda step: (step / 'state' / 'manifest.ocdbt').write_bytes(b''),
    'the list of arrays is cut': lambda step: (step / 'state' / '_METADATA').write_text('{'),
    'the list of arrays is another': lambda step: (step / 'state' / '_METADATA').write_text('{}'),
    'the progress is gone': lambda step: shutil.rmtree(step / 'progress'),
    'the progress is another': lambda step: (step / 'progress' / 'metadata').write_text('{"data": {}}'),
    'the folder is empty': lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.fixture(params=DAMAGES.values(), ids=DAMAGES)
def damaged(request, saved, tmp_path):
  folder = tmp_path / 'checkpoints' / 'dense'
  shutil.copytree(saved, folder)
  request.param(folder / '4')
  return folder


def test_everything_comes_back(saved, state):
  with Checkpoints(saved) as checkpoints:
    restored, progress = checkpoints.restore(4, state)
    assert checkpoints.progress().seconds == 4.0
  assert progress == Progress({'next_index': 4}, 4.0)
  for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_a_checkpoint_without_checksums_is_read(saved, state, tmp_path):
  shutil.copytree(saved, tmp_path / 'dense')
  shutil.rmtree((tmp_path / 'dense' / '4' / CHECKSUMS).parent)
  with Checkpoints(tmp_path / 'dense') as checkpoints:
    restored, _ = checkpoints.restore(4, state)
  for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_every_process_reads_the_step_that_the_first_one_finds(state, tmp_path, monkeypatch):
  with Checkpoints(tmp_path) as checkpoints:
    for step in 1, 2:
      checkpoints.save(step, moved(state, step), Progress({}, 0.0))
  monkeypatch.setattr(checkpoint, 'of_first', lambda step: step - 1)
  assert checkpoint.latest_of_job(tmp_path).name == '1'
  params = restore_params(tmp_path, abstract_params(CFG))
  np.testing.assert_array_equal(params['embed'][...], state.params['embed'][...] + 1)


def test_damage_that_another_process_has_found_counts(saved, state, monkeypatch):
  monkeypatch.setattr(checkpoint, 'any_process', lambda found: True)
  with Checkpoints(saved) as checkpoints, pytest.raises(DamagedCheckpoint, match='another process'):
    checkpoints.restore(4, state)


def test_damage_is_named_with_the_way_out(damaged, state):
  with Checkpoints(damaged) as checkpoints, pytest.raises(DamagedCheckpoint) as raised:
    checkpoints.restore(4, state)
  message = str(raised.value)
  assert f'{damaged}/4 is damaged' in message and '\n' not in message
  assert f'The one before it is {damaged}/2, from which --config.resume=last_good goes on.' in message
  try:
    restore_params(damaged, abstract_params(CFG))
  except DamagedCheckpoint as error:  # Whoever reads weights needs no progress, and does not resume.
    assert str(error).endswith(f'The one before it is {damaged}/2.')


def run_of(folder, states):
  """Returns a run that may skip damaged checkpoints, and keeps what its data is set to."""
  config = quickstart.get_config('tiny')
  config.workdir, config.resume = str(folder.parents[1]), 'last_good'
  data = type('Data', (), {'train': {'dense': type('Batches', (), {'set_state': states.append})}})
  return Run(read_recipe(config), None, 'xla', None, data)


def test_the_last_good_one_can_go_on(damaged, state, monkeypatch):
  run = run_of(damaged, states := [])
  monkeypatch.setattr(Run, 'abstract_state', lambda self, name: state)
  monkeypatch.setattr(Run, 'initial_state', None)  # Where it began may be gone.
  with Checkpoints(damaged) as checkpoints:
    step, restored, seconds = train.resume(run, 'dense', checkpoints)
  assert (step, seconds, states) == (2, 2.0, [{'next_index': 2}])
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert saved_steps(damaged) == [2] and (damaged / '4.damaged').is_dir()


def test_what_is_no_folder_of_a_step_is_no_checkpoint(saved, state, tmp_path):
  folder = tmp_path / 'dense'
  shutil.copytree(saved, folder)
  for name in '12', '²':
    (folder / name).touch()
  (folder / '007').mkdir()
  with Checkpoints(folder) as checkpoints:
    assert saved_steps(folder) == [2, 4] and checkpoints.latest_step == 4
  read = restore_params(folder, abstract_params(CFG))['embed'][...]
  np.testing.assert_array_equal(read, state.params['embed'][...])


def test_nothing_begins_anew_if_none_is_good(damaged, state, monkeypatch):
  damage_array(damaged / '2')
  monkeypatch.setattr(Run, 'abstract_state', lambda self, name: state)
  monkeypatch.setattr(Run, 'initial_state', None)
  with Checkpoints(damaged) as checkpoints, pytest.raises(DamagedCheckpoint, match='2 is damaged'):
    train.resume(run_of(damaged, []), 'dense', checkpoints)
  assert saved_steps(damaged) == [2]


def test_another_state_is_not_called_damaged(saved, state, tmp_path, monkeypatch):
  """Else `last_good` would set aside checkpoints that are whole."""
  folder = tmp_path / 'checkpoints' / 'dense'
  shutil.copytree(saved, folder)
  other = new_state(init_params(CFG, seed=0), ('backbone',), OptimConfig(), seed=0)
  monkeypatch.setattr(Run, 'abstract_state', lambda self, name: other)
  with Checkpoints(folder) as checkpoints, pytest.raises(ConfigError) as raised:
    train.resume(run_of(folder, []), 'dense', checkpoints)
  assert not isinstance(raised.value, DamagedCheckpoint)
  assert 'holds another model' in str(raised.value) and saved_steps(folder) == [2, 4]


def test_damaged_parameters_are_named(saved, tmp_path):
  folder = tmp_path / 'checkpoints' / 'dense'
  shutil.copytree(saved, folder)
  damage_array(folder / '4')
  with pytest.raises(ConfigError, match='4 is damaged'):
    restore_params(folder, abstract_params(CFG))


def test_the_report_names_the_way_out_of_damage_too(saved, tmp_path):
  """It reads the weights of entries that have ended, which nothing else reads."""
  folder = tmp_path / 'checkpoints' / 'dense'
  shutil.copytree(saved, folder)
  (folder / '4' / CHECKSUMS).write_text('{')
  with pytest.raises(DamagedCheckpoint, match='2, from which --config.resume=last_good goes on'):
    run_of(folder, []).params(folder)


@pytest.mark.parametrize(
    'error',
    [
        OSError(errno.ENOSPC, 'no space'),
        ValueError('OUT_OF_RANGE: Error writing "x" [tensorstore_spec=...] [os_error_code=\'28\']'),
    ],
)
def test_a_disk_that_fills_up_is_one_line(saved, state, error, monkeypatch):
  def fail(*_, **__):
    raise error

  with Checkpoints(saved) as checkpoints:
    monkeypatch.setattr(checkpoints._manager, 'save', fail)
    with pytest.raises(ConfigError) as raised:
      checkpoints.save(6, state, Progress({}, 0.0))
  message = str(raised.value)
  assert 'No space left on device. Make room' in message and 'resumes from step 4' in message
  assert '\n' not in message and 'tensorstore' not in message


def test_other_errors_of_saving_keep_their_type(saved, state, monkeypatch):
  def fail(*_, **__):
    raise ValueError('wrong structure')

  with Checkpoints(saved) as checkpoints:
    monkeypatch.setattr(checkpoints._manager, 'save', fail)
    with pytest.raises(ValueError, match='wrong structure') as raised:
      checkpoints.save(6, state, Progress({}, 0.0))
  assert not isinstance(raised.value, ConfigError)
