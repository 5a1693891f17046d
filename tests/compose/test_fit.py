"""Learned mixtures: coefficients by layer group and module, how sure they are, too few rows."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.compose.encoder import Rows
from lorahub_registry.compose.fit import Fitted, Means, fit
from lorahub_registry.compose.forms import DeltaForm, Layout
from lorahub_registry.compose.journal import Journal
from lorahub_registry.compose.learn import learn
from lorahub_registry.compose.objective import Measure
from lorahub_registry.compose.results import results
from lorahub_registry.compose.run import Composition, compose
from lorahub_registry.errors import DataError, NotApplied
from lorahub_registry.evaluate.nll import score
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.recipes.learned import Learn
from lorahub_registry.recipes.rows import Row
from lorahub_registry.runtime.apply import applied
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import LowRank
from tests import tiny
from tests.compose.making import Watcher, deltas, encoded, member, recipe

KINDS = ("plain", "wide")


def made_of(
    model: tiny.Tiny, folder: Path, method: dict[str, Any], kinds: tuple[str, ...] = KINDS,
    count: int = 10,
) -> tuple[Composition, dict[str, Any]]:  # fmt: skip
    wanted = recipe({"type": "learn", "l1": 0.0, **method}, [f"./{k}" for k in kinds])
    rows = [Row(prompt.strip(), output) for prompt, output in tiny.rows(count + 3)]
    members = [member(model.adapter(kind)) for kind in kinds]
    base = model.base()
    made = compose(wanted, members, base, Rows(rows[:count], rows[count:]), folder)
    return made, json.loads(json.dumps(results(wanted, base, made)))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("per", ["layer_group", "module"])
def test_each_group_or_module_gets_its_own_sum_and_stock_peft_loads_it(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, per: str
) -> None:
    from peft import PeftModel

    model: tiny.Tiny = request.getfixturevalue(f"tiny_{kind}")
    kinds = KINDS if kind == "llama" else ("t5",)
    method = {"per": per, "budget": 6, "optimizer": "RandomSearch"}
    if per == "layer_group":
        method["layer_groups"] = 2
    made, found = made_of(model, tmp_path, method, kinds)
    parts = {k: deltas(model, k) for k in kinds}
    names = {name for each in parts.values() for name in each}
    by_set = found["coefficients"]
    layout = Layout(names, per, 2)
    assert tuple(by_set) == layout.names
    assert len({tuple(c.values()) for c in by_set.values()}) == len(by_set)
    for k in kinds:
        mean = statistics.fmean(c[k] for c in by_set.values() if k in c)
        # A coefficient that multiplies nothing would count, and be searched for, in vain.
        theirs = {layout.names[layout(name)] for name in parts[k]}
        assert {name for name, c in by_set.items() if k in c} == theirs
        assert made.coefficients[k] == pytest.approx(mean)
    # By hand, from results.json and the adapters' files, into the weights.
    bare = model.model()
    for name in names:
        mine = by_set[layout.names[layout(name)]]
        for k, each in parts.items():
            if name in each:
                bare.get_submodule(name).weight.data += mine[k] * each[name].dense()
    with torch.inference_mode():
        ids = torch.tensor([[1, 40, 41, 42, 43]])
        more = {"decoder_input_ids": ids} if kind == "t5" else {}
        by_hand = bare(ids, **more).logits
        written = PeftModel.from_pretrained(model.model(), str(tmp_path))(ids, **more).logits
        before = model.model()(ids, **more).logits
    scale = float(by_hand.std())
    torch.testing.assert_close(written, by_hand, rtol=1e-3, atol=1e-4 * scale)
    assert float((by_hand - before).std()) > 0.05 * scale


def test_layer_groups_are_neighbours_in_the_order_of_the_model(tiny_t5: tiny.Tiny) -> None:
    names = set(deltas(tiny_t5, "t5")) | {"lm_head", "shared"}
    layout = Layout(names, "layer_group", 4)
    assert [layout(f"{stack}.block.{n}.layer.0.SelfAttention.q")
            for stack in ("encoder", "decoder") for n in (0, 1)] == [0, 1, 2, 3]  # fmt: skip
    assert layout("lm_head") == 3
    assert layout("shared") == 0
    # No more groups than layers; twelve layers are not sorted as words.
    many = [f"model.layers.{n}.mlp.up_proj" for n in range(12)]
    layout = Layout(many, "layer_group", 3)
    assert [layout(name) for name in many] == [n // 4 for n in range(12)]
    assert len(Layout(many, "layer_group", 200).names) == 12
    assert len(Layout(["head", "tail"], "layer_group", 4).names) == 1


def test_an_adapter_whose_coefficients_are_zero_leaves_no_trace(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    # Only "wide" helps with what it says itself; an L1 term takes the other one out exactly.
    base = tiny_llama.base()
    members = [member(tiny_llama.adapter(kind)) for kind in KINDS]
    wanted = recipe({"type": "learn", "optimizer": "gradient", "l1": 0.2, "budget": 60})
    with applied(base.model, deltas(tiny_llama, "wide")):
        from lorahub_registry.evaluate.generation import generate

        prompts = [row.prompt for row in encoded(base, 6)]
        said = generate(base.model, base.tokenizer, prompts, max_new_tokens=6, seq2seq=False)
    rows = [Encoded(p, o or [5]) for p, o in zip(prompts, said, strict=True)]
    found = fit(wanted, members, base, rows)
    if found.learned.coefficients[0] == 0:
        wide = deltas(tiny_llama, "wide")
        assert {n: d.rank for n, d in found.mixture.items()} == {n: d.rank for n, d in wide.items()}
    assert found.learned.coefficients[1] > 0.2
    assert found.learned.coefficients[0] == 0


def fitted(
    model: tiny.Tiny, method: dict[str, Any], count: int = 9, test: int = 4, seed: int = 0,
    **more: Any,
) -> Fitted:  # fmt: skip
    base = model.base()
    wanted = recipe({"type": "learn", "l1": 0.0, **method}, seed=seed)
    members = [member(model.adapter(kind)) for kind in KINDS]
    return fit(wanted, members, base, encoded(base, count), encoded(base, test, count), **more)


def alone(model: tiny.Tiny, method: Learn, rows: list[Encoded], seed: int) -> Any:
    base = model.base()
    form = DeltaForm([deltas(model, kind) for kind in KINDS])
    with Measure(base.model, form, base.batches(rows)) as losses:
        return learn(losses, size=2, rows=len(rows), method=method, seed=seed)


def nll(model: tiny.Tiny, c: Any, rows: list[Encoded]) -> float:
    base = model.base()
    form = DeltaForm([deltas(model, kind) for kind in KINDS])
    with applied(base.model, form.at(c)):
        return score(base.model, base.batches(rows)).mean


@pytest.mark.parametrize("by", ["folds", "seeds"])
def test_the_spread_is_that_of_searches_done_again(tiny_llama: tiny.Tiny, by: str) -> None:
    options = {"budget": 8, "optimizer": "CMA", "l1": 0.0}
    found = fitted(tiny_llama, options | {by: 3}, seed=5).spread
    assert found is not None
    rows = encoded(tiny_llama.base(), 13)
    train, test = rows[:9], rows[9:]
    runs = []
    for i in range(3):
        left = train[i::3] if by == "folds" else []
        taken = [row for row in train if row not in left]
        run = alone(tiny_llama, Learn(**options), taken, 5 if by == "folds" else 5 + i)
        said = found["runs"][i]
        assert said["coefficients"] == pytest.approx(run.coefficients, rel=1e-6)
        assert said["evaluations"] == 8
        assert said["stopped"] == "budget"
        assert said["objective"] == pytest.approx(min(e.objective for e in run.evaluations))
        assert said["test_nll"] == pytest.approx(nll(tiny_llama, run.coefficients, test), rel=1e-5)
        assert ("fold_nll" in said) == (by == "folds")
        if left:
            fold = nll(tiny_llama, run.coefficients, left)
            assert said["fold_nll"] == pytest.approx(fold, rel=1e-5)
        runs.append(run.coefficients)
    assert found["by"] == by
    for i, told in enumerate(found["coefficients"]):
        values = [c[i] for c in runs]
        assert told["mean"] == pytest.approx(statistics.fmean(values))
        assert told["std"] == pytest.approx(statistics.stdev(values), rel=1e-4)
        assert (told["std"] > 0) == (len(set(values)) > 1)
    values = [run["test_nll"] for run in found["runs"]]
    assert found["test_nll"]["std"] == pytest.approx(statistics.stdev(values))


def test_the_spread_changes_nothing_of_the_mixture(tiny_llama: tiny.Tiny) -> None:
    options = {"budget": 6, "optimizer": "CMA"}
    plain = fitted(tiny_llama, options)
    for by in ("folds", "seeds"):
        assert fitted(tiny_llama, options | {by: 2}).learned == plain.learned
    spread = fitted(tiny_llama, options | {"seeds": 2}).spread
    assert spread is not None
    assert spread["runs"][0]["coefficients"] == plain.learned.coefficients


def test_as_many_folds_as_rows_and_no_more(tiny_llama: tiny.Tiny) -> None:
    options = {"budget": 2, "init": 0.1}
    found = fitted(tiny_llama, options | {"folds": 3}, count=3).spread
    assert found is not None
    assert len(found["runs"]) == 3
    with pytest.raises(DataError, match="folds: 4 needs as many training rows, and there are 3"):
        fitted(tiny_llama, options | {"folds": 4}, count=3)


def test_without_test_rows_the_spread_tells_of_none(tiny_llama: tiny.Tiny) -> None:
    found = fitted(tiny_llama, {"budget": 2, "init": 0.1, "seeds": 2}, test=0).spread
    assert found is not None
    assert "test_nll" not in found
    assert "test_nll" not in found["runs"][0]


def test_more_coefficients_than_tokens_is_the_datas_fault(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        fitted(tiny_llama, {"per": "module", "budget": 2}, count=1)
    assert str(error.value).startswith("per: module has 18 coefficients, and 1 training rows with ")
    assert "per: model or fewer layer_groups" in str(error.value.hint)
    # With one coefficient an adapter it is a warning: the penalty and the start hold them.
    fitted(tiny_llama, {"budget": 2, "init": 0.1}, count=1)


def test_more_coefficients_than_rows_is_told_and_recorded(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    watcher = Watcher()
    warned = watcher.warned
    method = {"per": "module", "budget": 2, "init": 0.1, "optimizer": "RandomSearch"}
    said = "18 coefficients are learned from 10 rows: more than they carry; look at the spread"
    fitted(tiny_llama, method, 10, progress=watcher)
    assert [text.startswith(said) for text in warned] == [True]
    _, found = made_of(tiny_llama, tmp_path, method)
    assert any(note.startswith(said) for note in found["notes"])
    warned.clear()
    fitted(tiny_llama, {"budget": 2, "init": 0.1}, 2, progress=watcher)
    assert warned == []


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"budget": 3, "init": 0.1}, "budget"),
        ({"budget": 50, "init": 0.1, "target": 99.0}, "target"),
        ({"budget": 50, "init": 0.1, "patience": 2, "tolerance": 9.0}, "plateau"),
        ({"budget": 50, "init": 0.1, "optimizer": "gradient"}, "converged"),
    ],
)
def test_why_a_search_ended_stands_in_the_results(
    tiny_llama: tiny.Tiny, tmp_path: Path, method: dict[str, Any], reason: str
) -> None:
    made, found = made_of(tiny_llama, tmp_path, method)
    assert found["stopped"]["reason"] == reason
    assert found["stopped"]["text"]
    assert made.fitted is not None
    assert len(found["search"]) == len(made.fitted.learned.evaluations) <= 50
    assert found["skipped"] == 0
    how = {"gradient"} if "optimizer" in method else {"in place", "operator"}
    assert found["measured"]["how"] in how


def test_candidates_without_a_finite_loss_are_counted_in_the_results(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    from lorahub_registry.weights.files import save_adapter

    folder = tmp_path / "huge"
    folder.mkdir()
    whole = deltas(tiny_llama, "wide")
    huge = {n: LowRank(d.a * 1e18, d.b * 1e18) for n, d in whole.items()}
    save_adapter(folder, huge, base="tiny", base_revision=None, task_type="CAUSAL_LM")
    members = [member(folder), member(tiny_llama.adapter("plain"))]
    base = tiny_llama.base()
    wanted = recipe({"type": "learn", "budget": 6, "l1": 0.0, "optimizer": "CMA"})
    with pytest.raises(NotApplied, match="no finite loss"):
        fit(wanted, members, base, encoded(base, 4))
    # From zero on one candidate is the base: of a number, and no mixture.
    wanted = recipe({"type": "learn", "budget": 6, "l1": 0.0, "optimizer": "OnePlusOne"})
    with pytest.raises(NotApplied, match="no mixture is better"):
        fit(wanted, members, base, encoded(base, 4))


def test_candidates_that_shared_a_forward_share_it_again_in_a_resumed_run(
    tiny_llama: tiny.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"budget": 12, "optimizer": "CMA", "num_workers": 6, "l1": 0.0}
    path, asked = tmp_path / "run.jsonl", list[list[Any]]()
    through = Measure.__call__

    def watched(self: Measure, candidates: Any) -> Any:
        asked.append(list(candidates))
        return through(self, candidates)

    monkeypatch.setattr(Measure, "__call__", watched)
    journal = Journal(path)
    unbroken = fitted(tiny_llama, method, 4, means=Means(journal))
    journal.close()
    copies = unbroken.how["copies"]
    assert 1 < copies <= 6
    lines = path.read_text().splitlines(keepends=True)
    # Killed after the first of those that shared a forward, in the second round.
    path.write_text("".join(lines[: 6 + 1]))
    first, asked[:] = asked[:], []
    journal = Journal(path)
    resumed = fitted(tiny_llama, method, 4, means=Means(journal))
    journal.forget()
    assert resumed.learned == unbroken.learned
    assert [len(part) for part in asked] == [0, 6]
    assert asked[1] == first[1]


def test_it_leaves_the_base_as_it_was(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    before = {n: t.clone() for n, t in base.model.state_dict().items()}
    members = [member(tiny_llama.adapter(kind)) for kind in KINDS]
    wanted = recipe({"type": "learn", "budget": 3, "init": 0.1, "seeds": 2, "screen": {"keep": 1}})
    fit(wanted, members, base, encoded(base, 4), means=Means(jobs=1))
    assert all(torch.equal(before[n], t) for n, t in base.model.state_dict().items())
    assert not any(module._forward_hooks for module in base.model.modules())


def test_embeddings_are_learned_and_written_too(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    method = {"budget": 4, "init": 0.25, "optimizer": "RandomSearch"}
    made, _ = made_of(tiny_llama, tmp_path, method, ("embedding", "head"))
    found = load_deltas(tmp_path, read_facts(tmp_path))
    assert found["model.embed_tokens"].kind == "embedding"
    assert made.proof is not None
    assert made.proof.table[-1].nll == pytest.approx(made.proof.exact_nll, rel=1e-5)


def test_other_tokens_of_the_same_rows_are_other_rows_to_the_journal(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    base, members = tiny_llama.base(), [member(tiny_llama.adapter(k)) for k in KINDS]
    wanted = recipe({"type": "learn", "budget": 5, "init": 0.5}, [f"./{k}" for k in KINDS])
    rows = encoded(base, 4)
    turned = [Encoded(row.prompt[::-1], row.output) for row in rows]
    fresh = fit(wanted, members, base, turned).learned
    path = tmp_path / "journal.jsonl"
    for taken in (rows, turned):
        journal = Journal(path)
        found = fit(wanted, members, base, taken, means=Means(journal)).learned
        journal.close()
    assert journal.used == 0
    assert found == fresh


def test_a_repetition_that_fails_leaves_the_mixture(
    tiny_llama: tiny.Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorahub_registry.compose import spread

    def failing(*_: Any, seed: int, **more: Any) -> Any:
        if seed == 1:
            raise DataError("these rows tell nothing")
        return learn(*_, seed=seed, **more)

    monkeypatch.setattr(spread, "learn", failing)
    base, members = tiny_llama.base(), [member(tiny_llama.adapter(k)) for k in KINDS]
    method = {"type": "learn", "budget": 5, "init": 0.5, "optimizer": "RandomSearch", "seeds": 3}
    wanted = recipe(method, [f"./{k}" for k in KINDS])
    found = fit(wanted, members, base, encoded(base, 4))
    assert found.spread is not None
    assert [("failed" in run) for run in found.spread["runs"]] == [False, True, False]
    assert found.spread["coefficients"][0]["mean"] == pytest.approx(
        statistics.fmean(found.spread["runs"][i]["coefficients"][0] for i in (0, 2))
    )


def test_screening_has_seen_all_rows_so_no_fold_counts_as_left_out(tiny_llama: tiny.Tiny) -> None:
    base = tiny_llama.base()
    members = [member(tiny_llama.adapter(k)) for k in ("plain", "wide", "same")]
    method = {"type": "learn", "budget": 4, "init": 0.5, "folds": 2, "screen": {"keep": 2}}
    wanted = recipe(method, ["./plain", "./wide", "./same"])
    found = fit(wanted, members, base, encoded(base, 6), encoded(base, 3))
    assert found.spread is not None
    assert "fold_nll" not in found.spread
    assert "test_nll" in found.spread


def test_too_few_adapters_with_a_loss_are_all_kept(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    base, places = tiny_llama.base(), [tiny_llama.adapter("plain"), tiny_llama.adapter("same")]
    for n in range(4):
        folder = shutil.copytree(places[0], tmp_path / f"loud-{n}")
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(
            {k: t * 1e25 for k, t in tensors.items()}, folder / "adapter_model.safetensors"
        )  # fmt: skip
        places.append(folder)
    members = [member(place) for place in places]
    method = {"type": "learn", "budget": 4, "init": 0.1, "screen": {"keep": 4}}
    found = fit(recipe(method, [f"./{p.name}" for p in places]), members, base, encoded(base, 6))
    assert {m.name for m in found.members} == {"plain", "same"}
