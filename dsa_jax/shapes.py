# SPDX-License-Identifier: Apache-2.0
"""The alphabet of the axes, used in annotations and in einsum equations alike.

| letter | axis                                | letter | axis                          |
| ------ | ----------------------------------- | ------ | ----------------------------- |
| B      | batch                               | N      | `qk_nope_head_dim`            |
| T      | query tokens                        | R      | `qk_rope_head_dim`            |
| S      | key tokens (S = T in training)      | V      | `v_head_dim`, a value's width |
| K      | selected tokens, `index_topk`       | E      | a width named where it is made|
| D      | model width, `dim`                  | I      | `index_n_heads`               |
| H      | attention heads                     | J      | `index_head_dim`              |
| G      | key heads (G divides H)             | L      | layers                        |
| M      | residual streams                    |        |                               |
| Q      | `q_lora_rank`                       | W      | vocabulary                    |
| C      | `kv_lora_rank`                      | F, X   | feed-forward width, experts   |
"""
