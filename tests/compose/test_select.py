"""Rows chosen to lie apart: farthest first, by the base's own hidden states."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from lorahub_registry.compose.encoder import Rows
from lorahub_registry.compose.run import compose
from lorahub_registry.compose.select import diverse
from lorahub_registry.errors import RecipeError
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.recipes.rows import Row
from tests import tiny
from tests.compose.making import encoded, member, recipe


def points(base: Any, rows: list[Encoded]) -> torch.Tensor:
    """Where each row lies, one by one, so without padding."""
    found = []
    for row in rows:
        with torch.inference_mode():
            if base.seq2seq:
                ids = torch.tensor([row.prompt])
                states = base.model.get_encoder()(input_ids=ids).last_hidden_state
            else:
                ids = torch.tensor([[*row.prompt, *row.output]])
                hidden = base.model(input_ids=ids, output_hidden_states=True).hidden_states
                states = hidden[-1]
        found.append(states[0].double().mean(0))
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_each_step_takes_the_row_furthest_from_all_chosen(
    request: pytest.FixtureRequest, kind: str
) -> None:
    base = request.getfixturevalue(f"tiny_{kind}").base()
    rows = encoded(base, 24)
    where = points(base, rows)
    for seed in (0, 1):
        order = [Random(seed).randrange(24)]
        while len(order) < 9:
            apart = torch.cdist(where, where[order]).min(1).values
            order.append(int(apart.argmax()))
            # One row more at a time: each choice is the next step of this walk.
            assert diverse(base, rows, len(order), seed=seed) == sorted(order)


def test_another_seed_begins_elsewhere(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    rows = encoded(base, 24)
    assert len({tuple(diverse(base, rows, 3, seed=seed)) for seed in range(6)}) > 1
    assert diverse(base, rows, 3, seed=4) == diverse(base, rows, 3, seed=4)


def test_the_same_row_is_taken_again_only_when_nothing_else_is_left(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    three = encoded(base, 3)
    rows = [*three, *three, *three]
    for seed in range(4):
        chosen = diverse(base, rows, 3, seed=seed)
        assert sorted(n % 3 for n in chosen) == [0, 1, 2]
        more = diverse(base, rows, 7, seed=seed)
        assert len(set(more)) == 7


@pytest.mark.parametrize("count", [5, 6, 100])
def test_where_there_are_no_more_rows_all_are_taken(tiny_llama: tiny.Tiny, count: int) -> None:
    base = tiny_llama.base()
    assert diverse(base, encoded(base, 5), count, seed=0) == [0, 1, 2, 3, 4]


def test_one_row_of_many(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    assert diverse(base, encoded(base, 5), 1, seed=3) == [Random(3).randrange(5)]


def learned(model: tiny.Tiny, folder: Path, rows: list[Row], **train: Any) -> Any:
    wanted = recipe(
        {"type": "learn", "budget": 2, "init": 0.1},
        data={"train": {"path": "train.jsonl", **train}},
    )
    members = [member(model.adapter(kind)) for kind in ("plain", "same")]
    return compose(wanted, members, model.base(), Rows(rows[:12], rows[:2]), folder)


def test_what_was_chosen_is_recorded_and_only_that_is_learned_from(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    rows = [Row(prompt.strip(), output) for prompt, output in tiny.rows(14)]
    (tmp_path / "some").mkdir()
    some = learned(tiny_llama, tmp_path / "some", rows, select="diverse", limit=5)
    chosen = some.tokens["train"]["chosen"]
    assert len(chosen) == some.tokens["train"]["rows"] == 5
    assert json.loads(json.dumps(chosen)) == sorted(chosen)
    assert some.overlap == sum(n < 2 for n in chosen)
    (tmp_path / "same").mkdir()
    given = [rows[n] for n in chosen]
    wanted = recipe({"type": "learn", "budget": 2, "init": 0.1})
    members = [member(tiny_llama.adapter(kind)) for kind in ("plain", "same")]
    same = compose(wanted, members, tiny_llama.base(), Rows(given), tmp_path / "same")
    assert same.fitted.learned == some.fitted.learned


def test_a_limit_of_all_rows_leaves_nothing_to_choose(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    rows = [Row(prompt.strip(), output) for prompt, output in tiny.rows(14)]
    made = learned(tiny_llama, tmp_path, rows, limit=12, select="diverse")
    assert made.tokens["train"]["rows"] == 12
    assert made.tokens["train"]["chosen"] == list(range(12))


def test_test_rows_are_not_chosen_by_the_base() -> None:
    with pytest.raises(RecipeError, match="test rows are not chosen by the base; take random"):
        recipe({"type": "learn"}, data={"test": {"path": "t.jsonl", "select": "diverse",
                                                 "limit": 3}})  # fmt: skip
