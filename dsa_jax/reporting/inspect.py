# SPDX-License-Identifier: Apache-2.0
"""One layer of a model on one text: what the indexer scores, what is selected, what attention is."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.config import ConfigError
from dsa_jax.data.tokenizer import Tokenizer, usual_tokenizer
from dsa_jax.kernels import dense_attention, index_scores
from dsa_jax.kernels.groups import by_group
from dsa_jax.kernels.mean_attention import mean_attention
from dsa_jax.kernels.visibility import selected_keys, visible_keys
from dsa_jax.nn.attention.types import Mode
from dsa_jax.nn.transformer import Transformer
from dsa_jax.selection import Candidates, check_rule, find_rule


class Inspection(NamedTuple):
  """What `inspect` returns. Rows are queries and columns are keys."""

  ids: np.ndarray  # The tokens, [T].
  layer: int
  rule: str
  topk: int  # How many keys a query may select.
  scores: np.ndarray  # The indexer's, [T, T]. They are NaN where a query does not see the key.
  selection: np.ndarray  # The share of key heads for which the rule selects the key, [T, T]; 0 or 1 as a rule.
  attention: np.ndarray  # The probabilities of dense attention, [T, T], averaged over the heads.
  mass: np.ndarray  # The share of each query's attention on selected keys, [T].

  @property
  def captured(self) -> float:
    """The share of the attention on selected keys, over the queries that have to leave some out.

    It is NaN if there is no such query.
    """
    mass = self.mass[self.topk :]
    return float(mass.mean()) if mass.size else float('nan')

  def draw(self) -> Any:
    """Returns a matplotlib figure of the three side by side."""
    from matplotlib import pyplot  # Here, because it is slow to import.

    unseen = np.isnan(self.scores)
    low = np.nanmin(self.scores, axis=-1, keepdims=True)
    images = {
        'index scores': self.scores - low,
        f'selection: {self.topk} tokens': np.where(unseen, np.nan, self.selection),
        'true attention (log scale)': np.log10(np.where(unseen, np.nan, self.attention) + 1e-5),
    }
    size = {'figsize': (15, 5.2), 'sharex': True, 'sharey': True, 'layout': 'constrained'}
    figure, panels = pyplot.subplots(1, len(images), **size)
    for panel, (title, image) in zip(panels, images.items()):
      panel.imshow(image, cmap='viridis', interpolation='nearest')
      panel.set(title=title, xlabel='key position')
    panels[0].set_ylabel('query position')
    return figure


def inspect(
    model: Transformer,
    text: str | Sequence[int],
    layer: int,
    *,
    rule: str = 'indexer',
    tokenizer: Tokenizer | None = None,
    backend: str = 'xla',
) -> Inspection:
  """Looks into one layer while the model reads a text densely.

  Args:
    model: The model.
    text: One document, or its ids.
    layer: The number of the layer.
    rule: What selects, a key of `dsa_jax.selection.RULES`.
    tokenizer: Turns text into ids. None reads bytes, where those are what the model knows.
    backend: Which kernels run.

  Raises:
    ConfigError: There is no such layer or rule, the layer has no indexer, or the text is empty, too
      long, holds an id that is no token, or needs a tokenizer.
  """
  check_rule(rule)
  ids = (tokenizer or usual_tokenizer(model.cfg.vocab_size)).encode(text) if isinstance(text, str) else text
  ids = _checked(model, np.asarray(ids))
  c = _candidates(model, jnp.asarray(ids)[None], layer, backend)
  visible = visible_keys(c.start, c.end, jnp.arange(len(ids)))
  scores = index_scores(c.index_q, c.index_k, c.index_weights)
  _, lse = dense_attention(
      c.q, c.k, c.k[..., :1], c.start, c.end, sm_scale=c.sm_scale, backend=backend
  )
  selected = find_rule(rule)(c)
  n_selections = selected.shape[2] if selected.ndim == 4 else 1
  selected = selected.reshape(*selected.shape[:2], n_selections, -1)
  of_heads = *(by_group(x, n_selections) for x in (c.q, c.k, lse)), jnp.moveaxis(selected, 2, 0)
  attention = [mean_attention(q, k, lse, visible, c.sm_scale) for q, k, lse, _ in zip(*of_heads)]
  selection = [selected_keys(indices, len(ids)) for *_, indices in zip(*of_heads)]
  attention, selection = jnp.stack(attention), jnp.stack(selection)
  mass = jnp.sum(attention * selection, axis=-1)
  scores = jnp.where(visible, scores, jnp.nan)
  means = (jnp.mean(x, axis=0) for x in (selection, attention, mass))
  return Inspection(ids, layer, rule, c.topk, *(np.asarray(x[0]) for x in (scores, *means)))


def _candidates(model: Transformer, tokens: jax.Array, layer: int, backend: str) -> Candidates:
  """Returns what a rule may look at in a layer, after dense attention in those before it."""
  block, keys = model.block(layer), model.layer_keys()
  end = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.int32)[None]
  start, x = jnp.zeros_like(end), model.into_streams(model.embedded(tokens))
  mode = Mode(attention='dense', backend=backend)
  if block.attn.indexer is None:
    full = model.cfg.full_layers
    reason = f'those of layers {list(full)} select' if full else 'no layer selects'
    raise ConfigError(f'{layer=} has no indexer; {reason}.')
  kept = {}  # The rows that later layers read.
  for i in range(layer):
    before = model.block(i)
    rows = kept.get(before.attn.reads)
    x, _, report = before(x, start, end, keys[i], mode, rows=rows)
    kept[before.attn.keeps] = report.rows
  views = block.attn.views(block.attention_input(x), start, end, kept.get(block.attn.reads))
  return views.candidates(start, end, keys[layer], model.cfg, backend)


def _checked(model: Transformer, ids: np.ndarray) -> np.ndarray:
  if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
    raise ConfigError(f'the ids must be integers in one dimension; got {ids.dtype} {ids.shape}.')
  if not 1 <= ids.size <= model.cfg.max_seq_len:
    raise ConfigError(
        f'the text has {ids.size} tokens; there must be 1 to {model.cfg.max_seq_len=} of them.'
    )
  if ids.min() < 0 or ids.max() >= model.cfg.vocab_size:
    raise ConfigError(
        f'the text holds ids from {ids.min()} to {ids.max()}; they must be within 0 and '
        f'{model.cfg.vocab_size - 1}. Give the tokenizer of the model.'
    )
  return ids.astype(np.int32)
