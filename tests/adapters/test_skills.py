"""What a card says an adapter is good at, and how we know."""

from __future__ import annotations

import pytest

from lorahub_registry.adapters.readme import Card
from lorahub_registry.adapters.skills import SKILLS, find_skills


def names(card: Card, *others: str) -> dict[str, str]:
    return {skill: source for skill, source, _ in find_skills(card, others)}


@pytest.mark.parametrize(
    ("tag", "skill"),
    [
        ("code", "code"),
        ("code-generation", "code"),
        ("Python", "code"),
        ("text2sql", "sql"),
        ("gsm8k", "math"),
        ("function-calling", "function-calling"),
        ("function_calling", "function-calling"),
        ("tool use", "function-calling"),
        ("summarization", "summarization"),
        ("sentiment-analysis", "classification"),
        ("question-answering", "qa"),
        ("medical", "medical"),
    ],
)
def test_a_tag_says_a_skill(tag: str, skill: str) -> None:
    assert find_skills(Card(tags=(tag,))) == [(skill, "card", f"tag {tag}")]


def test_a_dataset_says_a_skill_with_its_own_source() -> None:
    found = find_skills(Card(tags=("code",), datasets=("sahil2801/CodeAlpaca-20k",)))
    assert ("code", "card", "tag code") in found
    assert ("code", "dataset", "dataset sahil2801/CodeAlpaca-20k") in found


@pytest.mark.parametrize(
    "tag",
    ["lora", "text-generation", "base_model:bigcode/code", "license:mit", "decoder", "mathias"],
)
def test_a_tag_that_only_looks_like_a_skill_says_none(tag: str) -> None:
    assert find_skills(Card(tags=(tag,))) == []


def test_words_too_common_in_prose_count_only_in_names() -> None:
    assert names(Card(description="Run this Python code with the agent.")) == {}
    assert names(Card(), "me/python-code-agent") == {"code": "card", "function-calling": "card"}
    assert names(Card(description="Trained on gsm8k.")) == {"math": "card"}


def test_a_translation_says_its_languages_and_a_chat_does_not() -> None:
    said = names(Card(tags=("translation",), languages=("de", "en", "not a language")))
    assert said == {
        "translation": "card",
        "translation:de": "card",
        "translation:en": "card",
    }
    assert names(Card(tags=("chat",), languages=("de",))) == {"chat": "card"}


def test_evidence_with_braces_is_only_text() -> None:
    assert find_skills(Card(tags=("code {0} {x.__class__}",))) == [
        ("code", "card", "tag code (0) (x.__class__)")
    ]


def test_every_skill_is_found_by_its_own_name() -> None:
    for skill in SKILLS:
        assert skill in names(Card(tags=(skill,)))
