"""``lorareg data preview``: rows as the base will see them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny
from tests.cli.conftest import ROOT, Kitchen, Lorareg, write_rows


def factory(kitchen: Kitchen, **changes: Any) -> Path:
    """A factory of two adapters on the kitchen's rows, with ``changes``."""
    plain = [{"text": "once upon a time"}, {"text": ""}, {"text": "ab"}]
    text = "".join(json.dumps(row) + "\n" for row in plain)
    (kitchen / "text.jsonl").write_text(text, "utf-8")
    data: dict[str, Any] = {
        "version": 1,
        "name": "two",
        "base": "./tiny-llama",
        "adapters": [
            {
                "name": "pairs",
                "training": {"batch_size": 4},
                "data": {
                    "train": {"path": "train.jsonl"},
                    "validation": 0.2,
                    "test": {"path": "test.jsonl"},
                    "eos": True,
                },
            },
            {
                "name": "plain",
                "training": {"packing": True},
                "data": {"train": {"path": "text.jsonl", "text": "text"}, "max_length": 9},
            },
        ],
        "output": {"path": "adapters"},
        **changes,
    }
    path = kitchen / "factory.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), "utf-8")
    return path


def test_rows_are_shown_in_tokens_with_what_is_learned_apart(
    lorareg: Lorareg, kitchen: Kitchen
) -> None:
    write_rows(kitchen / "train.jsonl", [("ab", "cd"), *tiny.rows(9)])
    done = lorareg("data", "preview", factory(kitchen), "--rows", 1)
    assert "pairs, the first of 2 adapters; --adapter takes another" in done.err
    at = done.lines.index("train.jsonl, line 1: 4 tokens masked, 3 learned")
    assert done.lines[at + 1 : at + 3] == ["  masked   <s>|a|b| ", "  learned  c|d|</s>"]
    assert done.lines[0] == "rows      train.jsonl (pairs, train): 8 rows"
    assert done.lines[1] == "rule      template '{{ input }} ', max_length none, EOS"
    assert sum("masked, " in line for line in done.lines) == 1


def test_json_tells_each_token_and_the_counts(lorareg: Lorareg, kitchen: Kitchen) -> None:
    path = factory(kitchen)
    facts = lorareg("data", "preview", path, "--json", "--split", "test", "--rows", 2).json
    text = [json.loads(line) for line in (kitchen / "test.jsonl").read_text("utf-8").splitlines()]
    assert (facts["kind"], facts["name"], facts["split"]) == ("factory", "pairs", "test")
    assert (facts["source"], facts["read"], facts["rows"]) == ("test.jsonl", 10, 10)
    assert facts["output_tokens"] == sum(len(row["output"]) + 1 for row in text)
    assert facts["tokens"] == facts["output_tokens"] + sum(len(r["input"]) + 2 for r in text)
    assert facts["batches"] is None
    assert len(facts["shown"]) == 2
    first = facts["shown"][0]
    assert first["prompt"] == f"<s>{text[0]['input']} "
    assert first["output"] == f"{text[0]['output']}</s>"
    assert [t["learned"] for t in first["tokens"]] == [False] * first["prompt_tokens"] + [
        True
    ] * first["output_tokens"]
    assert first["tokens"][0] == {"id": 1, "text": "<s>", "learned": False}


def test_validation_as_a_share_is_what_train_lacks(lorareg: Lorareg, kitchen: Kitchen) -> None:
    path = factory(kitchen)
    places = {
        split: {
            row["place"]
            for row in lorareg(
                "data", "preview", path, "--json", "--split", split, "--rows", 99
            ).json["shown"]
        }
        for split in ("train", "validation")
    }
    assert (len(places["train"]), len(places["validation"])) == (8, 2)
    assert not places["train"] & places["validation"]


def test_plain_text_is_shown_in_windows_and_packs(lorareg: Lorareg, kitchen: Kitchen) -> None:
    done = lorareg("data", "preview", factory(kitchen), "--adapter", "plain")
    assert "text.jsonl, line 1, window 1 of 2: 1 tokens masked, 8 learned" in done.lines
    assert "  masked   <s>" in done.lines
    assert "batches   1 of 8 (3 packs); in this order 22% is padding" in done.lines
    assert "Warning: 1 of 3 train rows are left out: text.jsonl, line 2: its text" in done.err
    assert "Warning: 1 of 3 train texts are longer than max_length" in done.err
    facts = lorareg("data", "preview", factory(kitchen), "--adapter", "plain", "--json").json
    assert (facts["objective"], facts["template"], facts["windowed"]) == ("lm", None, 1)
    assert facts["dropped"] == [
        "text.jsonl, line 2: its text has 1 tokens, and the first is not predicted"
    ]


def test_what_max_length_does_is_told(lorareg: Lorareg, kitchen: Kitchen) -> None:
    write_rows(kitchen / "train.jsonl", [("abcdef", "xy"), ("a", "b"), ("a", "bcdefgh")])
    path = factory(kitchen)
    data = yaml.safe_load(path.read_text("utf-8"))
    data["adapters"][0]["data"] |= {"max_length": 7, "validation": None}
    path.write_text(yaml.safe_dump(data), "utf-8")
    done = lorareg("data", "preview", path)
    assert "train.jsonl, line 1: 4 tokens masked, 3 learned; 4 cut from its left" in done.lines
    assert "1 of 3 train rows are left out: train.jsonl, line 3: its output alone has" in done.err
    assert "1 of 3 train prompts lost their beginning" in done.err


def test_a_recipe_s_rows_are_shown_too(lorareg: Lorareg, kitchen: Kitchen) -> None:
    facts = lorareg("data", "preview", kitchen.recipe(), "--json", "--split", "test").json
    assert (facts["kind"], facts["name"], facts["source"]) == ("recipe", "blend", "test.jsonl")
    assert len(facts["shown"]) == 3
    told = lorareg.fails("data", "preview", kitchen.recipe(), "--split", "validation")
    assert "recipe.yaml: has no data.validation" in told
    told = lorareg.fails("data", "preview", kitchen.recipe(), "--adapter", "plain", code=2)
    assert "--adapter is for factories" in told


def test_compose_s_error_is_the_preview_s(lorareg: Lorareg, kitchen: Kitchen) -> None:
    data = {"train": {"path": "train.jsonl"}, "max_length": 3}
    assert "its output alone has" in lorareg.fails("data", "preview", kitchen.recipe(data=data))


def test_quiet_prints_a_row_a_line(lorareg: Lorareg, kitchen: Kitchen) -> None:
    write_rows(kitchen / "train.jsonl", [("a\nb", "c\td"), *tiny.rows(9)])
    done = lorareg("data", "preview", factory(kitchen), "-q", "--rows", 2)
    assert len(done.lines) == 2
    assert done.lines[0] == "<s>a↵b c⇥d</s>"
    assert done.err == ""


def test_letters_of_several_tokens_are_not_garbled(lorareg: Lorareg, kitchen: Kitchen) -> None:
    write_rows(kitchen / "train.jsonl", [("né", "ü"), *tiny.rows(9)])
    shown = lorareg("data", "preview", factory(kitchen), "--json", "--rows", 1).json["shown"][0]
    assert shown["prompt"] == "<s>né "
    assert shown["output"] == "ü</s>"
    # Neither token of a letter is text; each has the tokenizer's name for its byte.
    assert [t["text"] for t in shown["tokens"]] == [
        "<s>", "n", "Ã", "©", " ", "Ã", "¼", "</s>"
    ]  # fmt: skip


def test_a_seq2seq_row_is_two_texts(lorareg: Lorareg, kitchen: Kitchen, tiny_t5: tiny.Tiny) -> None:
    write_rows(kitchen / "train.jsonl", [("ab", "cd"), *tiny.rows(9)])
    path = factory(kitchen, base=str(tiny_t5.folder))
    shown = lorareg("data", "preview", path, "--json", "--rows", 1).json["shown"][0]
    assert (shown["prompt"], shown["output"]) == ("ab </s>", "cd</s>")
    told = lorareg.fails("data", "preview", path, "--adapter", "plain")
    assert "plain text is for causal models" in told


@pytest.mark.parametrize(
    ("changes", "words", "told"),
    [
        ({}, ["--adapter", "pair"], "no adapter 'pair', did you mean 'pairs'?"),
        ({}, ["--adapter", "plain", "--split", "test"], "factory.yaml: plain has no data.test"),
        ({"base": "./nowhere"}, [], "nowhere"),
        ({"sede": 1}, [], "sede: unknown key, did you mean 'seed'?"),
    ],
)
def test_what_cannot_be_shown_is_told(
    lorareg: Lorareg, kitchen: Kitchen, changes: dict[str, Any], words: list[str], told: str
) -> None:
    assert told in lorareg.fails("data", "preview", factory(kitchen, **changes), *words)


def test_a_template_s_missing_column_is_named_with_the_row(
    lorareg: Lorareg, kitchen: Kitchen
) -> None:
    path = factory(kitchen, defaults={"data": {"template": "{{ question }} "}})
    told = lorareg.fails("data", "preview", path)
    assert "train.jsonl, line 1: data.template cannot be filled: there is no column 'quest" in told


def test_rows_that_the_model_cannot_take_are_named(lorareg: Lorareg, kitchen: Kitchen) -> None:
    path, config = factory(kitchen), kitchen / "tiny-llama" / "config.json"
    facts = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps(facts | {"max_position_embeddings": 5}), "utf-8")
    assert "tokens, and tiny-llama takes 5" in lorareg.fails("data", "preview", path)
    config.write_text(json.dumps(facts | {"vocab_size": 50}), "utf-8")
    told = lorareg.fails("data", "preview", path)
    assert "train.jsonl, line 1: token " in told
    assert "is none of the model's 50" in told


def test_only_the_tokenizer_is_loaded(kitchen: Kitchen) -> None:
    path = factory(kitchen)
    code = (
        "import sys\nfrom torch import nn\nmade = []\nfirst = nn.Module.__init__\n"
        "def noted(self, *a, **k):\n    made.append(type(self))\n    first(self, *a, **k)\n"
        "nn.Module.__init__ = noted\n"
        "from lorahub_registry.cli import cli\n"
        f"cli(['data', 'preview', {str(path)!r}], standalone_mode=False)\n"
        "assert made\nassert not {nn.Embedding, nn.Linear} & set(made), made\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
