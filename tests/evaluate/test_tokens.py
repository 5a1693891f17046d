"""How rows become tokens: one rule, with and without BOS, EOS, a limit, and for seq2seq."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.errors import DataError
from lorahub_registry.evaluate.tokens import (
    IGNORED,
    Encoded,
    NoRoom,
    TokenRule,
    batches,
    check_vocabulary,
    encode,
    encode_text,
)
from tests import tiny

BOS, EOS = 1, 2
CAUSAL, BARE, SEQ2SEQ = (
    tiny.tokenizer(bos=True, eos=False),
    tiny.tokenizer(bos=False, eos=False),
    tiny.tokenizer(bos=False, eos=True),
)


def ids(text: str) -> list[int]:
    return BARE(text)["input_ids"]


def one(
    prompt: str = "ab ", output: str = "cd", *, tokenizer: object = CAUSAL, seq2seq: bool = False,
    max_length: int | None = None, eos: bool = False, chat: bool = False,
) -> Encoded:  # fmt: skip
    rule = TokenRule(max_length, eos, chat)
    (row,) = encode(tokenizer, [(prompt, output)], rule, seq2seq=seq2seq)
    return row


def test_bos_stands_before_the_prompt_and_nothing_after_the_output() -> None:
    assert one() == Encoded([BOS, *ids("ab ")], ids("cd"), 0)


def test_a_tokenizer_without_bos_gets_none() -> None:
    assert one(tokenizer=BARE) == Encoded(ids("ab "), ids("cd"), 0)


def test_eos_follows_the_output_only_where_it_is_asked_for() -> None:
    assert one(eos=True).output == [*ids("cd"), EOS]
    assert one(eos=True).prompt == one().prompt


def test_a_causal_prompt_does_not_end_with_eos_whatever_the_tokenizer_does() -> None:
    both = tiny.tokenizer(bos=True, eos=True)
    assert one(tokenizer=both) == one()


def test_seq2seq_prompt_and_labels_are_as_the_tokenizer_makes_them() -> None:
    row = one(tokenizer=SEQ2SEQ, seq2seq=True)
    assert row == Encoded([*ids("ab "), EOS], [*ids("cd"), EOS], 0)


def test_prompt_and_output_are_tokenised_apart() -> None:
    # As one text, "ab " and "cd" may share a token; apart, neither depends on the other.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: n for n, piece in enumerate(["<u>", "a", "b", "ab", "abb", "bb"])}
    greedy = Tokenizer(
        models.BPE(vocabulary, [("a", "b"), ("b", "b"), ("ab", "b")], unk_token="<u>")
    )
    greedy.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=greedy, unk_token="<u>")
    assert tokenizer("abbb")["input_ids"] == [vocabulary["ab"], vocabulary["bb"]]
    row = one("ab", "bb", tokenizer=tokenizer)
    assert (row.prompt, row.output) == ([vocabulary["ab"]], [vocabulary["bb"]])
    row = one("a", "bbb", tokenizer=tokenizer)
    assert row.prompt == [vocabulary["a"]]


def test_a_limit_takes_from_the_prompts_left_and_keeps_bos_and_the_answer() -> None:
    whole = one("abcdefgh", "xyz")
    cut = one("abcdefgh", "xyz", max_length=7)
    assert cut == Encoded([BOS, *ids("fgh")], ids("xyz"), 5)
    assert len(cut.prompt) + len(cut.output) == 7
    assert len(whole.prompt) - len(cut.prompt) == cut.cut
    assert one("abcdefgh", "xyz", max_length=12) == whole


def test_without_bos_the_limit_keeps_the_prompts_end() -> None:
    assert one("abcdefgh", "xyz", tokenizer=BARE, max_length=5) == Encoded(ids("gh"), ids("xyz"), 6)


def test_eos_counts_towards_the_limit() -> None:
    cut = one("abcdefgh", "xyz", max_length=7, eos=True)
    assert (cut.prompt, cut.output) == ([BOS, *ids("gh")], [*ids("xyz"), EOS])


def test_an_answer_is_never_cut() -> None:
    assert one("abc", "xyz", max_length=4) == Encoded(ids("c"), ids("xyz"), 3)
    with pytest.raises(DataError, match=r"row 1: its output alone has 3 tokens, max_length is 3"):
        one("abc", "xyz", max_length=3)
    with pytest.raises(DataError, match="row 1: its output alone has 4 tokens"):
        one("abc", "xyz", max_length=3, tokenizer=SEQ2SEQ, seq2seq=True)


def test_for_seq2seq_the_limit_is_each_sides_own() -> None:
    row = one("abcdef", "xyz", max_length=4, tokenizer=SEQ2SEQ, seq2seq=True)
    assert row == Encoded([*ids("def"), EOS], [*ids("xyz"), EOS], 3)


def test_rows_that_are_empty_once_tokenised_are_refused_by_number() -> None:
    with pytest.raises(DataError, match="row 2: its output is empty"):
        encode(CAUSAL, [("a", "b"), ("a", "")], TokenRule(), seq2seq=False)
    with pytest.raises(DataError, match="row 1: its prompt is empty"):
        one("", "x", tokenizer=BARE)
    assert one("", "x").prompt == [BOS]


def test_the_chat_template_is_the_tokenizers() -> None:
    with pytest.raises(DataError, match="none"):
        one(chat=True)
    talking = tiny.tokenizer(bos=True, eos=False)
    talking.chat_template = (
        "{% for m in messages %}<s>[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    row = one("hi", "yo", tokenizer=talking, chat=True)
    assert row == Encoded([BOS, *ids("[user]hi[assistant]")], ids("yo"), 0)


ROWS = st.lists(
    st.builds(
        Encoded,
        st.lists(st.integers(3, 250), min_size=1, max_size=9),
        st.lists(st.integers(3, 250), min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=12,
)


@given(ROWS, st.integers(1, 60))
def test_causal_batches_hold_every_row_once_with_its_labels_in_place(
    rows: list[Encoded], tokens: int
) -> None:
    made = batches(rows, pad=0, seq2seq=False, device="cpu", tokens=tokens)
    assert sorted(n for batch in made for n in batch.rows) == list(range(len(rows)))
    for batch in made:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert len(batch.rows) == 1 or ids.numel() <= tokens
        for line, n in enumerate(batch.rows):
            row = rows[n]
            length = len(row.prompt) + len(row.output)
            assert ids[line, :length].tolist() == [*row.prompt, *row.output]
            assert mask[line].tolist() == [1] * length + [0] * (ids.shape[1] - length)
            # labels[p] is what the logits at keep + p have to predict: the token after them.
            places = [batch.keep + p for p in range(batch.labels.shape[1])]
            wanted = {
                p: int(t)
                for p, t in zip(places, batch.labels[line], strict=True)
                if int(t) != IGNORED
            }
            first = len(row.prompt) - 1
            assert wanted == {first + k: t for k, t in enumerate(row.output)}


@given(ROWS)
def test_seq2seq_batches_pad_their_labels_with_ignored(rows: list[Encoded]) -> None:
    for batch in batches(rows, pad=0, seq2seq=True, device="cpu"):
        assert torch.equal(batch.inputs["labels"], batch.labels)
        for line, n in enumerate(batch.rows):
            row = rows[n]
            labels = batch.labels[line].tolist()
            assert labels[: len(row.output)] == row.output
            assert set(labels[len(row.output) :]) <= {IGNORED}
            assert int(batch.inputs["attention_mask"][line].sum()) == len(row.prompt)


def windows(text: str, *, tokenizer: object = CAUSAL, eos: bool = False, **rule: int) -> list:
    return encode_text(tokenizer, text, TokenRule(eos=eos, **rule), place="t, line 1")


def test_a_text_s_first_token_is_its_prompt_and_the_rest_is_learned() -> None:
    assert windows("abc") == [Encoded([BOS], ids("abc"))]
    assert windows("abc", tokenizer=BARE) == [Encoded(ids("a"), ids("bc"))]
    assert windows("abc", eos=True) == [Encoded([BOS], [*ids("abc"), EOS])]
    closing = tiny.tokenizer(bos=True, eos=True)
    assert windows("abc", tokenizer=closing) == windows("abc")
    assert windows("abc", tokenizer=closing, eos=True) == windows("abc", eos=True)


@pytest.mark.parametrize("length", [2, 3, 4, 7, 8, 100])
def test_a_long_text_becomes_windows_in_which_each_token_is_learned_once(length: int) -> None:
    found = windows("abcdefg", max_length=length)
    assert all(len(w.prompt) + len(w.output) <= length for w in found)
    assert [t for w in found for t in w.output] == ids("abcdefg")
    whole = [BOS, *ids("abcdefg")]
    for window in found:
        joined = [*window.prompt, *window.output]
        assert any(whole[n : n + len(joined)] == joined for n in range(len(whole)))
    assert len(found) == -(-7 // (length - 1))
    if len(found) > 1:
        assert found[1].place == f"t, line 1, window 2 of {len(found)}"


def test_a_text_of_one_token_has_nothing_to_learn() -> None:
    with pytest.raises(NoRoom, match="t, line 1: its text has 1 tokens"):
        windows("")
    with pytest.raises(NoRoom, match="has 0 tokens"):
        windows("", tokenizer=BARE)


def test_a_token_that_the_model_does_not_know_is_named_with_its_row() -> None:
    rows = [Encoded([1, 2], [3]), Encoded([1], [9, 10], place="zog.jsonl, line 4")]
    check_vocabulary(rows, 11)
    with pytest.raises(DataError, match=r"^zog\.jsonl, line 4: token 10 of its output is none of"):
        check_vocabulary(rows, 10)
    with pytest.raises(DataError, match=r"^row 1: token 2 \('</s>'\) of its prompt"):
        check_vocabulary([Encoded([2], [1])], 2, CAUSAL)
