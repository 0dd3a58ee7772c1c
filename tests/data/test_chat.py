# SPDX-License-Identifier: Apache-2.0
"""Conversations become texts by a checkpoint's own template."""

import datetime
import json

import pytest

from dsa_jax.config import ConfigError
from dsa_jax.data.chat import ChatTemplate, find_chat_template

CHAT_ML = """{% for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('no role is called ' + message['role']) }}
    {%- endif %}
<|im_start|>{{ message['role'] }}
{% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ASKED = [{'role': 'system', 'content': 'Be <brief>.'}, {'role': 'user', 'content': 'Why?'}]
WANT = '<|im_start|>system\nBe <brief>.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n'


def test_a_conversation_as_chat_ml():
  assert ChatTemplate(CHAT_ML, {})(ASKED) == WANT


def test_what_templates_may_use():
  source = (
      "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
      "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y') }}{{ eos_token is defined }}"
  )
  message = {'role': 'user', 'content': 'é<'}
  year = datetime.datetime.now().year
  assert ChatTemplate(source, {'bos_token': '<s>'})([message, message]) == (
      f'<s>{{"role": "user", "content": "é<"}}{year}False'
  )


def test_what_is_none_in_a_message_is_absent():
  """As in `transformers` 5: a call of a tool has no content."""
  template = ChatTemplate("{% for m in messages %}{{ m.content }}{{ 'content' in m }}{{ m.calls }};{% endfor %}", {})
  said = [{'role': 'assistant', 'content': None, 'calls': 1}, {'role': 'user', 'content': 'a'}]
  assert template(said) == 'False1;aTrue;' and 'content' in said[0]


def test_what_is_set_in_a_generation_stays_there():
  source = "{% set x = 'out' %}{% generation %}{% set x = 'in' %}{{ x }}{% endgeneration %}{{ x }}"
  assert ChatTemplate(source, {})(ASKED) == 'inout'


def test_templates_know_every_token_that_has_a_name(tmp_path):
  tokens = {'sep_token': '<sep>', 'image_token': {'content': '<image>'}, 'add_bos_token': True, 'cls_token': None}
  files = {'tokenizer_config': tokens | {'chat_template': '{{ sep_token }}{{ image_token }}{{ cls_token }}'},
           'special_tokens_map': {'cls_token': '<cls>', 'sep_token': '<other>'}}
  for name, values in files.items():
    (tmp_path / f'{name}.json').write_text(json.dumps(values))
  assert find_chat_template(tmp_path)(ASKED) == '<sep><image><cls>'


def test_tools_and_documents_are_none():
  source = "{{ tools is none }} {{ documents is none }}{% if tools is not none %}{{ tools[0] }}{% endif %}"
  assert ChatTemplate(source, {})(ASKED) == 'True True'
  with pytest.raises(ConfigError, match='refuses the messages: .*division'):
    ChatTemplate('{{ 1 / 0 }}', {})(ASKED)


def test_a_job_has_one_date(tmp_path):
  """Whatever the clock says; and only a template that asks for it has one."""
  moment = datetime.datetime(2024, 2, 29, 23, 59, 58)
  dated = ChatTemplate("{{ strftime_now('%d %b %Y, %S') }}", {}, moment)
  assert dated(ASKED) == '29 Feb 2024, 58' and dated.moment == moment
  (tmp_path / 'chat_template.jinja').write_text(CHAT_ML)
  assert find_chat_template(tmp_path, moment).moment is None


@pytest.mark.parametrize('place', ['jinja', 'text', 'list'])
def test_where_checkpoints_keep_it(tmp_path, place):
  settings = {'eos_token': {'content': '</s>'}}
  source = CHAT_ML + '{{ eos_token }}{{ bos_token }}'
  if place == 'jinja':  # It counts before the other.
    (tmp_path / 'chat_template.jinja').write_text(source)
    settings['chat_template'] = 'no'
  elif place == 'text':
    settings['chat_template'] = source
  else:
    others = [{'name': 'tool_use', 'template': 'no'}, {'name': 'default', 'template': source}]
    settings['chat_template'] = others
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  (tmp_path / 'special_tokens_map.json').write_text(json.dumps({'bos_token': '<s>'}))
  assert find_chat_template(tmp_path)(ASKED) == WANT + '</s><s>'


def test_without_one(tmp_path):
  assert find_chat_template(tmp_path) is None


@pytest.mark.parametrize('source', [[{'name': 'default'}], [3], {'default': 'x'}])
def test_damaged_files_are_named(tmp_path, source):
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'chat_template': source}))
  with pytest.raises(ConfigError, match='the chat template is (damaged: (Key|Type)Error|a dict)'):
    find_chat_template(tmp_path)


@pytest.mark.parametrize(
    'source, messages, message',
    [
        ('{% if %}', ASKED, 'is no Jinja template'),
        (CHAT_ML, [{'role': 'judge', 'content': ''}], 'refuses the messages: no role is called judge'),
        ('{{ messages[0].content + 1 }}', ASKED, 'refuses the messages'),
        ('{{ messages.append(1) }}', ASKED, 'refuses the messages'),  # Templates change nothing.
        (CHAT_ML, [], 'there is no message'),
        (CHAT_ML, [{'content': 'Why?'}], "message 0 is .*: it must have a 'role'"),
    ],
)
def test_mistakes(source, messages, message):
  with pytest.raises(ConfigError, match=message):
    ChatTemplate(source, {})(messages)
