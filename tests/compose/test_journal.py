"""What a run that was stopped had measured: kept line by line, read back to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorahub_registry.compose.journal import Journal
from lorahub_registry.compose.learn import Learned, learn
from lorahub_registry.compose.objective import Coefficients, Loss, Losses
from lorahub_registry.errors import OutputError
from lorahub_registry.recipes.learned import Learn

floats = st.floats(allow_nan=False)


def counted(asked: list[list[Coefficients]]) -> Losses:
    """A bowl whose last bits depend on who is measured together, as a real forward's do."""

    def losses(candidates: Sequence[Coefficients]) -> Iterator[Loss]:
        for first in range(0, len(candidates), 3):
            part = list(candidates[first : first + 3])
            asked.append(part)
            company = 1e-15 * sum(sum(c) for c in part)
            for c in part:
                yield Loss(1 + sum((x - 0.3) ** 2 for x in c) + company)

    return losses


def search(journal: Journal, asked: list[list[Coefficients]], seed: int = 0) -> Learned:
    losses = journal.through("search", counted(asked), 3)
    method = Learn(budget=40, optimizer="CMA", num_workers=7)
    return learn(losses, size=2, rows=1, method=method, seed=seed)


@given(st.lists(st.tuples(floats, floats, floats), min_size=1, max_size=9, unique=True))
@settings(max_examples=25)
def test_numbers_read_back_to_the_same_bit(
    tmp_path_factory: pytest.TempPathFactory, given: list[tuple[float, float, float]]
) -> None:
    path = tmp_path_factory.mktemp("journal") / "deep" / "run.jsonl"
    kept = Journal(path)
    wanted = {(x, y): Loss(nll, (nll, x)) for x, y, nll in given}
    for c, loss in wanted.items():
        kept.put("search", c, loss)
    kept.close()
    again = Journal(path)
    assert again.found == len(wanted)
    asked: list[list[Coefficients]] = []
    found = list(again.through("search", counted(asked))(list(wanted)))
    assert found == list(wanted.values())
    assert asked == []
    assert again.used == len(wanted)


def test_what_is_no_number_is_known_as_that(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    kept = Journal(path)
    kept.put("search", (1.0,), Loss(float("nan")))
    kept.put("search", (2.0,), Loss(float("inf"), (float("nan"),)))
    kept.close()
    asked: list[list[Coefficients]] = []
    one, two = Journal(path).through("search", counted(asked))([(1.0,), (2.0,)])
    assert math.isnan(one.nll)
    assert one.slope is None
    assert two.nll == math.inf
    assert two.slope is not None
    assert asked == []


@pytest.mark.parametrize("cut", [1, 5, 8, 13, 20, 33, 39])
def test_a_resumed_search_is_the_unbroken_one_to_the_bit(tmp_path: Path, cut: int) -> None:
    path, everything = tmp_path / "run.jsonl", list[list[Coefficients]]()
    journal = Journal(path)
    unbroken = search(journal, everything)
    journal.close()
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 40
    # Killed while it wrote the line after these.
    path.write_text("".join(lines[:cut]) + lines[cut][:17])
    asked: list[list[Coefficients]] = []
    journal = Journal(path)
    assert journal.found == cut
    assert search(journal, asked) == unbroken
    journal.close()
    # At most what shared a forward with a lost one is measured again, and in the same company.
    assert all(part in everything for part in asked)
    assert 40 - cut <= sum(map(len, asked)) <= 40 - cut + 2
    assert journal.used == 40 - sum(map(len, asked))
    # The line that was cut off has been ended: a third run reads all.
    assert Journal(path).found == 40


def test_a_candidate_that_comes_again_is_not_measured_again() -> None:
    asked: list[list[Coefficients]] = []
    losses = Journal().through("search", counted(asked), 3)
    first = list(losses([(1.0,), (2.0,), (1.0,)]))
    assert first[0] == first[2]
    assert list(losses([(2.0,), (3.0,)])) == [first[1], Loss(1 + (3.0 - 0.3) ** 2 + 3e-15)]
    assert asked == [[(1.0,), (2.0,)], [(3.0,)]]


def test_scopes_are_apart(tmp_path: Path) -> None:
    kept = Journal(tmp_path / "run.jsonl")
    kept.put("alone zog", (1.0,), Loss(1.0))
    kept.put("alone arr", (1.0,), Loss(2.0))
    kept.close()
    again = Journal(tmp_path / "run.jsonl")
    asked: list[list[Coefficients]] = []
    found = [
        next(again.through(scope, counted(asked))([(1.0,)])).nll
        for scope in ("alone arr", "alone zog", "search")
    ]
    assert found[:2] == [2.0, 1.0]
    assert asked == [[(1.0,)]]


@pytest.mark.parametrize(
    "damage",
    [
        "", "{", "[]", "null", "3", '"text"', '{"v": 1}', "\x00\xff", "nan",
        '{"v": 2, "scope": "search", "c": [9.0], "nll": 1.0, "slope": null}',
        '{"v": 1, "scope": "search", "c": [9.0], "nll": null, "slope": null}',
        '{"v": 1, "scope": "search", "c": [9.0], "nll": "much", "slope": null}',
        '{"v": 1, "scope": "search", "c": [9.0], "nll": 1.0, "slope": ["steep"]}',
        '{"v": 1, "scope": "search", "c": 9.0, "nll": 1.0, "slope": null}',
        '{"v": 1, "scope": ["search"], "c": [9.0], "nll": 1.0, "slope": null}',
        "[" * 5000,
    ],
)  # fmt: skip
def test_lines_that_are_none_of_its_own_are_passed_over(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "run.jsonl"
    kept = Journal(path)
    kept.put("search", (1.0,), Loss(0.5))
    kept.close()
    with path.open("ab") as file:
        file.write(damage.encode("latin-1") + b"\n")
    again = Journal(path)
    assert again.found == 1
    again.put("search", (2.0,), Loss(0.25))
    again.close()
    assert Journal(path).found == 2


def test_an_empty_file_is_an_empty_journal(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.touch()
    journal = Journal(path)
    assert journal.found == 0
    journal.put("search", (1.0,), Loss(0.5))
    journal.close()
    assert Journal(path).found == 1


def test_what_is_forgotten_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal(path)
    journal.forget()  # before anything was kept, too
    journal.put("search", (1.0,), Loss(0.5))
    assert path.is_file()
    journal.forget()
    assert not path.exists()


def test_nothing_is_written_before_there_is_something_to_keep(tmp_path: Path) -> None:
    Journal(tmp_path / "deep" / "run.jsonl").close()
    assert list(tmp_path.iterdir()) == []


def test_each_evaluation_is_on_the_disk_before_the_next_begins(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    def losses(candidates: Sequence[Coefficients]) -> Iterator[Loss]:
        for n, _ in enumerate(candidates):
            lines = path.read_text().splitlines() if n else []
            assert [json.loads(line)["c"] for line in lines] == [[float(i)] for i in range(n)]
            yield Loss(float(n))

    found = list(Journal(path).through("search", losses)([(0.0,), (1.0,), (2.0,)]))
    assert [loss.nll for loss in found] == [0.0, 1.0, 2.0]


def test_a_full_disk_is_told_by_the_files_name() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    journal = Journal(full)
    with pytest.raises(OutputError, match="/dev/full: the journal cannot be written: No space"):
        journal.put("search", (1.0,), Loss(0.5))
    journal.close()  # what could not be written is not tried again


def test_a_place_that_takes_no_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "journals").write_text("no folder")
    with pytest.raises(OutputError, match=r"run\.jsonl: the journal cannot be written"):
        Journal(tmp_path / "journals" / "run.jsonl").put("search", (1.0,), Loss(0.5))
    (tmp_path / "run.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"run\.jsonl: the journal cannot be written"):
        Journal(tmp_path / "run.jsonl").put("search", (1.0,), Loss(0.5))
