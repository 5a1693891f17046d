"""Greedy answers: token by token the likeliest, whatever stands beside a row in its batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorahub_registry.evaluate.generation import exact_match, generate, normalise
from lorahub_registry.evaluate.tokens import Encoded, TokenRule, encode
from tests import tiny


@pytest.fixture(params=["llama", "gpt2", "t5"])
def base(request: pytest.FixtureRequest) -> Any:
    """A loaded tiny base of each family."""
    return request.getfixturevalue(f"tiny_{request.param}").base()


def by_hand(base: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest token, one after the other, without cache or padding."""
    said: list[int] = []
    start = base.model.config.decoder_start_token_id if base.seq2seq else None
    for _ in range(count):
        with torch.inference_mode():
            if base.seq2seq:
                logits = base.model(
                    input_ids=torch.tensor([prompt]),
                    decoder_input_ids=torch.tensor([[start, *said]]),
                ).logits
            else:
                logits = base.model(input_ids=torch.tensor([[*prompt, *said]])).logits
        token = int(logits[0, -1].argmax())
        if token == base.tokenizer.eos_token_id:
            break
        said.append(token)
    return said


def prompts(base: Any, count: int = 9) -> list[list[int]]:
    rows = encode(base.tokenizer, tiny.rows(count), TokenRule(), seq2seq=base.seq2seq)
    return [row.prompt for row in rows]


def answers(base: Any, given: list[list[int]], count: int = 7) -> list[list[int]]:
    return generate(base.model, base.tokenizer, given, max_new_tokens=count, seq2seq=base.seq2seq)


def test_a_greedy_answer_is_the_likeliest_token_each_time(base: Any) -> None:
    given = prompts(base)
    assert len({len(p) for p in given}) > 1  # so that some are padded
    assert answers(base, given) == [by_hand(base, prompt, 7) for prompt in given]


def test_a_models_own_settings_do_not_make_it_less_greedy(base: Any) -> None:
    given = prompts(base)
    expected = answers(base, given)
    settings = base.model.generation_config
    settings.num_beams, settings.repetition_penalty, settings.no_repeat_ngram_size = 3, 9.0, 2
    settings.do_sample, settings.temperature, settings.top_k = True, 5.0, 3
    assert answers(base, given) == expected


def test_an_answer_ends_before_eos(base: Any) -> None:
    given = prompts(base)
    whole = answers(base, given)
    last = whole[0][-1]
    base.tokenizer.eos_token = base.tokenizer.convert_ids_to_tokens(last)
    base.model.generation_config.eos_token_id = last
    again = answers(base, given)
    assert again == [by_hand(base, prompt, 7) for prompt in given]
    assert again[0] == whole[0][: whole[0].index(last)]


def test_sampling_repeats_with_its_seed(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()

    def said(seed: int) -> list[list[int]]:
        return generate(
            base.model, base.tokenizer, prompts(base), max_new_tokens=8, seq2seq=False,
            temperature=1.0, seed=seed,
        )  # fmt: skip

    assert said(1) == said(1)
    assert said(1) != said(2)


def test_only_white_space_is_forgiven() -> None:
    assert normalise("  a\n b\t c ") == "a b c"
    assert normalise("A b.") != normalise("a b")


def matches(base: Any, rows: list[Encoded], *, ends: bool = False, limit: int = 64) -> list[float]:
    return exact_match(
        base.model, base.tokenizer, rows, seq2seq=base.seq2seq, ends=ends, max_new_tokens=limit
    ).tolist()


def readable(base: Any, count: int, length: int) -> list[Encoded]:
    """Rows whose output is what the model says, and which the tokenizer reads back."""
    rows = []
    for prompt in prompts(base, count):
        said = by_hand(base, prompt, length)
        if len(said) == length and base.tokenizer.decode(said).strip():
            rows.append(Encoded(prompt, said))
    assert rows
    return rows


def test_what_the_model_says_matches_and_nothing_else_does(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    rows = readable(base, 40, 4)
    other = [Encoded(row.prompt, [*row.output[:-1], 70]) for row in rows]
    wrong = [row for row, good in zip(other, rows, strict=True) if row != good]
    assert matches(base, [*rows, *wrong]) == [1.0] * len(rows) + [0.0] * len(wrong)


def test_an_answer_without_eos_is_cut_at_the_references_length(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    rows = readable(base, 40, 4)
    shorter = [Encoded(row.prompt, row.output[:2]) for row in rows]
    assert matches(base, shorter) == [1.0] * len(rows)
    # Where outputs end with EOS, going on is wrong.
    ended = [Encoded(row.prompt, [*row.output[:2], 2]) for row in rows]
    assert matches(base, ended, ends=True) == [0.0] * len(rows)


def test_an_answer_longer_than_the_limit_never_matches(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    rows = readable(base, 40, 4)
    assert matches(base, rows, limit=4) == [1.0] * len(rows)
    assert matches(base, rows, limit=3) == [0.0] * len(rows)


def test_a_seq2seq_answer_has_to_end_where_the_reference_does(tiny_t5: tiny.Tiny) -> None:
    base = tiny_t5.base()
    rows = readable(base, 9, 4)
    assert matches(base, [Encoded(r.prompt, [*r.output[:2], 2]) for r in rows]) == [0.0] * len(rows)
