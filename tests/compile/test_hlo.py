# SPDX-License-Identifier: Apache-2.0
"""Bytes between devices are read from compiled programs as they are written."""

import pytest

from dsa_jax.compile.hlo import Collective, collectives, total_bytes

MESH = {'fsdp': 2, 'context': 2, 'tensor': 2}
PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[3,4])) -> (s32[], f32[3,4]) {
  %part = f32[3,4]{1,0:T(8,128)} reduce-scatter(%x), channel_id=1, GROUPS, to_apply=%add
  ROOT %out = (s32[], f32[3,4]) tuple(%i, %part)
}

%condition (state: (s32[], f32[3,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(5), metadata={}
  ROOT %more = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: bf16[2,2]) -> bf16[8,2] {
  %loop = (s32[], f32[3,4]) while(%start), condition=%condition, body=%body
  %begun = (bf16[2,2], bf16[8,2]) all-gather-start(%p), replica_groups={}, dimensions={0}
  ROOT %done = bf16[8,2] all-gather-done(%begun)
}
"""


@pytest.mark.parametrize(
    'groups, axes',
    [
        ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', ('fsdp',)),
        ('replica_groups=[4,2]<=[8]', ('tensor',)),
        ('replica_groups=[2,4]<=[2,2,2]T(1,0,2)', ('fsdp', 'tensor')),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ('fsdp',)),
    ],
)
def test_collectives_are_read_with_their_axes_and_loops(groups, axes):
  exchanges = collectives(PROGRAM.replace('GROUPS', groups), MESH)
  summed = 48 * 2 ** len(axes)
  assert exchanges == [
      Collective('reduce-scatter', axes, 'f32[3,4]', summed, 5),
      Collective('all-gather', tuple(MESH), 'bf16[8,2]', 32, 1),
  ]
  assert total_bytes(exchanges)[f'reduce-scatter over {", ".join(axes)}'] == 5 * summed


def test_a_loop_must_say_how_often_it_runs():
  with pytest.raises(ValueError, match='reduce-scatter of .* is in a loop that does not say'):
    collectives(PROGRAM.replace('constant(5)', 'parameter(0)'), MESH)


def test_fused_scatters_and_ragged_exchanges():
  program = """HloModule jit_step

%all-reduce-scatter.1 (a: f32[8,2]) -> f32[4,2] {
  %summed = f32[8,2] all-reduce(%a), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %share = f32[4,2] dynamic-slice(%summed, %i), dynamic_slice_sizes={4,2}
}

ENTRY %main (p: bf16[6,2]) -> bf16[48,2] {
  %share = f32[4,2] fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
  %rows = bf16[6,2] bitcast(%p)
  ROOT %out = bf16[48,2] ragged-all-to-all(%rows, %zeros, %a, %b, %c, %d), replica_groups={{0,1,2,3,4,5,6,7}}
}
"""
  assert collectives(program, MESH) == [
      Collective('reduce-scatter', ('tensor',), 'f32[8,2]', 64, 1),
      Collective('ragged-all-to-all', tuple(MESH), 'bf16[6,2]', 24, 1),
  ]
