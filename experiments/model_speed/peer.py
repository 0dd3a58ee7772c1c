# SPDX-License-Identifier: Apache-2.0
"""Measures prefill and decoding beside transformers, on the same weights: one core and one process each.

  python3.11 -m venv PEER && PEER/bin/pip install transformers==5.24.0 torch==2.13.0
  python experiments/model_speed/peer.py --peer=PEER/bin/python [--baseline=FOLDER]

The checkpoint is random: DeepSeek-V3.2's form at a width of 512. Both take the tokens that are likeliest,
and the first of them, and the logits of the prompt, must be alike.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = dict(
    architectures=['DeepseekV32ForCausalLM'], model_type='deepseek_v32', dtype='float32',
    vocab_size=4096, hidden_size=512, intermediate_size=1024, moe_intermediate_size=256,
    num_hidden_layers=6, first_k_dense_replace=1, num_attention_heads=16, num_key_value_heads=16,
    q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    index_n_heads=8, index_head_dim=64, index_topk=512, n_routed_experts=8, n_shared_experts=1,
    num_experts_per_tok=2, n_group=2, topk_group=1, norm_topk_prob=True, scoring_func='sigmoid',
    topk_method='noaux_tc', routed_scaling_factor=2.5, moe_layer_freq=1, hidden_act='silu',
    attention_bias=False, attention_dropout=0.0, tie_word_embeddings=False,
    initializer_range=0.02, bos_token_id=0, eos_token_id=1, ep_size=1,
    num_nextn_predict_layers=0, use_cache=True, rms_norm_eps=1e-6, rope_theta=10000,
    rope_scaling=None, max_position_embeddings=32_768,
)  # fmt: skip
NUMBERS = 'prefill', 'decode'


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--peer', required=True, help='a Python with transformers and torch')
  parser.add_argument('--baseline', type=pathlib.Path, help='another checkout of the package')
  parser.add_argument('--contexts', type=int, nargs='*', default=[1024, 4096, 16_384])
  parser.add_argument('--peer_up_to', type=int, default=4096, help='the longest context of the peer')
  parser.add_argument('--turns', type=int, default=3)
  parser.add_argument('--tokens', type=int, default=16)
  parser.add_argument('--core', type=int, default=1)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    theirs, ours = f'{folder}/released', f'{folder}/converted'
    torch = [args.peer, str(HERE / 'peer_torch.py')]
    subprocess.run([*torch, 'make', theirs, json.dumps(CONFIG)], check=True, env=environment(ROOT))
    convert = [sys.executable, '-m', 'dsa_jax.convert', theirs, ours]
    subprocess.run(convert, check=True, env=environment(ROOT))
    mine = [sys.executable, str(HERE / 'peer_ours.py'), ours]
    sides = {'ours': (mine, ROOT), 'theirs': ([*torch, 'run', theirs], ROOT)}
    if args.baseline:
      sides['before'] = mine, args.baseline
    results = {}
    for context in args.contexts:
      here = {k: v for k, v in sides.items() if k != 'theirs' or context <= args.peer_up_to}
      runs = {name: [] for name in here}
      for _ in range(args.turns):
        for name, (command, root) in here.items():
          runs[name].append(run(command, root, context, args))
      results[context] = {name: fastest(of_side) for name, of_side in runs.items()}
      check(results[context])
      print_row(context, results[context])
      (HERE / 'peer.json').write_text(json.dumps(results, indent=1) + '\n')


def run(command: list[str], root: pathlib.Path, context: int, args) -> dict:
  command = ['taskset', '-c', str(args.core), *command, str(context), str(args.tokens), str(args.core)]
  done = subprocess.run(
      command, check=True, text=True, stdout=subprocess.PIPE, env=environment(root)
  )
  return json.loads(done.stdout.splitlines()[-1])


def environment(root: pathlib.Path) -> dict[str, str]:
  one_thread = {'OMP_NUM_THREADS': '1', 'XLA_FLAGS': '--xla_cpu_multi_thread_eigen=false'}
  return os.environ | one_thread | {'PYTHONPATH': str(root)}


def fastest(runs: list[dict]) -> dict:
  """Returns the least seconds of the processor and of the wall, and what does not change."""
  least = {name: [min(run[name][i] for run in runs) for i in (0, 1)] for name in NUMBERS}
  return runs[0] | least


def check(sides: dict[str, dict]):
  """Raises if the logits of the prompt, or the first token, are not those of the other side."""
  if 'theirs' not in sides:
    return
  ours, theirs = sides['ours'], sides['theirs']
  farthest = max(abs(a - b) for a, b in zip(ours['logits'], theirs['logits']))
  if farthest > 0.05 or ours['ids'][0] != theirs['ids'][0]:
    raise SystemExit(f'the two sides differ: logits by {farthest}, {ours["ids"]} {theirs["ids"]}')


def print_row(context: int, sides: dict[str, dict]):
  for name in NUMBERS:
    line = f'{context:6d} {name}: ours {sides["ours"][name][0]:.4f} s of the processor'
    for other in ('theirs', 'before'):
      if other in sides:
        ratio = sides[other][name][0] / sides['ours'][name][0]
        line += f', {other} {sides[other][name][0]:.4f} ({ratio:.2f} times)'
    print(line, flush=True)


if __name__ == '__main__':
  main()
