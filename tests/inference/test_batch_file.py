# SPDX-License-Identifier: Apache-2.0
"""A file of prompts is answered once, whatever interrupts it."""

import dataclasses
import datetime
import errno
import fcntl
import json
from unittest import mock

import jax.numpy as jnp
import laws
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.data.chat import ChatTemplate
from dsa_jax.data.text import VOCAB_SIZE
from dsa_jax.data.tokenizer import Rendered
from dsa_jax.inference.batch_file import AnswerFile, check_paths, moment_of, read_prompts
from dsa_jax.inference.sampler import SampleConfig, Sampler
from dsa_jax.parallel.processes import moment_of_job

CFG = dataclasses.replace(laws.CFG, vocab_size=VOCAB_SIZE, max_seq_len=64)
DRAWN = SampleConfig(max_new_tokens=6, temperature=1.0)
LINES = [
    {'prompt': 'one'},
    {'prompt': 'and two', 'id': 'b'},
    {'messages': [{'role': 'user', 'content': 'three'}], 'id': 3},
]


@pytest.fixture(scope='module')
def sampler():
  chat = ChatTemplate("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<bot>", {})
  return Sampler(laws.model_of(laws.weights(CFG), CFG), chat=chat)


@pytest.fixture
def prompts(tmp_path, sampler):
  path = tmp_path / 'prompts.jsonl'
  path.write_text('\n\n'.join(map(json.dumps, LINES)))
  return read_prompts(path, sampler.chat)


def answers_in(path) -> dict[tuple[int, int], dict]:
  lines = map(json.loads, path.read_bytes().splitlines())
  return {(line['prompt'], line['sample']): line for line in lines}


def test_answers(tmp_path, sampler, prompts):
  assert [prompt.text for prompt in prompts] == ['one', 'and two', '<user>three<bot>']
  out = tmp_path / 'sub' / 'answers.jsonl'
  answers = AnswerFile(out, sampler, prompts, DRAWN, 2)
  assert answers.n_left == 6
  completions = {(x.prompt, x.sample): x for x in answers.answer(slots=2)}
  written = answers_in(out)
  assert written.keys() == completions.keys() and len(written) == 6
  for at, line in written.items():
    assert line['text'] == completions[at].text and line['ids'] == completions[at].ids
    assert line.get('id') == LINES[at[0]].get('id') and line['ended_by'] in ('length', 'stop')


def test_what_was_answered_is_kept_and_the_rest_is_the_same(tmp_path, sampler, prompts):
  whole, out = tmp_path / 'whole.jsonl', tmp_path / 'answers.jsonl'
  list(AnswerFile(whole, sampler, prompts, DRAWN, 2).answer(slots=3))
  stopped = AnswerFile(out, sampler, prompts, DRAWN, 2).answer(slots=2)
  next(stopped), next(stopped)
  with pytest.raises(ConfigError, match='another process adds answers to .*answers.jsonl'):
    next(AnswerFile(out, sampler, prompts, DRAWN, 2).answer(slots=2))
  stopped.close()
  kept = out.read_bytes()
  assert kept.count(b'\n') == 2
  out.write_bytes(kept + b'{"prompt": 2, "sample": 0, "tex')  # A line that was never finished.
  again = AnswerFile(out, sampler, prompts, DRAWN, 2)
  assert again.n_left == 4
  assert len(list(again.answer(slots=1))) == 4
  assert out.read_bytes().startswith(kept)
  texts = lambda path: {at: (line['ids'], line['text']) for at, line in answers_in(path).items()}
  assert texts(out) == texts(whole)
  done = AnswerFile(out, sampler, prompts, DRAWN, 2, 'run/8', earlier='')  # An earlier version's.
  assert done.n_left == 0 and not list(done.answer(slots=2)) and texts(out) == texts(whole)


@pytest.mark.parametrize('change', ['config', 'prompt', 'samples', 'checkpoint', 'rotation', 'other'])
def test_answers_to_something_else_are_not_mixed_in(tmp_path, sampler, prompts, change):
  out = tmp_path / 'answers.jsonl'
  list(AnswerFile(out, sampler, prompts, DRAWN, 2).answer(slots=3))
  before, config, samples, checkpoint = out.read_bytes(), DRAWN, 2, ''
  if change == 'config':
    config = dataclasses.replace(DRAWN, seed=1)
  elif change == 'prompt':
    prompts = [prompts[0], prompts[1]._replace(text='and 2'), prompts[2]]
  elif change == 'samples':
    samples = 1
  elif change == 'checkpoint':
    checkpoint = 'another'
  elif change == 'rotation':
    cfg = dataclasses.replace(sampler.cfg, index_rope_factor=2.0, index_original_seq_len=8)
    sampler = Sampler(laws.model_of(laws.weights(cfg), cfg))
  else:
    before = b'{"something": "else"}\n'
    out.write_bytes(before)
  with pytest.raises(ConfigError, match='answers.jsonl, line [1-6] answers no prompt of this file'):
    AnswerFile(out, sampler, prompts, config, samples, checkpoint)
  assert out.read_bytes() == before


def test_answers_of_other_weights_at_the_same_path_are_not_mixed_in(tmp_path, sampler, prompts):
  out = tmp_path / 'answers.jsonl'
  list(AnswerFile(out, sampler, prompts, DRAWN, 1, 'run/8', weights='of a run').answer(slots=3))
  assert AnswerFile(out, sampler, prompts, DRAWN, 1, 'run/8', weights='of a run').n_left == 0
  for weights in 'of another', None:
    with pytest.raises(ConfigError, match='line 1 is by other weights.* Name another file'):
      AnswerFile(out, sampler, prompts, DRAWN, 1, 'run/8', weights=weights)
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  assert {line.pop('weights') for line in lines} == {'of a run'}
  out.write_text(''.join(json.dumps(line) + '\n' for line in lines))  # As of an earlier version.
  assert AnswerFile(out, sampler, prompts, DRAWN, 1, 'run/8', weights='of another').n_left == 0


def test_a_job_goes_on_with_the_date_on_which_it_was_begun(tmp_path, sampler):
  path, out = tmp_path / 'prompts.jsonl', tmp_path / 'answers.jsonl'
  path.write_text('\n'.join(map(json.dumps, LINES)))
  source = "{{ strftime_now('%d %b') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
  asked = lambda day: read_prompts(path, ChatTemplate(source, {}, datetime.datetime(2024, 2, day)))
  assert moment_of(out) is None
  list(AnswerFile(out, sampler, asked(28), DRAWN, 1).answer(slots=3))
  kept = moment_of_job(moment_of(out))
  assert kept == datetime.datetime(2024, 2, 28) and asked(kept.day)[2].text == '28 Febthree'
  assert AnswerFile(out, sampler, asked(kept.day), DRAWN, 1).n_left == 0
  assert {at: 'moment' in line for at, line in answers_in(out).items()} == {
      (0, 0): False, (1, 0): False, (2, 0): True
  }  # fmt: skip
  lines = [{k: x for k, x in line.items() if k != 'moment'} for line in answers_in(out).values()]
  out.write_text(''.join(json.dumps(line) + '\n' for line in lines))  # As of an earlier version.
  assert AnswerFile(out, sampler, asked(28), DRAWN, 1).n_left == 0
  with pytest.raises(ConfigError, match='writes the date .* what it began on another day needs another'):
    AnswerFile(out, sampler, asked(29), DRAWN, 1)


@pytest.mark.parametrize(
    'content',
    [
        '{"my": "notes"}', '{"prompt": "one"}', '{"id": "b", "prompt": "and two"}', 'notes', '\0',
        '{"prompt": 0, "sample": 0, "text": "of another file"}', '{"prompt": 3, "sample": 0, "te',
    ],
)  # fmt: skip
def test_no_other_file_is_emptied(tmp_path, sampler, prompts, content):
  """Nor one whose only line has no end, as if its writing had been interrupted."""
  out = tmp_path / 'notes.json'
  out.write_text(content)
  with pytest.raises(ConfigError, match='notes.json holds something else than answers: name another'):
    AnswerFile(out, sampler, prompts, DRAWN, 1)
  assert out.read_text() == content


def test_an_interrupted_first_line_is_dropped(tmp_path, sampler, prompts):
  out = tmp_path / 'answers.jsonl'
  list(AnswerFile(out, sampler, prompts, DRAWN, 1).answer(slots=1))
  for line in out.read_bytes().splitlines():
    for n in range(1, len(line) + 1):
      out.write_bytes(line[:n])
      assert AnswerFile(out, sampler, prompts, DRAWN, 1).n_left == 3


def test_answers_are_not_added_to_the_prompts(tmp_path):
  (tmp_path / 'prompts').write_text('{"prompt": "one"}')
  (tmp_path / 'link').symlink_to(tmp_path / 'prompts')
  for name in 'prompts', 'link':
    with pytest.raises(ConfigError, match='is the file of --prompts: name another file'):
      check_paths(tmp_path / 'prompts', tmp_path / name)
  check_paths(tmp_path / 'prompts', tmp_path / 'answers')


def test_a_prompt_without_finite_logits_is_the_only_one_without_an_answer(tmp_path, sampler, prompts):
  model = laws.model_of(laws.weights(CFG), CFG)
  model.embed[...] = model.embed[...].at[ord('w')].set(jnp.nan)
  broken, config = Sampler(model), dataclasses.replace(DRAWN, temperature=0.0)
  prompts = [prompts[0], prompts[1]._replace(text='and tw'), prompts[2]]
  whole, out = tmp_path / 'whole.jsonl', tmp_path / 'answers.jsonl'
  list(AnswerFile(whole, sampler, prompts, config, 1).answer(slots=1))
  for n_left in 3, 1:
    answers = AnswerFile(out, broken, prompts, config, 1)
    assert answers.n_left == n_left
    with pytest.raises(ConfigError, match='the logits behind prompt 1 are not finite'):
      list(answers.answer(slots=1))
  ids = lambda path: {at: line['ids'] for at, line in answers_in(path).items() if at != (1, 0)}
  assert ids(out) == ids(whole) and len(answers_in(out)) == 2


def test_a_prompt_that_is_too_long_writes_nothing(tmp_path, sampler, prompts):
  out = tmp_path / 'answers.jsonl'
  long = [*prompts, prompts[0]._replace(text='x' * 60)]
  with pytest.raises(ConfigError, match='prompt 3 has 61 tokens and 6 are to follow'):
    next(AnswerFile(out, sampler, long, DRAWN, 1).answer(slots=2))
  assert not out.exists()


@pytest.mark.parametrize(
    'line, message',
    [
        ('{"prompt": "a"', 'line 2: '),
        ('[1]', "line 2: expected an object with either a 'prompt' or 'messages'"),
        ('{"prompt": "a", "messages": []}', 'line 2: expected an object'),
        (r'{"prompt": "a", "id": "\ud800"}', 'line 2: .*surrogates not allowed'),
        ('{"prompt": ""}', "line 2: 'prompt' is ''; it must be a text"),
        ('{"prompt": 3}', "line 2: 'prompt' is 3; it must be a text"),
        ('{"prompt": "a", "tools": [{}]}', r"line 2: \['tools'\] are for 'messages'"),
        ('{"messages": [], "chat_template_kwargs": 3}', "line 2: 'chat_template_kwargs' is 3; it must be an object"),
        ('{"messages": 3}', "line 2: 'messages' is 3; it must be a list"),
        ('{"messages": [{"content": "a"}]}', "line 2: message 0 is .* must have a 'role'"),
    ],
)
def test_lines_that_are_no_prompts(tmp_path, sampler, line, message):
  path = tmp_path / 'prompts.jsonl'
  path.write_text('{"prompt": "a", "id": [1]}\n' + line + '\n')
  with pytest.raises(ConfigError, match=message):
    read_prompts(path, sampler.chat)


def test_a_line_gives_the_template_what_it_reads(tmp_path, caplog):
  chat = ChatTemplate('{{ messages[0].content }}{{ tools }}{{ documents }}{{ deep }}', {})
  message = {'messages': [{'role': 'user', 'content': 'a'}]}
  lines = message, message | {'tools': [1], 'documents': [2], 'chat_template_kwargs': {'deep': 3}, 'top_p': 1}
  path = tmp_path / 'prompts.jsonl'
  path.write_text('\n'.join(map(json.dumps, lines)))
  assert [prompt.text for prompt in read_prompts(path, chat)] == ['aNoneNone', 'a[1][2]3']
  assert all(isinstance(prompt.text, Rendered) for prompt in read_prompts(path, chat))
  assert "['top_p'] of its lines change nothing" in caplog.text


def test_prompts_with_one_id_are_answered(tmp_path, caplog):
  path = tmp_path / 'prompts.jsonl'
  path.write_text('{"prompt": "a", "id": [1]}\n' * 3)
  assert [prompt.name for prompt in read_prompts(path, None)] == [[1]] * 3
  [record] = caplog.records
  assert "2 lines have an 'id' of a line before, the first of them line 2" in record.message


def test_a_line_that_another_process_has_added_meanwhile(tmp_path, sampler, prompts, monkeypatch):
  """Where the file system knows no locks, too."""
  out = tmp_path / 'answers.jsonl'
  answers = AnswerFile(out, sampler, prompts, DRAWN, 1)
  out.write_text('{}\n')
  monkeypatch.setattr(fcntl, 'flock', mock.Mock(side_effect=OSError(errno.ENOTSUP, 'no locks')))
  with pytest.raises(ConfigError, match='another process adds answers to .*answers.jsonl'):
    next(answers.answer(slots=2))
  assert out.read_text() == '{}\n'


def test_files_without_prompts_and_checkpoints_without_templates(tmp_path, sampler):
  path = tmp_path / 'prompts.jsonl'
  path.write_text('\n')
  with pytest.raises(ConfigError, match='prompts.jsonl holds no prompt'):
    read_prompts(path, sampler.chat)
  path.write_text(json.dumps(LINES[2]))
  with pytest.raises(ConfigError, match='line 1: the checkpoint has no chat template'):
    read_prompts(path, None)
