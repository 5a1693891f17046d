"""Model cards, read as untrusted data: facts and prose, never an exception."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.adapters.readme import Card, read_card, sentences
from lorahub_registry.adapters.skills import find_skills


def card(front: str, body: str = "Hello there.") -> Card:
    return read_card(f"---\n{front}\n---\n\n{body}\n")


def test_a_card_is_read() -> None:
    found = card(
        """
license: apache-2.0
base_model: mistralai/Mistral-7B-v0.1
datasets: [bigcode/the-stack, sahil2801/CodeAlpaca-20k]
tags:
- code
- lora
language: [en, de]
pipeline_tag: text-generation
model-index:
- name: x
  results:
  - task: {type: text-generation}
    dataset: {name: HumanEval, type: openai_humaneval}
    metrics:
    - {type: pass@1, value: 30.5}
""".strip(),
        "# Code adapter\n\nIt writes Python.\n\n| a | table |\n\n- a list\n\nAnd tests it.\n",
    )
    assert found.license == "apache-2.0"
    assert found.base == "mistralai/Mistral-7B-v0.1"
    assert found.datasets == ("bigcode/the-stack", "sahil2801/CodeAlpaca-20k")
    assert found.tags == ("code", "lora")
    assert found.languages == ("en", "de")
    assert found.tasks == ("text-generation",)
    assert (found.title, found.description) == ("Code adapter", "It writes Python. And tests it.")
    assert found.scores == (("HumanEval", "HumanEval", "pass@1", 30.5),)
    assert found.problem == ""


def test_a_card_without_front_matter_is_prose() -> None:
    assert read_card("# Title\n\nWords.").description == "Words."
    assert read_card("").problem == ""


def test_windows_line_ends_are_line_ends() -> None:
    found = read_card("---\r\nlicense: mit\r\n---\r\n\r\n# T\r\n\r\nWords.\r\n")
    assert (found.license, found.title, found.description) == ("mit", "T", "Words.")


def test_a_billion_laughs_are_refused() -> None:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    found = card("\n".join(lines))
    # Only plain texts are compared: to show the grown list in a failure would take all memory.
    problem, description, facts = found.problem, found.description, len(found.metadata)
    del found
    assert "aliases" in problem
    assert facts == 0
    assert description == "Hello there."


def test_front_matter_beyond_64_kib_is_refused() -> None:
    assert "64 KiB" in card("tags: [" + "x, " * 30_000 + "]").problem


@pytest.mark.parametrize(
    "front",
    [
        "a: [",
        "- a\n- b",
        "7",
        "a: b: c",
        "\t- a",
        "a: " + "[" * 3_000,
        "a: " + "{b: " * 3_000,
        "!!python/object/apply:os.system [ls]",
        "a: !!timestamp abc",
        "a: !!bool foo",
        "a: !!int ''",
        "a: !!float ''",
        "a: !!binary 'x'",
        "a: 2001-13-45",
        "? [a]\n: b",
        "? 0x" + "f" * 5_000 + "\n: b",
        "<<: 5",
    ],
)
def test_front_matter_that_yaml_cannot_build_is_told_and_the_prose_still_read(front: str) -> None:
    found = card(front)
    assert found.problem.startswith("its front matter is ")
    assert "\n" not in found.problem
    assert found.description == "Hello there."


@pytest.mark.parametrize(
    "front",
    [
        "license: 7\ntags: {a: b}\ndatasets: [1, null, [x]]\nlanguage: true\nbase_model: {a: b}",
        "model-index: 7",
        "model-index: [7, {results: 7}, {results: [7]}, {results: [{metrics: [7, {value: x}]}]}]",
        "model-index: [{results: [{task: 7, dataset: [], metrics: [{type: x, value: true}]}]}]",
        "model-index: [{results: [{metrics: [{type: x, value: .nan}]}]}]",
        "model-index: [{results: [{metrics: [{type: x, value: .inf}]}]}]",
        f"model-index: [{{results: [{{metrics: [{{type: x, value: {'9' * 400}}}]}}]}}]",
    ],
)
def test_facts_of_the_wrong_shape_are_left_out(front: str) -> None:
    found = card(front)
    assert found.problem == ""
    assert found.scores == ()
    assert (found.license, found.base, found.tags, found.datasets) == (None, None, (), ())


def test_half_of_a_surrogate_pair_cannot_get_into_a_database() -> None:
    found = card('license: "a\\ud800"\ntags: ["\\udfff"]')
    (found.license or "").encode()
    found.tags[0].encode()


def test_long_lists_and_texts_are_cut() -> None:
    found = card("tags: [" + ", ".join(f"t{n}" for n in range(1_000)) + "]", "x" * 5_000)
    assert len(found.tags) == 200
    assert len(found.description) == 600


@pytest.mark.parametrize(
    "body",
    ["<!--" * 200_000, "<" * 500_000, "<a" * 300_000, "```" * 300_001, "---\n" * 200_000,
     "# " * 400_000, "*" * 500_000, "cite trl " * 100_000],
    ids=["comments", "brackets", "tags", "fences", "rules", "heads", "stars", "boilerplate"],
)  # fmt: skip
def test_a_megabyte_of_half_open_markup_is_read_all_the_same(body: str) -> None:
    read_card(body)
    card("license: mit", body)


@given(st.text(max_size=200))
def test_no_front_matter_raises(front: str) -> None:
    find_skills(card(front), ["a/b"])


def test_comments_code_and_html_are_no_prose() -> None:
    found = read_card(
        "<!-- hidden -->\n\n```python\nprint('code')\n```\n\nSeen <b>bold</b>.\n\n<!-- open\n\nlost"
    )
    assert found.description == "Seen  bold ."


TEMPLATE = """
# Model Card for Model ID

<!-- Provide a quick summary of what the model is/does. -->

## Model Details

- **Developed by:** [More Information Needed]
- **Shared by [optional]:** [More Information Needed]

Use the code below to get started with the model.

[More Information Needed]

Users (both direct and downstream) should be made aware of the risks, biases and limitations.

Carbon emissions can be estimated using the
[Machine Learning Impact calculator](https://mlco2.github.io/impact#compute).

This model is a fine-tuned version of [gpt2](https://huggingface.co/gpt2) on the None dataset.
"""


def test_the_unfilled_template_says_nothing() -> None:
    found = card("library_name: peft\nbase_model: gpt2", TEMPLATE)
    assert (found.title, found.description) == ("", "")
    assert find_skills(found) == []


@pytest.mark.data
def test_every_real_card_is_read(data: Path) -> None:
    files = sorted((data / "cards").glob("*.md"))
    assert len(files) == 28
    cards = {f.stem: read_card(f.read_text("utf-8")) for f in files}
    assert [name for name, found in cards.items() if found.problem] == []
    assert sum(found.base is not None for found in cards.values()) >= 20
    for found in cards.values():
        assert "more information" not in f"{found.title} {found.description}".lower()
        json.dumps([found.tags, found.datasets, found.description])


@pytest.mark.data
def test_templates_among_the_real_cards_give_no_skill_by_their_prose(data: Path) -> None:
    prose = {}
    for file in sorted((data / "cards").glob("*.md")):
        text = file.read_text("utf-8")
        if text.lower().count("more information needed") > 20:
            found = read_card(text)
            prose[file.stem] = [
                (s, why) for s, _, why in find_skills(found) if why.startswith("word")
            ]
    assert len(prose) >= 5
    assert not any(prose.values())


def test_marks_and_escapes_are_read() -> None:
    found = read_card(
        "A mixture for `a_b`, by **us**.\n\nSaid: \\*\\*not bold\\*\\*, 2 ** 3, see [it](https://x.y)."
    )
    assert found.description == "A mixture for a_b, by us. Said: **not bold**, 2 ** 3, see it."


def test_a_long_description_stops_at_a_sentence() -> None:
    text = "This is 1.5 words. " * 50
    found = read_card(text).description
    assert found.endswith("This is 1.5 words.")
    assert 580 < len(found) <= 600
    assert sentences(text, 2) == "This is 1.5 words. This is 1.5 words."
    assert sentences("Just one", 2) == "Just one"
