# SPDX-License-Identifier: Apache-2.0
"""Texts that end a text, however it is cut into pieces."""

import itertools

import pytest

from dsa_jax.inference.stopping import StopTexts


@pytest.mark.parametrize(
    'stops, want',
    [
        ((), 'aabaac'),
        (('c',), 'aabaa'),
        (('aac',), 'aab'),
        (('baad', 'x'), 'aabaac'),  # It only begins in the text.
        (('ba', 'ab'), 'a'),  # The one that begins first counts.
        (('cd',), 'aabaac'),
        (('aa',), ''),
    ],
)
def test_however_the_text_comes(stops, want):
  """All ways to cut the text into pieces give the same, and what is shown is never taken back."""
  text = 'aabaac'
  for cuts in itertools.product([False, True], repeat=len(text) - 1):
    ends = [i + 1 for i, is_cut in enumerate(cuts) if is_cut] + [len(text)]
    pieces = [text[a:b] for a, b in zip([0, *ends], ends)]
    state, shown = StopTexts(stops), ''
    for piece in pieces:
      shown += state.push(piece)
      assert want.startswith(shown)
      if state.reached:
        break
    assert shown + state.end('') == want and state.reached == (want != text)


def test_the_last_piece_may_end_it():
  state = StopTexts(('no',))
  assert state.push('yes n') == 'yes ' and state.end('o, never') == ''
