"""Recipes: what is read, what is refused and how that is said."""

GOOD = """\
version: 1
name: code-and-chat
base: mistralai/Mistral-7B-v0.1
adapters:
  - someone/many-loras/chat/v3
  - {ref: me/sql-lora@3f2a, name: sql}
  - {search: {skill: code, rank: 8..64, min_score: {humaneval: 30}}, limit: 3}
method: {type: learn, budget: 40}
data:
  train: {path: examples.jsonl, input: instruction, output: response, limit: 64, select: random}
  test: {path: heldout.jsonl, input: instruction, output: response}
  template: "{{ input }} "
evaluate: [nll, exact_match]
output: {path: out/code-and-chat, rank: 64, dtype: bfloat16}
publish: {repo: me/code-and-chat, private: true, license: apache-2.0}
seed: 0
device: auto
"""

LINEAR = """\
version: 1
name: half-and-half
base: mistral-7b
adapters:
  - {ref: ./one, coefficient: 0.5}
  - {ref: ./two, coefficient: 0.5}
method: {type: linear}
output: {path: out}
"""
