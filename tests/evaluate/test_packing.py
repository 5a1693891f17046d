"""Packs: every row in one of them, and each with the loss that it has alone."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.errors import BaseModelError, DataError
from lorahub_registry.evaluate.nll import keeps_logits, token_losses
from lorahub_registry.evaluate.packing import check_packing, mask_dtype, pack, packed_batch
from lorahub_registry.evaluate.tokens import IGNORED, Encoded, one_batch
from tests import tiny
from tests.train.making import base_of, llama


def row(prompt: int, output: int, random: Random) -> Encoded:
    return Encoded(
        [random.randrange(3, 250) for _ in range(prompt)],
        [random.randrange(3, 250) for _ in range(output)],
    )


def some(count: int = 9, seed: int = 0) -> list[Encoded]:
    random = Random(seed)
    return [row(random.randint(1, 9), random.randint(1, 9), random) for _ in range(count)]


def size(one: Encoded) -> int:
    return len(one.prompt) + len(one.output)


def first_fit_decreasing(rows: list[Encoded], length: int) -> list[list[Encoded]]:
    packs: list[list[Encoded]] = []
    for one in sorted(rows, key=size, reverse=True):
        for found in packs:
            if sum(map(size, found)) + size(one) <= length:
                found.append(one)
                break
        else:
            packs.append([one])
    return packs


ROWS = st.lists(
    st.builds(
        Encoded,
        st.lists(st.integers(3, 250), min_size=1, max_size=9),
        st.lists(st.integers(3, 250), min_size=1, max_size=9),
    ),
    max_size=40,
)


@given(ROWS, st.integers(18, 60))
def test_packing_is_first_fit_decreasing(rows: list[Encoded], length: int) -> None:
    packs = pack(rows, length)
    assert [list(p) for p in packs] == first_fit_decreasing(rows, length)
    assert sorted(id(r) for p in packs for r in p) == sorted(map(id, rows))
    assert all(sum(map(size, p)) <= length for p in packs)


def test_a_row_longer_than_a_pack_is_named() -> None:
    rows = [Encoded([1], [2]), Encoded([1, 2], [3, 4], place="zog.jsonl, line 7")]
    with pytest.raises(DataError, match=r"zog\.jsonl, line 7: has 4 tokens, and a pack 3"):
        pack(rows, 3)


def test_a_pack_s_positions_start_anew_and_its_mask_keeps_rows_apart() -> None:
    one, two, three = Encoded([5], [6, 7]), Encoded([8, 9], [10]), Encoded([11], [12])
    batch = packed_batch([(one, two), (three,)], [4, 2], 0, "cpu")
    assert batch.rows == [4, 2]
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10], [11, 12, 0, 0, 0, 0]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 0, 0]]
    no = IGNORED
    assert batch.keep == 0
    assert batch.labels.tolist() == [[6, 7, no, no, 10], [12, no, no, no, no]]
    mask = batch.inputs["attention_mask"]
    assert mask.dtype == torch.bool
    assert mask.shape == (2, 1, 6, 6)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    assert mask[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.fixture(scope="module")
def qwen2() -> Any:
    torch.manual_seed(5)
    config = hf.Qwen2Config(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.3,
    )  # fmt: skip
    return hf.Qwen2ForCausalLM(config).eval()


def losses(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return token_losses(model, batch, sliced=keeps_logits(model))


def check(model: Any, rows: list[Encoded]) -> None:
    """Token by token, what a pack loses is what its rows lose alone."""
    packs = pack(rows, 40)
    assert max(map(len, packs)) > 2
    assert len({sum(map(size, p)) for p in packs}) > 1, "some are padded"
    found = packed_batch(packs, range(len(packs)), 0, "cpu", additive=mask_dtype(model))
    together = losses(model, found)
    assert torch.isfinite(together).all()
    for line, one in enumerate(packs):
        kept = together[line][found.labels[line] != IGNORED]
        alone = [losses(model, one_batch([r], [0], 0, "cpu", seq2seq=False))[0] for r in one]
        torch.testing.assert_close(kept, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_rows_in_packs_have_the_losses_that_they_have_alone(
    kind: str, attention: str, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(kind if kind == "qwen2" else f"tiny_{kind}")
    model = made.model() if isinstance(made, tiny.Tiny) else made
    model.set_attn_implementation(attention)
    assert (mask_dtype(model) is None) == (attention == "sdpa")
    check(model, some(14))


@pytest.mark.data
def test_rows_in_packs_have_the_losses_that_they_have_alone_on_a_trained_model(data: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(data / "models" / "stories260k").eval()
    check(model, some(14, seed=3))


def test_a_base_that_does_not_keep_packed_rows_apart_is_refused() -> None:
    check_packing(base_of(llama()))
    torch.manual_seed(0)
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(BaseModelError, match="tiny does not take packed rows: "):
        check_packing(base_of(bloom.eval()))
    forgetful = llama()
    # One that makes its own mask and positions, whatever it is given.
    forgetful.model.register_forward_pre_hook(
        lambda module, args, given: (
            args,
            given | {"attention_mask": None, "position_ids": None},
        ),
        with_kwargs=True,
    )
    with pytest.raises(BaseModelError, match="tiny does not keep packed rows apart"):
        check_packing(base_of(forgetful))
