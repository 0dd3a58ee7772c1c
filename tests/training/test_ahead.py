# SPDX-License-Identifier: Apache-2.0
"""Programs compiled ahead are those that a run calls, and none is compiled twice."""

import collections
import functools
import threading

import jax
import pytest

from configs import quickstart
from dsa_jax import train
from dsa_jax.config import ModelConfig
from dsa_jax.training import run
from dsa_jax.training.ahead import Ahead
from dsa_jax.training.optim import OptimConfig
from dsa_jax.training.stages import STAGES
from dsa_jax.training.state import abstract_state, init_params, new_state

SMALL = ModelConfig(
    vocab_size=258, dim=16, n_layers=1, n_dense_layers=1, inter_dim=16, n_heads=2, q_lora_rank=8,
    kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, index_n_heads=2,
    index_head_dim=8, index_topk=8, max_seq_len=32, original_seq_len=32, dtype='float32',
)


class Program:
  """Stands for what lowers; remembers whether and where it was compiled."""

  def __init__(self, error: Exception | None = None):
    self.error, self.thread = error, None

  def __call__(self):
    return self

  def compile(self):
    self.thread = threading.current_thread()
    if self.error:
      raise self.error


def test_compiles_from_the_first_on_in_another_thread():
  programs = {name: Program() for name in 'abc'}
  with Ahead(programs, None) as ahead:
    ahead.wait('c')  # Nothing has begun.
    ahead.begin('b')
    ahead.begin('a')  # Only the first call counts.
    ahead.wait('c')
    assert programs['b'].thread is programs['c'].thread is not threading.main_thread()
    ahead.wait()
  assert programs['a'].thread is None


def test_a_program_that_fails_does_not_stop_the_others():
  programs = {'a': Program(ValueError('no')), 'b': Program()}
  with Ahead(programs, None) as ahead:
    ahead.begin('a')
    ahead.wait()
  assert programs['b'].thread is not None


def test_the_end_of_a_run_does_not_wait_for_what_has_not_begun():
  blocked, last = threading.Event(), Program()
  programs = {'a': lambda: blocked.wait() and Program(), 'b': last}
  with pytest.raises(KeyboardInterrupt):
    with Ahead(programs, None) as ahead:
      ahead.begin('a')
      threading.Timer(0.2, blocked.set).start()
      raise KeyboardInterrupt
  assert last.thread is None


@pytest.mark.parametrize('stage', STAGES)
def test_the_abstract_state_is_like_the_real_one(stage):
  trains, optim = STAGES[stage].trains, OptimConfig()
  real = new_state(init_params(SMALL, seed=0), trains, optim, seed=0)
  like = abstract_state(SMALL, trains, optim)
  assert jax.tree.structure(real) == jax.tree.structure(like)
  for x, y in zip(jax.tree.leaves(real), jax.tree.leaves(like)):
    assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
    assert x.weak_type == y.weak_type


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, batch, rates):
  """Stands for the real one: it takes the same, is compiled in no time and learns nothing."""
  loss = rates['backbone'] + batch.tokens.mean()
  return state._replace(step=state.step + 1), {'lm_loss': loss}


def test_no_program_of_a_run_is_compiled_twice(tmp_path, monkeypatch):
  monkeypatch.setattr(run, 'make_train_step', lambda *_, **__: train_step)
  config = quickstart.get_config('tiny')
  config.update(workdir=str(tmp_path), recipe=('dense', 'baseline'))
  config.model.update({name: getattr(SMALL, name) for name in config.model})
  for name in config.recipe:
    config.stages[name].update(seq_len=32, steps=3)
  config.report.update(seq_len=32)
  compiled = collections.Counter()

  def listen(event, _, fun_name='', **__):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled[fun_name, threading.current_thread() is threading.main_thread()] += 1

  jax.monitoring.register_event_duration_secs_listener(listen)
  results = train.train(config)
  jax.monitoring.unregister_event_duration_listener(listen)
  assert compiled['jit(train_step)', True] == 1 and compiled['jit(score_batch)', False] == 1
  assert compiled['jit(look_batch)', False] == 1 and not compiled['jit(look_batch)', True]
  assert not compiled['jit(train_step)', False] and not compiled['jit(score_batch)', True]
  assert 0 < results['validation_bits']['dense_before'] < 10
