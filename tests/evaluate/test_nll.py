"""Negative log-likelihood: the same however rows are batched, and the same as transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.evaluate.nll import RowNLL, keeps_logits, score, token_losses
from lorahub_registry.evaluate.tokens import IGNORED, Encoded, TokenRule, batches, encode
from lorahub_registry.recipes.model import Split
from lorahub_registry.recipes.rows import read_rows
from lorahub_registry.runtime.apply import applied
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import weighted_sum
from tests import tiny


@pytest.fixture(params=["llama", "gpt2", "t5"])
def base(request: pytest.FixtureRequest) -> Any:
    """A loaded tiny base of each family."""
    return request.getfixturevalue(f"tiny_{request.param}").base()


def encoded(base: Any, count: int = 23, *, eos: bool = False) -> list[Encoded]:
    rule = TokenRule(eos=eos)
    return encode(base.tokenizer, tiny.rows(count), rule, seq2seq=base.seq2seq)


def scored(base: Any, rows: list[Encoded], tokens: int | None = None) -> RowNLL:
    made = batches(rows, pad=0, seq2seq=base.seq2seq, device="cpu", tokens=tokens)
    return score(base.model, made)


def naive(base: Any, row: Encoded) -> float:
    """One row alone, without padding, log-softmax in float64, by the definition."""
    with torch.inference_mode():
        if base.seq2seq:
            start = [base.model.config.decoder_start_token_id, *row.output[:-1]]
            logits = base.model(
                input_ids=torch.tensor([row.prompt]), decoder_input_ids=torch.tensor([start])
            ).logits[0]
        else:
            whole = torch.tensor([[*row.prompt, *row.output]])
            logits = base.model(input_ids=whole).logits[0, len(row.prompt) - 1 : -1]
    chosen = logits.double().log_softmax(-1)[torch.arange(len(row.output)), row.output]
    return -float(chosen.sum())


@pytest.mark.parametrize("tokens", [1, 40, 100, None])
def test_a_rows_loss_does_not_depend_on_its_batch(base: Any, tokens: int | None) -> None:
    rows = encoded(base)
    found = scored(base, rows, tokens)
    assert found.tokens.tolist() == [len(row.output) for row in rows]
    expected = torch.tensor([naive(base, row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found.sums, expected, rtol=1e-5, atol=1e-4)
    assert found.mean == pytest.approx(
        float(expected.sum()) / sum(len(row.output) for row in rows), rel=1e-5
    )


def test_it_is_the_loss_that_transformers_computes(base: Any) -> None:
    rows = encoded(base, 6, eos=not base.seq2seq)
    found = scored(base, rows)
    for n, row in enumerate(rows):
        if base.seq2seq:
            inputs = {"input_ids": [row.prompt], "labels": [row.output]}
        else:
            ignored = [-100] * len(row.prompt)
            inputs = {
                "input_ids": [[*row.prompt, *row.output]],
                "labels": [[*ignored, *row.output]],
            }
        with torch.inference_mode():
            loss = base.model(**{k: torch.tensor(v) for k, v in inputs.items()}).loss
        assert float(found.sums[n] / found.tokens[n]) == pytest.approx(float(loss), rel=1e-5)


def test_logits_only_where_they_are_needed_are_the_same_logits(base: Any) -> None:
    made = batches(encoded(base), pad=0, seq2seq=base.seq2seq, device="cpu", tokens=120)
    can = keeps_logits(base.model)
    assert can == (not base.seq2seq)
    for batch in made:
        with torch.inference_mode():
            sliced = token_losses(base.model, batch, sliced=can)
            whole = token_losses(base.model, batch, sliced=False)
        torch.testing.assert_close(sliced, whole, rtol=1e-6, atol=1e-6)


def test_a_peft_model_is_scored_like_its_base(tiny_llama: tiny.Tiny) -> None:
    base, wrapped = tiny_llama.base(), tiny_llama.peft("plain")
    assert keeps_logits(wrapped)
    rows = encoded(base)
    made = batches(rows, pad=0, seq2seq=False, device="cpu")
    folder = tiny_llama.adapter("plain")
    with applied(base.model, load_deltas(folder, read_facts(folder))):
        ours = score(base.model, made)
    torch.testing.assert_close(score(wrapped, made).sums, ours.sums, rtol=1e-4, atol=1e-4)


def test_a_row_without_difference_has_no_error() -> None:
    one = RowNLL(torch.tensor([3.0, 5.0]), torch.tensor([2.0, 4.0]))
    assert one.minus(one) == (0.0, 0.0)
    assert one.mean == pytest.approx(8 / 6)


def test_one_row_has_no_standard_error() -> None:
    one = RowNLL(torch.tensor([3.0]), torch.tensor([2.0]))
    assert one.stderr != one.stderr  # NaN


def made_up(seed: int, rows: int = 400) -> tuple[RowNLL, RowNLL]:
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 40, (rows,), generator=random).double()
    rate = 2 + torch.randn(rows, generator=random).double() * 0.5
    other = rate + 0.1 + torch.randn(rows, generator=random).double() * 0.2
    return RowNLL(rate * tokens, tokens), RowNLL(other * tokens, tokens)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_standard_errors_are_those_of_a_bootstrap_over_rows(seed: int) -> None:
    one, other = made_up(seed)
    random = torch.Generator().manual_seed(seed + 100)
    drawn = torch.randint(0, 400, (4000, 400), generator=random)

    def spread(sums: torch.Tensor) -> float:
        return float((sums[drawn].sum(1) / one.tokens[drawn].sum(1)).std())

    # A bootstrap of 4000 draws is itself good to about 1.1%.
    assert one.stderr == pytest.approx(spread(one.sums), rel=0.05)
    difference, error = one.minus(other)
    assert error == pytest.approx(spread(one.sums - other.sums), rel=0.05)
    assert difference == pytest.approx(one.mean - other.mean)
    # Pairing is what makes a small difference visible.
    assert error < 0.6 * (one.stderr**2 + other.stderr**2) ** 0.5


def test_scoring_leaves_no_gradient(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    found = scored(base, encoded(base, 3))
    assert not found.sums.requires_grad
    assert not any(p.requires_grad for p in base.model.parameters())


EXPECTED = {
    "base": 2.844,
    "zog": 2.590,
    "arr": 1.548,
    "uniform": 2.921,
    ".7 zog+.7 arr": 1.488,
}


@pytest.mark.data
def test_the_numbers_on_stories260k_are_the_known_ones(data: Any) -> None:
    from lorahub_registry.evaluate.base import load_base

    base = load_base(data / "models" / "stories260k", name="stories260k", device="cpu")
    split = Split(path=str(data / "tasks" / "stories" / "zog_arr" / "test.jsonl"))
    pairs = [(f"{row.input} ", row.output) for row in read_rows(split, seed=0)]
    rows = encode(base.tokenizer, pairs, TokenRule(), seq2seq=False)
    assert all(row.prompt[0] == base.tokenizer.bos_token_id for row in rows)
    made = batches(rows, pad=0, seq2seq=False, device="cpu")
    adapters = {}
    for name in ("zog", "arr", "upper", "shakespeare"):
        folder = data / "adapters" / "stories260k" / name
        adapters[name] = load_deltas(folder, read_facts(folder))
    mixtures = {
        "base": {},
        "zog": adapters["zog"],
        "arr": adapters["arr"],
        "uniform": weighted_sum(list(adapters.values()), [0.25] * 4),
        ".7 zog+.7 arr": weighted_sum([adapters["zog"], adapters["arr"]], [0.7, 0.7]),
    }
    found = {}
    for name, deltas in mixtures.items():
        with applied(base.model, deltas):
            found[name] = score(base.model, made).mean
    # Known to three places.
    assert found == pytest.approx(EXPECTED, abs=0.002)


def test_a_seq2seq_model_computes_no_loss_of_its_own(tiny_t5):
    base = tiny_t5.base()
    met = {}
    base.model.register_forward_pre_hook(
        lambda module, args, given: met.update(given), with_kwargs=True
    )
    for batch in base.batches(encoded(base)):
        losses = token_losses(base.model, batch, sliced=False)
        assert "decoder_input_ids" in met
        assert "labels" not in met
        with torch.no_grad():
            whole = tiny_t5.model()(**batch.inputs).loss
        torch.testing.assert_close(losses.sum() / (batch.labels != IGNORED).sum(), whole)
