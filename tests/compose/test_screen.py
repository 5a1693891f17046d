"""Screening: of many adapters the few that help, the best single one always among them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lorahub_registry.adapters.compat import Member
from lorahub_registry.compose import screen as module
from lorahub_registry.compose.encoder import Rows
from lorahub_registry.compose.journal import Journal
from lorahub_registry.compose.results import results
from lorahub_registry.compose.run import compose
from lorahub_registry.compose.screen import Screened, screen
from lorahub_registry.errors import NotApplied
from lorahub_registry.evaluate.base import load_base
from lorahub_registry.evaluate.generation import generate
from lorahub_registry.evaluate.nll import score
from lorahub_registry.evaluate.tokens import Encoded, TokenRule, encode
from lorahub_registry.recipes.model import Split
from lorahub_registry.recipes.rows import Row, read_rows
from lorahub_registry.runtime.apply import applied
from lorahub_registry.weights.files import load_deltas, save_adapter
from lorahub_registry.weights.lowrank import Deltas, LowRank, weighted_sum
from tests import tiny
from tests.compose.making import Watcher, deltas, member, recipe


def written(folder: Path, name: str, found: Deltas) -> Member:
    """An adapter of these deltas, as a member."""
    place = folder / name
    place.mkdir()
    save_adapter(place, found, base="tiny", base_revision=None, task_type="CAUSAL_LM")
    return member(place)


def noise(like: Deltas, seed: int, strength: float) -> dict[str, LowRank]:
    made = torch.Generator().manual_seed(seed)
    return {
        n: LowRank(
            strength * torch.randn(d.a.shape, generator=made),
            strength * torch.randn(d.b.shape, generator=made),
        )
        for n, d in like.items()
    }


def said_with(base: Any, mixture: Deltas, count: int = 6) -> list[Encoded]:
    """Rows whose answers are what the base says with ``mixture`` on it."""
    prompts = [base.tokenizer(prompt)["input_ids"] for prompt, _ in tiny.rows(count)]
    with applied(base.model, mixture):
        said = generate(base.model, base.tokenizer, prompts, max_new_tokens=6, seq2seq=False)
    return [Encoded(p, o or [5]) for p, o in zip(prompts, said, strict=True)]


@pytest.fixture(scope="module")
def twelve(
    tiny_llama: tiny.Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Member], dict[str, LowRank]]:
    """Two halves of what makes the answers, among ten that only disturb; and the whole of it."""
    folder = tmp_path_factory.mktemp("twelve")
    whole = deltas(tiny_llama, "wide")
    layers = [{n: d for n, d in whole.items() if f"layers.{i}." in n} for i in range(2)]
    members = [written(folder, f"noise{i}", noise(whole, i, 0.12)) for i in range(7)]
    members.insert(3, written(folder, "first", layers[0]))
    members.append(written(folder, "second", layers[1]))
    members += [written(folder, f"like{i}", deltas(tiny_llama, k)) for i, k in
                enumerate(("plain", "head", "patterns"))]  # fmt: skip
    return members, whole


def screened(
    tiny_llama: tiny.Tiny, twelve: tuple[list[Member], Any], keep: int, **more: Any
) -> Screened:
    base = tiny_llama.base()
    given = said_with(base, twelve[1])
    return screen(base, twelve[0], given, keep, journal=more.pop("journal", Journal()), **more)


def test_of_twelve_the_two_that_make_the_answers_are_kept(
    tiny_llama: tiny.Tiny, twelve: tuple[list[Member], Any]
) -> None:
    found = screened(tiny_llama, twelve, 2)
    assert [m.name for m in found.kept] == ["first", "second"]
    assert list(found.alone) == [m.name for m in twelve[0]]


def test_what_it_says_of_each_is_that_adapters_loss(
    tiny_llama: tiny.Tiny, twelve: tuple[list[Member], Any]
) -> None:
    found = screened(tiny_llama, twelve, 3)
    base = tiny_llama.base()
    given = said_with(base, twelve[1])
    parts = {m.name: load_deltas(m.folder, m.facts) for m in twelve[0]}
    for name, nll in found.alone.items():
        with applied(base.model, parts[name]):
            assert nll == pytest.approx(score(base.model, base.batches(given)).mean, rel=1e-6)
    best = min(found.alone, key=found.alone.__getitem__)
    # What was added to the best, and how strongly, explains each value.
    [(second, nll), *_] = found.together.items()
    tried = []
    for strength in (1.0, 0.5):
        with applied(base.model, weighted_sum([parts[best], parts[second]], [1.0, strength])):
            tried.append(score(base.model, base.batches(given)).mean)
    assert nll == pytest.approx(min(tried), rel=1e-5)
    assert list(found.together.values()) == sorted(found.together.values(), reverse=True)


@pytest.mark.parametrize("keep", [1, 2, 5, 11])
def test_so_many_are_kept_in_their_order_and_the_best_single_one_always(
    tiny_llama: tiny.Tiny, twelve: tuple[list[Member], Any], keep: int
) -> None:
    found = screened(tiny_llama, twelve, keep)
    assert len(found.kept) == keep
    order = [m.name for m in twelve[0]]
    names = [m.name for m in found.kept]
    assert names == sorted(names, key=order.index)
    assert min(found.alone, key=found.alone.__getitem__) in names


def test_where_nothing_gains_the_next_best_alone_fill_the_places(
    tiny_llama: tiny.Tiny, twelve: tuple[list[Member], Any]
) -> None:
    base = tiny_llama.base()
    # The base's own words: every adapter only takes away.
    given = said_with(base, {})
    found = screen(base, twelve[0], given, 4, journal=Journal())
    ranked = sorted(found.alone, key=found.alone.__getitem__)
    left = [name for name in ranked if name not in found.together][: 4 - len(found.together)]
    assert {m.name for m in found.kept} == {*found.together, *left}
    assert len(found.together) < 3


def test_an_adapter_that_overflows_is_out_and_said(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    base, whole = tiny_llama.base(), deltas(tiny_llama, "wide")
    huge = {n: LowRank(d.a * 1e18, d.b * 1e18) for n, d in whole.items()}
    members = [written(tmp_path, "huge", huge), written(tmp_path, "wide", whole),
               written(tmp_path, "small", noise(whole, 1, 0.05))]  # fmt: skip
    given = said_with(base, whole)
    found = screen(base, members, given, 2, journal=Journal())
    assert found.alone["huge"] == float("inf")
    assert [m.name for m in found.kept] == ["wide", "small"]
    with pytest.raises(NotApplied, match="no adapter alone gives a finite loss"):
        screen(base, members[:1], given, 1, journal=Journal())


def test_one_adapter_at_a_time_is_in_memory_at_first(
    tiny_llama: tiny.Tiny, twelve: tuple[list[Member], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    most: list[int] = []

    def watched(*given: Any) -> dict[str, LowRank]:
        found = load_deltas(*given)
        seen.append(weakref.ref(next(iter(found.values())).a))
        most.append(sum(ref() is not None for ref in seen))
        return found

    monkeypatch.setattr(module, "load_deltas", watched)
    screened(tiny_llama, twelve, 2)
    assert len(most) == 12
    assert max(most) <= 2, "the last one's, until the next one's stands in its place"


def test_it_is_kept_in_the_journal_and_not_done_twice(
    tiny_llama: tiny.Tiny, twelve: tuple[list[Member], Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    journal = Journal(tmp_path / "run.jsonl")
    first = screened(tiny_llama, twelve, 3, journal=journal)
    journal.close()

    def never(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "load_deltas", never)
    monkeypatch.setattr(module, "score", never)
    again = Journal(tmp_path / "run.jsonl")
    assert again.found >= 12 + 2
    assert screened(tiny_llama, twelve, 3, journal=again) == first
    assert again.used == again.found


def test_progress_counts_adapters(tiny_llama: tiny.Tiny, twelve: tuple[list[Member], Any]) -> None:
    counted: list[tuple[str, float | None, float]] = []

    class Counting:
        @contextmanager
        def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Any]:
            self.done = 0.0
            yield self
            counted.append((title, total, self.done))

        def advance(self, n: float = 1) -> None:
            self.done += n

        def describe(self, text: str) -> None:
            assert text

    screened(tiny_llama, twelve, 2, progress=Counting())
    assert counted == [("Screening, one by one", 12, 12), ("Screening, together", 1, 1)]


def test_a_mixture_of_the_screened_tells_all_and_holds_the_kept(
    tiny_llama: tiny.Tiny, twelve: tuple[list[Member], Any], tmp_path: Path
) -> None:
    base = tiny_llama.base()
    rows = [Row(prompt.strip(), output) for prompt, output in tiny.rows(8)]
    members = twelve[0]
    wanted = recipe(
        {"type": "learn", "budget": 4, "l1": 0.0, "init": 0.1, "screen": {"keep": 3}},
        [f"./{m.name}" for m in members],
    )
    watcher = Watcher()
    warned = watcher.warned
    made = compose(wanted, members, base, Rows(rows[:6], rows[6:]), tmp_path, progress=watcher)
    found = json.loads(json.dumps(results(wanted, base, made)))
    assert list(found["screened"]["alone"]) == [m.name for m in members]
    kept = [m["name"] for m in found["members"]]
    assert len(kept) == 3
    assert set(found["screened"]["together"]) < set(kept)
    [note] = [n for n in found["notes"] if n.startswith("9 of 12 adapters were screened out: ")]
    assert note in warned
    assert [row["name"] for row in found["test"]] == [
        "base", *kept, "uniform average", "mixture",
    ]  # fmt: skip
    assert all(len(e["coefficients"]) == 3 for e in found["search"])


def test_keeping_all_is_no_screening(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    members = [member(tiny_llama.adapter(kind)) for kind in ("plain", "wide")]
    wanted = recipe({"type": "learn", "budget": 2, "init": 0.1, "screen": {"keep": 2}})
    rows = [Row(prompt.strip(), output) for prompt, output in tiny.rows(3)]
    made = compose(wanted, members, tiny_llama.base(), Rows(rows), tmp_path)
    assert made.fitted is not None
    assert made.fitted.screened is None


@pytest.mark.data
def test_of_four_real_adapters_the_two_of_the_task_stay(data: Path) -> None:
    base = load_base(data / "models" / "stories260k", name="stories260k", device="cpu")
    names = ("zog", "upper", "arr", "shakespeare")
    members = [member(data / "adapters" / "stories260k" / name) for name in names]
    split = Split(path=str(data / "tasks/stories/zog_arr/train.jsonl"), limit=24)
    pairs = [(f"{row.input} ", row.output) for row in read_rows(split, seed=0)]
    rows: Sequence[Encoded] = encode(base.tokenizer, pairs, TokenRule(), seq2seq=False)
    found = screen(base, members, rows, 2, journal=Journal())
    assert [m.name for m in found.kept] == ["zog", "arr"]
    assert min(found.alone, key=found.alone.__getitem__) == "arr"
    assert found.together["zog"] < found.alone["arr"]
