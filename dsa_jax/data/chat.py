# SPDX-License-Identifier: Apache-2.0
"""Turns a conversation into a text, by the template of a checkpoint."""

from collections.abc import Mapping, Sequence
import datetime
import json
import pathlib
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from dsa_jax.config import ConfigError
from dsa_jax.data.tokenizer import Rendered
from dsa_jax.data.tokenizer_files import text_of_token
from dsa_jax.json_files import read_object

Message = Mapping[str, Any]  # 'role', such as 'user', and 'content'.


class ChatTemplate:
  """A template in Jinja, as Hugging Face's checkpoints bring it along.

  It comes from whoever made the checkpoint, so it runs in Jinja's sandbox.

  Source:
    What a template may use: https://huggingface.co/docs/transformers/chat_templating_writing.
  """

  def __init__(
      self, source: str, tokens: Mapping[str, str], moment: datetime.datetime | None = None
  ):
    """Compiles a template.

    Args:
      source: The template.
      tokens: Special tokens that it may name, such as 'bos_token'.
      moment: What it takes for now if it writes a date. None: what the clock says each time.

    Raises:
      ConfigError: The template is no Jinja.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters['tojson'] = _to_json
    environment.globals |= {'raise_exception': _refuse, 'strftime_now': self._now}
    self._tokens = dict(tokens)
    self.moment = moment if 'strftime_now' in source else None  # None as well: it writes no date.
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateError as error:
      raise ConfigError(f'the chat template is no Jinja template: {error}.') from error

  def __call__(self, messages: Sequence[Message], **choices: Any) -> Rendered:
    """Returns the text that the assistant is to continue.

    Args:
      messages: The conversation. What is None in one counts as absent.
      **choices: What else a template may read, such as `tools`, or `enable_thinking`.

    Raises:
      ConfigError: The template refuses the messages, or they are no messages.
    """
    for i, message in enumerate(messages):
      if not isinstance(message, Mapping) or not isinstance(message.get('role'), str):
        raise ConfigError(f"message {i} is {message!r}: it must have a 'role' and a 'content'.")
    if not messages:
      raise ConfigError('there is no message: there must be one at least.')
    try:
      given = {'tools': None, 'documents': None} | self._tokens | choices
      messages = [{key: x for key, x in message.items() if x is not None} for message in messages]
      return Rendered(self._template.render(messages=messages, add_generation_prompt=True, **given))
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
      raise ConfigError(f'the chat template refuses the messages: {error}.') from error

  def _now(self, form: str) -> str:
    return (self.moment or datetime.datetime.now()).strftime(form)


def prompt_of(messages: Sequence[Message], chat: ChatTemplate | None, **choices: Any) -> Rendered:
  """Returns the text by which a model goes on with a conversation; see `ChatTemplate`.

  Raises:
    ConfigError: There is no template, or it refuses the messages.
  """
  if chat is None:
    raise ConfigError(
        'the checkpoint has no chat template (chat_template.jinja, or chat_template in '
        'tokenizer_config.json): give a prompt in place of messages.'
    )
  return chat(messages, **choices)


def find_chat_template(
    folder: pathlib.Path, moment: datetime.datetime | None = None
) -> ChatTemplate | None:
  """Returns the template of a checkpoint, a release or the origin of a run; None if it has none.

  Some write the date into prompts. With a moment it is the same in all prompts of a job.

  Raises:
    ConfigError: A file is damaged.
  """
  settings = read_object(folder / 'tokenizer_config.json')
  path, source = folder / 'chat_template.jinja', settings.get('chat_template')
  try:
    if path.exists():
      source = path.read_text(encoding='utf-8')
    elif isinstance(source, list):  # Several, by name.
      source = {entry['name']: entry['template'] for entry in source}.get('default')
  except (UnicodeDecodeError, KeyError, TypeError) as error:
    raise ConfigError(f'{folder}: the chat template is damaged: {type(error).__name__} {error}.') from error
  if not source:
    return None
  if not isinstance(source, str):
    raise ConfigError(f'{folder}: the chat template is a {type(source).__name__}; it must be a text.')
  others = read_object(folder / 'special_tokens_map.json')
  tokens = {}  # Templates know them by name; what tokenizer_config.json leaves open, the other file says.
  for name, value in (*others.items(), *settings.items()):
    if name.endswith('_token') and (token := text_of_token(value)):
      tokens[name] = token
  return ChatTemplate(source, tokens, moment)


class _Generation(jinja2.ext.Extension):
  """Reads what some templates mark as the words of the assistant like any other text."""

  tags = {'generation'}

  def parse(self, parser: Any) -> Any:
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


def _refuse(message: str):
  raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
