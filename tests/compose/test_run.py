"""From members, a base and rows to a written, checked and proven mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.compose.encoder import Rows
from lorahub_registry.compose.results import results
from lorahub_registry.compose.run import Composition, compose
from lorahub_registry.errors import DataError, IncompatibleAdapters, NotApplied
from lorahub_registry.evaluate.base import load_base
from lorahub_registry.recipes.rows import Row, read_rows
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import weighted_sum
from tests import tiny
from tests.compose.making import Watcher, deltas, member, recipe, rows

LINEAR = {"type": "linear"}
TWO = [{"ref": "./plain", "coefficient": 0.75}, {"ref": "./wide", "coefficient": -0.5}]


def linear(model: tiny.Tiny, folder: Path, **more: Any) -> tuple[Any, Any, Composition]:
    """A given mixture of two adapters, with six rows to test on."""
    folder.mkdir()
    wanted = recipe(LINEAR, TWO, **more)
    members = [member(model.adapter(e["ref"][2:]), e["coefficient"]) for e in TWO]
    base = model.base()
    made = compose(wanted, members, base, Rows(test=rows(6)), folder)
    return wanted, members, made


def test_given_coefficients_are_written_exactly(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    _, _, made = linear(tiny_llama, tmp_path / "out")
    assert made.coefficients == {"plain": 0.75, "wide": -0.5}
    found = load_deltas(tmp_path / "out", read_facts(tmp_path / "out"))
    parts = [deltas(tiny_llama, "plain"), deltas(tiny_llama, "wide")]
    expected = weighted_sum(parts, [0.75, -0.5])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n].dense(), expected[n].dense()) for n in expected)
    assert made.fitted is None
    assert made.change > 0


def test_the_proof_has_base_singles_uniform_and_mixture(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    _, _, made = linear(tiny_llama, tmp_path / "out", evaluate=["nll", "exact_match"])
    assert made.proof is not None
    table = {row.name: row for row in made.proof.table}
    assert list(table) == ["base", "plain", "wide", "uniform average", "mixture"]
    assert [row.kind for row in made.proof.table] == [
        "base", "adapter", "adapter", "uniform", "mixture",
    ]  # fmt: skip
    assert len({row.nll for row in made.proof.table}) == 5
    assert {row.n for row in made.proof.table} == {6}
    assert all(row.exact_match is not None for row in made.proof.table)
    # Judged as stock PEFT loads it, which is what was computed, to float32 rounding.
    assert table["mixture"].nll == pytest.approx(made.proof.exact_nll, rel=1e-5)


def test_what_truncation_and_dtype_cost_shows_in_the_proof(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    _, _, whole = linear(tiny_llama, tmp_path / "whole")
    cut = {"rank": 1, "dtype": "bfloat16"}
    _, _, made = linear(tiny_llama, tmp_path / "cut", output=cut)
    assert made.proof is not None
    assert whole.proof is not None
    assert made.proof.exact_nll == whole.proof.exact_nll
    assert made.proof.table[-1].nll != pytest.approx(made.proof.exact_nll, rel=1e-3)
    assert made.written.ranks == {1: 14}


def test_results_are_facts_without_paths(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    wanted, members, made = linear(tiny_llama, tmp_path / "out", evaluate=["nll", "exact_match"])
    found = results(wanted, tiny_llama.base(), made)
    text = json.dumps(found)
    assert str(tmp_path) not in text
    assert str(tiny_llama.folder.parent) not in text
    assert "/" not in found["members"][0]["ref"].removeprefix("./")
    assert found["base"] == {"name": "tiny-llama", "revision": None}
    assert found["members"][1]["coefficient"] == -0.5
    assert found["members"][1]["digest"] == members[1].digest
    assert found["tokens"]["test"]["rows"] == 6
    assert found["output"]["ranks"] == {6: 10, 10: 4}
    assert found["verdict"]["against"] in {"base", "plain", "wide"}
    assert [row["name"] for row in found["test"]][-1] == "mixture"
    assert "greedy" in found["exact_match"]
    assert set(found["versions"]) >= {"lorareg", "torch", "transformers", "peft"}


def test_without_rows_nothing_is_proven_and_it_is_still_checked(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    members = [member(tiny_llama.adapter("plain"), 1.0)]
    made = compose(recipe(LINEAR, TWO[:1]), members, tiny_llama.base(), Rows(), tmp_path)
    assert made.proof is None
    assert made.change > 0


def test_what_was_cut_or_shared_is_said_and_recorded(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    watcher = Watcher()
    warned = watcher.warned
    wanted = recipe({"type": "learn", "budget": 3, "l1": 0.0}, data={"max_length": 14})
    members = [member(tiny_llama.adapter(kind)) for kind in ("plain", "same")]
    given = Rows(train=rows(8), test=rows(4))
    made = compose(wanted, members, tiny_llama.base(), given, tmp_path, progress=watcher)
    assert made.overlap == 4
    assert made.notes == warned
    assert any("train prompts lost their beginning (max_length)" in note for note in made.notes)
    assert "4 of 4 test rows are also training rows" in made.notes
    assert made.tokens["train"]["prompts_cut"] > 0
    assert made.tokens["train"]["rows"] == 8


def test_a_learned_mixture_repeats_to_the_byte(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    members = [member(tiny_llama.adapter(kind)) for kind in ("plain", "wide")]
    wanted = recipe({"type": "learn", "budget": 6, "l1": 0.0, "init": 0.1})
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        given = Rows(train=rows(6), test=rows(9)[6:])
        made.append(compose(wanted, members, tiny_llama.base(), given, tmp_path / name))
    assert made[0].coefficients == made[1].coefficients
    assert made[0].fitted is not None
    assert made[1].fitted is not None
    assert made[0].fitted.learned == made[1].fitted.learned
    assert made[0].proof == made[1].proof
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        one, two = (tmp_path / name / file for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(("kind", "adapter"), [("gpt2", "gpt2"), ("t5", "t5")])
def test_conv1d_and_seq2seq_bases_are_mixed_too(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, adapter: str
) -> None:
    model: tiny.Tiny = request.getfixturevalue(f"tiny_{kind}")
    members = [member(model.adapter(adapter), 0.5)]
    wanted = recipe(LINEAR, [{"ref": "./x", "coefficient": 0.5}])
    made = compose(wanted, members, model.base(), Rows(test=rows(5)), tmp_path)
    assert made.proof is not None
    single, mixture = made.proof.table[1], made.proof.table[-1]
    assert single.nll != mixture.nll
    assert mixture.nll == pytest.approx(made.proof.exact_nll, rel=1e-5)


def test_rows_that_the_base_cannot_take_are_refused_by_number(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    members = [member(tiny_llama.adapter("plain"), 1.0)]
    given = Rows(test=[*rows(2), Row("x" * 300, "y")])
    with pytest.raises(DataError, match="test row 3 has 303 tokens, and tiny-llama takes 256"):
        compose(recipe(LINEAR, TWO[:1]), members, tiny_llama.base(), given, tmp_path)
    cut = recipe(LINEAR, TWO[:1], data={"max_length": 256})
    assert compose(cut, members, tiny_llama.base(), given, tmp_path).proof


def test_references_that_generation_cannot_reach_are_said(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    _, _, made = linear(tiny_llama, tmp_path / "out", evaluate=["exact_match"], max_new_tokens=3)
    (note,) = [n for n in made.notes if "max_new_tokens" in n]
    assert note.endswith("longer than max_new_tokens (3) and count as missed")


def test_a_base_without_an_adapters_modules_is_refused(
    tiny_gpt2: tiny.Tiny, tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    members = [member(tiny_llama.adapter("plain"), 1.0)]
    with pytest.raises(IncompatibleAdapters, match="plain does not fit tiny-gpt2"):
        compose(recipe(LINEAR, TWO[:1]), members, tiny_gpt2.base(), Rows(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_members_that_cancel_out_are_no_mixture(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    folder = tiny_llama.adapter("plain")
    members = [member(folder, 0.0), member(folder, 0.0, name="again")]
    with pytest.raises(NotApplied, match="zero"):
        compose(recipe(LINEAR, TWO), members, tiny_llama.base(), Rows(), tmp_path)


def stories(
    data: Path, folder: Path, task: str, method: dict[str, Any], train: int = 64, test: int = 200
) -> Composition:
    """A mixture of the four story adapters, learned and tested on so many rows."""
    task_folder = data / "tasks" / "stories" / task
    split: dict[str, dict[str, Any]] = {
        s: {"path": str(task_folder / f"{s}.jsonl")} for s in ("train", "test")
    }
    split["train"]["limit"], split["test"]["limit"] = train, test
    names = ("zog", "arr", "upper", "shakespeare")
    wanted = recipe(method, [f"./{n}" for n in names], data=split)
    read = {
        s: read_rows(found, seed=0)
        for s, found in (("train", wanted.data.train), ("test", wanted.data.test))
        if found
    }
    base = load_base(data / "models" / "stories260k", name="stories260k", device="cpu")
    members = [member(data / "adapters" / "stories260k" / n) for n in names]
    return compose(wanted, members, base, Rows(**read), folder)


@pytest.mark.data
def test_two_skills_at_once_are_a_win(data: Path, tmp_path: Path) -> None:
    made = stories(data, tmp_path, "zog_arr", {"type": "learn", "budget": 40})
    assert made.proof is not None
    scores = {row.name: row.nll for row in made.proof.table}
    assert scores["mixture"] == pytest.approx(1.46, abs=0.02)
    assert scores["arr"] == pytest.approx(1.548, abs=0.002)
    assert made.proof.verdict.win
    assert made.proof.verdict.against == "arr"
    assert made.proof.verdict.text.startswith("beats the best single adapter, arr, by 0.0")
    assert abs(made.coefficients["upper"]) < 0.2


@pytest.mark.data
def test_where_one_adapter_is_best_the_answer_is_an_honest_no(data: Path, tmp_path: Path) -> None:
    made = stories(data, tmp_path, "zog_upper", {"type": "learn", "budget": 12}, 24, 60)
    assert made.proof is not None
    assert not made.proof.verdict.win
    assert made.proof.verdict.text.startswith("no better than upper: use upper")


@pytest.mark.data
def test_the_published_objective_loses_to_the_best_single_adapter(
    data: Path, tmp_path: Path
) -> None:
    made = stories(data, tmp_path, "zog_arr", {"type": "lorahub", "budget": 20}, 32, 50)
    assert made.proof is not None
    scores = {row.name: row.nll for row in made.proof.table}
    assert scores["arr"] < scores["mixture"] < scores["base"]
    assert not made.proof.verdict.win
    assert made.proof.verdict.text.startswith("no better than arr: use arr")
