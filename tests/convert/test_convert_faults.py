# SPDX-License-Identifier: Apache-2.0
"""What goes wrong is said, all of it; and nothing is left but a whole checkpoint."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import released
import safetensors

from dsa_jax.config import ConfigError
from dsa_jax.convert import building as target_module
from dsa_jax.convert.exporter import export_checkpoint, open_checkpoint
from dsa_jax.convert.importer import import_checkpoint, open_source
from dsa_jax.convert.tensors import Tensor
from dsa_jax.inference.load import load_checkpoint
from dsa_jax.training.checkpoint import DamagedCheckpoint, latest_checkpoint

quiet = lambda nbytes: None
INDEX = 'model.safetensors.index.json'


@pytest.fixture
def source(tmp_path):
  folder = tmp_path / 'source'
  released.write(folder, released.V32, released.random_tensors(released.V32))
  return folder


def rewrite(source: pathlib.Path, change) -> None:
  """Applies `change(tensors)` and writes the whole checkpoint anew."""
  tensors = released.random_tensors(released.V32)
  change(tensors)
  shutil.rmtree(source)
  released.write(source, released.V32, tensors)


def edit_json(path: pathlib.Path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fails(source: pathlib.Path, *messages: str):
  with pytest.raises(ValueError) as error:
    open_source(source)
  for message in messages:
    assert message in str(error.value), str(error.value)
  return str(error.value)


def test_other_bytes_in_an_array_are_named(source, tmp_path):
  """A file of a checkpoint that a disk or a copy has changed."""
  target, out = tmp_path / 'target', tmp_path / 'out'
  import_checkpoint(open_source(source), target, advance=quiet)
  path = max((target / '0/state').glob('params.moe_blocks.attn.wo/*'), key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  content[-20] ^= 8
  path.write_bytes(content)
  message = 'checkpoint .*target/0 is damaged: .*params.moe_blocks.attn.wo.* has other bytes than were saved'
  with pytest.raises(DamagedCheckpoint, match=message):
    load_checkpoint(target)
  with pytest.raises(DamagedCheckpoint, match=message):
    export_checkpoint(open_checkpoint(target), out, advance=quiet)
  assert not out.exists()


def test_two_missing_shards(source):
  for i in (1, 3):
    (source / f'model-0000{i}-of-00003.safetensors').unlink()
  fails(source, 'model-00001-of-00003.safetensors is missing', 'model-00003-of-00003.safetensors')


def test_truncated_shard(source):
  path = source / 'model-00002-of-00003.safetensors'
  os.truncate(path, path.stat().st_size - 5)
  fails(source, 'model-00002-of-00003.safetensors is damaged or cut short')


def test_missing_extra_and_misshapen_tensors(source):
  def change(tensors):
    del tensors['model.layers.1.mlp.experts.2.up_proj.weight']
    del tensors['model.layers.0.self_attn.indexer.wk.weight_scale_inv']
    tensors['model.layers.2.self_attn.rotary.weight'] = np.zeros(3, np.float32)
    name = 'model.layers.0.mlp.down_proj.weight'
    tensors[name] = tensors[name].T
    tensors['model.norm.weight'] = tensors['model.norm.weight'].astype(np.int32)

  rewrite(source, change)
  text = fails(
      source,
      'model.layers.1.mlp.experts.2.up_proj.weight is missing',
      'model.layers.0.self_attn.indexer.wk.weight_scale_inv is missing',
      'model.layers.2.self_attn.rotary.weight is in no place of this model',
      'model.layers.0.mlp.down_proj.weight has shape (144, 160); config.json asks for (160, 144)',
      'model.norm.weight has dtype I32',
      'model.layers.1.mlp.experts.2.up_proj.weight_scale_inv is in no place of this model',
  )
  assert len(text.splitlines()) == 8  # The title, five, and two that have lost their weight.


def test_misshapen_scales(source):
  name = 'model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv'  # 144 rows: two blocks.
  rewrite(source, lambda tensors: tensors.update({name: tensors[name][:1]}))
  fails(source, f'{name} is F32 (1, 2); it must be F32 (2, 2)')


def test_mixed_dtypes(source):
  name = 'model.layers.1.input_layernorm.weight'
  narrow = lambda x: x.astype(released.CODES['BF16'])
  rewrite(source, lambda tensors: tensors.update({name: narrow(tensors[name])}))
  fails(source, f'{name} (BF16)', 'are stacked and must share a dtype')


def test_other_embedding_in_mtp(source):
  name = 'model.layers.3.embed_tokens.weight'
  rewrite(source, lambda tensors: tensors.update({name: -tensors[name]}))
  fails(source, f'{name} must be a copy of model.embed_tokens.weight')


def test_index_names_a_file_that_is_not_there(source):
  index = json.loads((source / INDEX).read_text())
  index['weight_map']['lm_head.weight'] = 'model-00009-of-00003.safetensors'
  (source / INDEX).write_text(json.dumps(index))
  fails(source, 'model-00009-of-00003.safetensors is missing', 'lm_head.weight is in model-')


def test_index_leads_out_of_the_folder(source):
  index = json.loads((source / INDEX).read_text())
  index['weight_map']['lm_head.weight'] = '../other.safetensors'
  (source / INDEX).write_text(json.dumps(index))
  fails(source, 'model.safetensors.index.json must be JSON with a weight_map')


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'model_type': 'gpt2'}, "model_type='gpt2' must be one of"),
        ({'hidden_size': -1}, 'hidden_size=-1 must be positive'),
        ({'hidden_size': '160'}, "hidden_size='160' must be a number"),
        ({'n_group': 3}, 'n_routed_experts=4 must be a multiple'),
        ({'scoring_func': 'softmax'}, "scoring_func='softmax' must be 'sigmoid'"),
        ({'tie_word_embeddings': True}, 'tie_word_embeddings=True must be False'),
        ({'rope_scaling': {'type': 'linear'}}, "type='linear' must be 'yarn' or 'default'"),
        ({'first_k_dense_replace': 9}, 'first_k_dense_replace=9 must be within 0 and 3'),
        ({'num_nextn_predict_layers': 2}, 'n_mtp_layers=2 must be 0 or 1'),
        ({'qk_rope_head_dim': 7}, 'qk_rope_head_dim=7 must be even'),
        ({'indexer_types': ['shared'] * 3}, "the first of them 'full'"),
        ({'indexer_types': ['full']}, "for each of the 3 layers"),
    ],
)
def test_config_out_of_range(source, changes, message):
  edit_json(source / 'config.json', **changes)
  fails(source, 'config.json', message)


def test_all_wrong_config_values_at_once(source):
  edit_json(source / 'config.json', hidden_size=0, vocab_size=None, scoring_func='softmax')
  fails(source, 'hidden_size=0', 'vocab_size=None', 'scoring_func')


def test_no_config(source):
  (source / 'config.json').unlink()
  fails(source, 'is no released checkpoint: config.json')


@pytest.mark.parametrize('content', ['', 'null', '[]', '{"eos_token_id": -1}'])
def test_a_file_beside_the_weights_that_nothing_could_read(source, content):
  """It would be copied, and every sampler would refuse it."""
  (source / 'tokenizer.json').write_text('{}')
  (source / 'generation_config.json').write_text(content)
  fails(source, 'generation_config.json', 'Repair the file, or delete it')
  (source / 'generation_config.json').write_text('{}')
  open_source(source)


def test_target_exists(source, tmp_path):
  (tmp_path / 'ours').mkdir()
  with pytest.raises(ValueError, match='exists; choose another target'):
    import_checkpoint(open_source(source), tmp_path / 'ours', advance=quiet)
  assert not list((tmp_path / 'ours').iterdir())


def test_a_target_that_could_not_be_read_is_refused(source, tmp_path):
  with pytest.raises(ConfigError, match=r'TARGET .* must have no \\ in its path'):
    import_checkpoint(open_source(source), tmp_path / 'a\\b', advance=quiet)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['source']
  with pytest.raises(ConfigError, match=r'checkpoint .* must have no \\ in its path'):
    latest_checkpoint(tmp_path / 'a\\b')


def test_small_disk(source, tmp_path, monkeypatch):
  full = lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10)
  monkeypatch.setattr(target_module.shutil, 'disk_usage', full)
  with pytest.raises(OSError, match='needs about .* its disk has 10 left'):
    import_checkpoint(open_source(source), tmp_path / 'ours', advance=quiet)
  enough = open_source(source)
  room = int(1.2 * enough.nbytes)  # For codes, but not for what they are widened to.
  monkeypatch.setattr(target_module.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 0, room))
  with pytest.raises(OSError, match=f'needs about .* its disk has {room:,} left'):
    import_checkpoint(enough, tmp_path / 'ours', dtype='float32', advance=quiet)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['source']


@pytest.mark.parametrize('as_source', [False, True])
def test_what_no_conversion_has_left_is_not_emptied(source, tmp_path, as_source):
  partial = tmp_path / 'ours.partial'
  if as_source:
    source = source.rename(partial)
  else:
    partial.mkdir()
  (partial / 'notes.txt').write_text('mine')
  before = snapshot(partial)
  with pytest.raises(ConfigError, match='ours.partial, where the target would be built, holds something else'):
    import_checkpoint(open_source(source), tmp_path / 'ours', advance=quiet)
  assert snapshot(partial) == before and not (tmp_path / 'ours').exists()


def test_what_a_killed_conversion_has_left_is_emptied(tmp_path):
  with pytest.raises(KeyboardInterrupt), target_module.building(tmp_path / 'ours', needs=0) as partial:
    (partial / 'half').write_text('x')
    shutil.copytree(partial, tmp_path / 'left')
    raise KeyboardInterrupt
  (tmp_path / 'left').rename(partial)
  with target_module.building(tmp_path / 'ours', needs=0) as partial:
    (partial / 'whole').write_text('x')
  assert [path.name for path in (tmp_path / 'ours').iterdir()] == ['whole']


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--fp8'], '--fp8 would change nothing: that is for --export: --dtype=fp8 keeps codes that are FP8'),
        pytest.param(['--family=llama', '--shard_gb=2'], '--family, --shard_gb would change nothing: that is for --export', marks=pytest.mark.nightly),
        pytest.param(['--export', '--nomtp', '--seed=5'], '--mtp, --seed would change nothing: that is for an import', marks=pytest.mark.nightly),
    ],
)
def test_flags_of_the_other_direction_are_refused(flags, message, tmp_path):
  done = subprocess.run([*COMMAND, *flags, 'a', str(tmp_path / 'b')], capture_output=True, text=True)
  assert done.returncode == 1 and message in done.stderr


def test_a_checkpoint_of_ours_is_no_release(source, tmp_path):
  import_checkpoint(open_source(source), ours := tmp_path / 'ours', advance=quiet)
  with pytest.raises(ConfigError, match='is a checkpoint of this package already; --export gives'):
    open_source(ours)


COMMAND = [sys.executable, '-m', 'dsa_jax.convert']
LIMIT_FILES = 'import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))'


@pytest.mark.parametrize('direction', ['import', 'export'])
def test_full_disk(source, tmp_path, direction):
  """The system refuses to write on: the command says so, and leaves nothing."""
  import_checkpoint(open_source(source), tmp_path / 'ours', advance=quiet)
  what = ['--export', str(tmp_path / 'ours')] if direction == 'export' else [str(source)]
  call = f'{LIMIT_FILES}; sys.argv[0] = "convert"; import runpy; '
  call += 'runpy.run_module("dsa_jax.convert", run_name="__main__")'
  arguments = [sys.executable, '-c', call, *what, str(tmp_path / 'out')]
  done = subprocess.run(arguments, capture_output=True, text=True)
  assert done.returncode == 1, done.stderr
  assert 'out could not be written' in done.stderr.splitlines()[-1], done.stderr
  assert 'Traceback' not in done.stderr
  assert sorted(p.name for p in tmp_path.iterdir()) == ['ours', 'source']


def test_unreadable_while_converting(source, tmp_path):
  opened = open_source(source)
  os.truncate(source / 'model-00003-of-00003.safetensors', 5000)
  with pytest.raises(OSError, match='model-00003-of-00003.safetensors was cut short'):
    import_checkpoint(opened, tmp_path / 'ours', advance=quiet)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['source']


@pytest.mark.parametrize('direction', ['import', 'export'])
@pytest.mark.parametrize('kind', [KeyError, TypeError, ValueError])
def test_an_error_of_the_program_stays_what_it_is(source, tmp_path, monkeypatch, direction, kind):
  """It keeps its type and its traceback, and what was half written is removed all the same."""
  import_checkpoint(open_source(source), tmp_path / 'ours', advance=quiet)

  def turn_axes(tensor, x):
    del x
    raise kind(tensor.name)

  name = {'import': 'to_ours', 'export': 'to_theirs'}[direction]
  monkeypatch.setattr(Tensor, name, turn_axes)
  with pytest.raises(kind) as error:
    if direction == 'import':
      import_checkpoint(open_source(source), tmp_path / 'out', advance=quiet)
    else:
      export_checkpoint(open_checkpoint(tmp_path / 'ours'), tmp_path / 'out')
  assert error.type is kind
  assert 'turn_axes' in [entry.name for entry in error.traceback]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['ours', 'source']


@pytest.mark.parametrize(
    'error, becomes',
    [
        (OSError('no space'), OSError),
        (ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']"), OSError),
        (safetensors.SafetensorError('I/O error: File too large (os error 27)'), OSError),
        (ValueError('shapes differ'), ValueError),
        (KeyError('attn'), KeyError),
        (RuntimeError('28'), RuntimeError),
    ],
    ids=['system', 'tensorstore', 'safetensors', 'value', 'key', 'runtime'],
)
def test_only_what_the_system_refuses_could_not_be_written(tmp_path, error, becomes):
  target = tmp_path / 'out'
  with pytest.raises(becomes) as raised:
    with target_module.building(target, needs=0) as partial:
      (partial / 'half').write_text('x')
      raise error
  assert ('could not be written' in str(raised.value)) == (becomes is OSError)
  assert raised.value is error or raised.value.__cause__ is error
  assert not list(tmp_path.iterdir())


@pytest.mark.nightly
def test_kill(source, tmp_path):
  """SIGKILL at several moments: no target, or a whole one; the next run starts cleanly."""
  import_checkpoint(open_source(source), tmp_path / 'expected', advance=quiet)
  expected = snapshot(tmp_path / 'expected')
  target, partial, killed = tmp_path / 'ours', tmp_path / 'ours.partial', 0
  for n_files in (1, 30, 90):
    process = subprocess.Popen([*COMMAND, str(source), str(target)], stdout=subprocess.DEVNULL)
    while process.poll() is None:
      if sum(len(files) for *_, files in os.walk(partial)) >= n_files:
        process.send_signal(signal.SIGKILL)
        break
      time.sleep(0.001)
    killed += process.wait() == -signal.SIGKILL
    if target.exists():
      assert snapshot(target) == expected
      shutil.rmtree(target)
  assert killed >= 2
  subprocess.run([*COMMAND, str(source), str(target)], check=True, stdout=subprocess.DEVNULL)
  assert snapshot(target) == expected
  assert not partial.exists()


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
  return {
      str(p.relative_to(folder)): p.read_bytes()
      for p in folder.rglob('*')
      if p.is_file() and 'METADATA' not in p.name and p.name != 'commit_success.txt'
  }


@pytest.mark.parametrize('trials', [75, pytest.param(300, marks=pytest.mark.nightly)])
def test_fuzz(source, trials):
  """Damaged files: a ValueError, or, where the damage is in the weights, nothing to see."""
  rng = np.random.default_rng(0)
  files = sorted(p for p in source.iterdir())
  refused = 0
  for trial in range(trials):
    path = files[trial % len(files)]
    whole = path.read_bytes()
    damaged = bytearray(whole)
    kind = trial // len(files) % 4
    header = min(len(whole), 4000)
    if kind == 0:
      damaged = damaged[: rng.integers(len(whole))]
    elif kind == 1:
      for at in rng.integers(header, size=3):
        damaged[at] ^= 1 << rng.integers(8)
    elif kind == 2:  # A number of the text changes.
      digits = [i for i in range(header) if chr(damaged[i]).isdigit()]
      damaged[digits[rng.integers(len(digits))]] = ord(str(rng.integers(10)))
    else:
      at = rng.integers(header)
      damaged[at : at + rng.integers(1, 40)] = rng.bytes(rng.integers(40))
    path.write_bytes(damaged)
    try:
      open_source(source)
    except ValueError as error:
      refused += 1
      assert str(error).strip()
    path.write_bytes(whole)
  assert refused > 2 / 3 * trials
  open_source(source)


@pytest.mark.parametrize(
    'junk', ['[]', '3', '{"weight_map": []}', '{"weight_map": {"a": 1}}', '"', '']
)
def test_junk_index(source, junk):
  (source / INDEX).write_text(junk)
  fails(source, 'model.safetensors.index.json must be JSON with a weight_map')


@pytest.mark.parametrize('junk', ['[]', '3', '{}', 'null', '"', '', '[' * 100_000])
def test_junk_config(source, junk):
  (source / 'config.json').write_text(junk)
  fails(source, 'config.json')


def test_export_of_nothing(tmp_path):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match='neither a converted checkpoint nor RUN/checkpoints/ENTRY'):
    open_checkpoint(tmp_path / 'empty')
  with pytest.raises(ValueError, match='neither a converted checkpoint'):
    load_checkpoint(tmp_path / 'empty')


def test_export_as_another_family(source, tmp_path):
  import_checkpoint(open_source(source), tmp_path / 'ours', advance=quiet)
  with pytest.raises(ValueError, match="export as 'deepseek_v32'"):
    open_checkpoint(tmp_path / 'ours', 'glm_moe_dsa')


def test_interrupted_export_leaves_nothing(source, tmp_path):
  import_checkpoint(open_source(source), tmp_path / 'ours', advance=quiet)

  def stop(nbytes):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    export_checkpoint(open_checkpoint(tmp_path / 'ours'), tmp_path / 'out', advance=stop)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['ours', 'source']
