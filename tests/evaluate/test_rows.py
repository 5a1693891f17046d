"""Rows by a factory's rules: what is learned, left out and told."""

from __future__ import annotations

import pytest

from lorahub_registry.errors import DataError
from lorahub_registry.evaluate.rows import check_length, tokenise
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.recipes import AdapterData, Row
from tests import tiny

CAUSAL = tiny.tokenizer(bos=True, eos=False)


def rules(**options: object) -> AdapterData:
    return AdapterData.model_validate({"train": {"path": "a.jsonl"}, **options})


def rows(*pairs: tuple[str, str]) -> list[Row]:
    return [
        Row(a, b, {"input": a, "output": b}, "output", f"a.jsonl, line {n}")
        for n, (a, b) in enumerate(pairs, 1)
    ]


def test_rows_keep_their_places_and_are_counted() -> None:
    found = tokenise(rows(("ab", "c"), ("d", "ef")), rules(), CAUSAL, seq2seq=False)
    assert [row.place for row in found.rows] == ["a.jsonl, line 1", "a.jsonl, line 2"]
    assert [len(row.prompt) for row in found.rows] == [4, 3]  # BOS and the template's space
    assert (found.read, found.tokens, found.output_tokens, found.cut) == (2, 10, 3, 0)
    assert found.notes("train") == []


def test_rows_of_which_no_answer_is_left_are_dropped_counted_and_named() -> None:
    given = rows(("ab", "c"), *[("d", "efghijk")] * 4, ("x", "yz"))
    found = tokenise(given, rules(max_length=5), CAUSAL, seq2seq=False)
    assert [row.place for row in found.rows] == ["a.jsonl, line 1", "a.jsonl, line 6"]
    assert len(found.dropped) == 4
    (told,) = found.notes("train")
    assert told.startswith(
        "4 of 6 train rows are left out: a.jsonl, line 2: its output alone has 7"
    )
    assert told.endswith(
        "a.jsonl, line 4: its output alone has 7 tokens, max_length is 5; and 1 more"
    )
    with pytest.raises(DataError, match="line 2: its output alone"):
        tokenise(given, rules(max_length=5), CAUSAL, seq2seq=False, drop=False)


def test_prompts_that_were_cut_are_told() -> None:
    found = tokenise(rows(("abcdef", "c"), ("a", "b")), rules(max_length=5), CAUSAL, seq2seq=False)
    assert [row.cut for row in found.rows] == [4, 0]
    assert found.notes("test") == ["1 of 2 test prompts lost their beginning (max_length)"]


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no row is left of 2: a\.jsonl, line 1: its output"):
        tokenise(rows(("a", "bcd"), ("a", "bcd")), rules(max_length=3), CAUSAL, seq2seq=False)


def test_a_column_that_the_data_lack_is_named_with_its_row() -> None:
    with pytest.raises(DataError, match=r"^a\.jsonl, line 1: .*there is no column 'question'"):
        tokenise(rows(("a", "b")), rules(template="{{ question }} "), CAUSAL, seq2seq=False)


def test_plain_text_is_learned_whole_without_a_template() -> None:
    given = [Row("", text, {}, "text", f"t, line {n}") for n, text in enumerate(["abcde", "", "f"])]
    found = tokenise(given, rules(max_length=4), CAUSAL, seq2seq=False, text=True)
    assert [len(row.output) for row in found.rows] == [3, 2, 1]
    assert (found.read, found.windowed, len(found.dropped)) == (3, 1, 1)
    dropped, windowed = found.notes("train")
    assert dropped == (
        "1 of 3 train rows are left out: t, line 1: its text has 1 tokens, and the first is not "
        "predicted"
    )
    assert windowed.startswith("1 of 3 train texts are longer than max_length")
    with pytest.raises(DataError, match="plain text is for causal models"):
        tokenise(given, rules(), CAUSAL, seq2seq=True, text=True)


def test_a_row_longer_than_the_model_takes_is_named() -> None:
    found = [Encoded([1] * 3, [1]), Encoded([1] * 3, [1] * 2, place="a.jsonl, line 9")]
    check_length(found, 5, "base", seq2seq=False)
    check_length(found, None, "base", seq2seq=False)
    check_length(found, 3, "base", seq2seq=True)
    with pytest.raises(DataError, match=r"^a\.jsonl, line 9: has 5 tokens, and base takes 4"):
        check_length(found, 4, "base", seq2seq=False)
