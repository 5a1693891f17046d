"""``lorareg compose``, on a tiny model: what it prints, writes, registers, and does again."""

import json
import math
import os
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from lorahub_registry.registry.store import Registry
from tests.cli.conftest import edit_tensors, tree

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "lorareg.lock",
         "recipe.yaml", "results.json"]  # fmt: skip
LEARNED = [*FILES, "trace.png"]


def _linear(*pairs):
    return {
        "adapters": [{"ref": f"./loras/{name}", "coefficient": c} for name, c in pairs],
        "method": {"type": "linear"},
    }


def _logits(kitchen, adapter=None, deltas=()):
    """The base's logits with an adapter by stock PEFT, or with deltas added by hand."""
    model = kitchen.tiny.model()
    for name, delta in deltas:
        model.get_submodule(name).weight.data += delta
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.inference_mode():
        return model(torch.tensor([[1, 40, 41, 42, 43]])).logits


def _deltas(folder, coefficient):
    """c · α/r · B·A of each module, straight from the files."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, a in tensors.items():
        if ".lora_A." in key:
            b = tensors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").partition(".lora_A")[0]
            yield name, coefficient * config["lora_alpha"] / config["r"] * b @ a


def test_it_prints_coefficients_the_table_and_the_verdict_on_stdout(lorareg, kitchen):
    done = lorareg("compose", kitchen.recipe())
    results = kitchen.results()
    for member in results["members"]:
        assert f"{member['coefficient']:+.4f}  {member['name']}" in done.lines
    shown = [line.split("  ")[0].strip() for line in done.lines]
    for name in ("base", "plain", "wide", "uniform average", "mixture"):
        assert name in shown
    # "test.jsonl" alone says nothing of the task, so it has the recipe's name.
    assert "on 10 held-out rows of blend" in done.lines
    verb = "" if results["verdict"]["win"] else "is "
    assert done.lines[-1] == f"blend {verb}{results['verdict']['text']}"
    assert done.err == f"✓ written to {kitchen.out}\n"


def test_it_writes_a_whole_mixture_and_nothing_beside_it(lorareg, kitchen):
    lorareg("compose", kitchen.recipe())
    assert tree(kitchen / "out") == ["blend", *(f"blend/{name}" for name in LEARNED)]
    kept = yaml.safe_load((kitchen.out / "recipe.yaml").read_text())
    assert [entry["ref"] for entry in kept["adapters"]] == ["plain", "wide"]
    assert kept["base"] == "./tiny-llama"
    assert str(kitchen.folder) not in "".join(
        p.read_text("utf-8", errors="replace") for p in kitchen.out.iterdir()
    )


def test_linear_writes_the_exact_sum_that_stock_peft_loads(lorareg, kitchen):
    done = lorareg("compose", kitchen.recipe(**_linear(("plain", 0.75), ("wide", -0.5))), "--json")
    assert [m["coefficient"] for m in done.json["members"]] == [0.75, -0.5]
    parts = [*_deltas(kitchen / "loras/plain", 0.75), *_deltas(kitchen / "loras/wide", -0.5)]
    by_hand = _logits(kitchen, deltas=parts)
    written = _logits(kitchen, adapter=kitchen.out)
    torch.testing.assert_close(written, by_hand, rtol=0, atol=1e-4)
    assert (written - _logits(kitchen)).abs().max() > 0.1


def test_the_registry_knows_its_lineage_and_every_score(lorareg, kitchen):
    lorareg("add", "loras")
    lorareg("compose", kitchen.recipe())
    results = kitchen.results()
    [listed] = lorareg("list", "--mixtures", "--json").json
    assert (listed["ref"], listed["path"]) == ("blend", str(kitchen.out))
    stored = lorareg("show", "blend", "--json").json
    assert stored["mixture"]["method"] == "learn"
    assert stored["mixture"]["verdict"] == results["verdict"]["text"]
    said = [(m["name"], m["coefficient"], m["digest"]) for m in stored["mixture"]["members"]]
    assert said == [(m["name"], m["coefficient"], m["digest"]) for m in results["members"]]
    by_name = {row["name"]: row["nll"] for row in results["test"]}
    for ref, row in (("blend", "mixture"), ("plain", "plain"), ("wide", "wide")):
        scores = {s["task"]: s for s in lorareg("show", ref, "--json").json["scores"]}
        score = scores.pop("blend")
        assert (score["metric"], score["source"]) == ("nll", "measured")
        beside = {"blend, base", "blend, uniform average"} if ref == "blend" else set()
        assert set(scores) == beside, "what is no adapter stands with the mixture"
        assert score["value"] == pytest.approx(by_name[row])
        assert score["n"] == 10
    assert lorareg("show", "plain", "--json").json["used_in"] == ["blend"]
    page = lorareg("show", "blend").out
    assert "made of" in page
    assert "given by the user" not in page


def test_the_same_recipe_gives_the_same_coefficients_and_tensors(lorareg, kitchen):
    recipe = kitchen.recipe()
    first = lorareg("compose", recipe, "--json").json
    weights = (kitchen.out / "adapter_model.safetensors").read_bytes()
    second = lorareg("compose", recipe, "--force", "--json").json
    assert first == second
    assert (kitchen.out / "adapter_model.safetensors").read_bytes() == weights
    assert len(lorareg("list", "--mixtures", "--json").json) == 1


def test_another_seed_searches_elsewhere(lorareg, kitchen):
    # One member more than NGOpt searches by fixed steps.
    kitchen.lora("same")
    method = {"type": "learn", "budget": 6, "optimizer": "RandomSearch"}
    found = [
        lorareg("compose", kitchen.recipe(seed=seed, method=method), "--force", "--json").json
        for seed in (0, 1)
    ]
    tried = [[e["coefficients"] for e in results["search"]] for results in found]
    assert tried[0] != tried[1]


def test_a_lock_that_agrees_passes(lorareg, kitchen):
    recipe = kitchen.recipe()
    lorareg("compose", recipe)
    lock = shutil.copy(kitchen.out / "lorareg.lock", kitchen / "kept.lock")
    lorareg("compose", recipe, "--force", "--lock", lock)
    assert (kitchen.out / "lorareg.lock").read_bytes() == lock.read_bytes()


def test_a_flipped_bit_fails_the_lock_before_anything_is_loaded(lorareg, kitchen, monkeypatch):
    recipe = kitchen.recipe()
    lorareg("compose", recipe)
    before = (kitchen.out / "adapter_model.safetensors").read_bytes()
    weights = kitchen / "loras/plain/adapter_model.safetensors"
    spoiled = bytearray(weights.read_bytes())
    spoiled[-1] ^= 1
    weights.write_bytes(spoiled)
    monkeypatch.setattr("lorahub_registry.api.mix._loaded", _must_not_run)
    said = lorareg.fails("compose", recipe, "--force", "--lock", kitchen.out / "lorareg.lock")
    assert "plain: its files changed since it was indexed" in said
    assert "Error: not what the lock pins:\n  adapter plain: its tensors are others" in said
    assert "compose without --lock" in said
    assert (kitchen.out / "adapter_model.safetensors").read_bytes() == before


def test_a_changed_row_fails_the_lock(lorareg, kitchen):
    recipe = kitchen.recipe()
    lorareg("compose", recipe)
    rows = kitchen / "test.jsonl"
    rows.write_text(rows.read_text() + '{"input": "x", "output": "y"}\n')
    said = lorareg.fails("compose", recipe, "--force", "--lock", kitchen.out / "lorareg.lock")
    assert "data test: test.jsonl has another content" in said


def _must_not_run(*_, **__):
    raise AssertionError("this must not run")


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(lorareg, kitchen, monkeypatch):
    lorareg("add", "loras")
    monkeypatch.setattr("lorahub_registry.evaluate.base.load_base", _must_not_run)
    facts = lorareg("compose", kitchen.recipe(), "--dry-run", "--json").json
    assert facts["base"] == "tiny-llama"
    assert [a["name"] for a in facts["adapters"]] == ["plain", "wide"]
    assert (facts["evaluations"], facts["train_rows"], facts["test_rows"]) == (4, 10, 10)
    assert facts["parameters"] == sum(p.numel() for p in kitchen.tiny.model().parameters())
    assert facts["memory_bytes"] > 4 * facts["parameters"]
    assert facts["train_tokens"] > facts["train_rows"]
    page = lorareg("compose", kitchen.recipe(), "--dry-run").out
    assert "learn, at most 4 evaluations of 10 rows" in page
    assert not (kitchen / "out").exists()
    assert lorareg("list", "--mixtures", "--json").json == []


def test_force_replaces_a_mixture(lorareg, kitchen):
    recipe = kitchen.recipe()
    lorareg("compose", recipe)
    said = lorareg.fails("compose", recipe)
    assert said == (f"Error: {kitchen.out} exists and is not empty\nHint: --force replaces it\n")
    lorareg("compose", kitchen.recipe(**_linear(("plain", 2), ("wide", 1))), "--force")
    assert [m["coefficient"] for m in kitchen.results()["members"]] == [2, 1]
    assert tree(kitchen / "out") == ["blend", *(f"blend/{name}" for name in FILES)]
    stored = lorareg("show", "blend", "--json").json
    assert stored["mixture"]["method"] == "linear"


def test_force_does_not_delete_what_is_no_mixture_s(lorareg, kitchen):
    kitchen.out.mkdir(parents=True)
    (kitchen.out / "thesis.tex").write_text("years of work")
    said = lorareg.fails("compose", kitchen.recipe(), "--force")
    assert f"{kitchen.out} holds thesis.tex, which lorareg has not written" in said
    assert "name another folder" in said
    assert (kitchen.out / "thesis.tex").read_text() == "years of work"


def test_an_empty_output_folder_is_taken(lorareg, kitchen):
    kitchen.out.mkdir(parents=True)
    lorareg("compose", kitchen.recipe())
    assert sorted(os.listdir(kitchen.out)) == LEARNED


def test_a_smaller_rank_is_written_and_its_cost_is_told(lorareg, kitchen):
    whole = lorareg("compose", kitchen.recipe(**_linear(("plain", 1), ("wide", 1))), "--json").json
    assert whole["output"]["ranks"] == {"6": 10, "10": 4}
    assert whole["output"]["energy_kept"] == 1
    options = _linear(("plain", 1), ("wide", 1)) | {"output": {"path": "out/blend", "rank": 3}}
    cut = lorareg("compose", kitchen.recipe(**options), "--force", "--json").json
    assert cut["output"]["ranks"] == {"3": 14}
    assert 0.3 < cut["output"]["energy_kept_least"] <= cut["output"]["energy_kept"] < 1
    # What is judged is what was written.
    [mixture] = [row["nll"] for row in cut["test"] if row["kind"] == "mixture"]
    assert mixture != cut["output"]["nll_before_writing"]
    card = (kitchen.out / "README.md").read_text()
    assert f"keeps {100 * cut['output']['energy_kept']:.3f}% of the delta's energy" in card


def test_a_share_of_energy_is_kept_in_each_module(lorareg, kitchen):
    options = _linear(("plain", 1), ("wide", 1))
    options["output"] = {"path": "out/blend", "rank": "energy 0.9"}
    cut = lorareg("compose", kitchen.recipe(**options), "--json").json["output"]
    assert 0.9 <= cut["energy_kept_least"] < 1
    assert max(map(int, cut["ranks"])) < 10


def test_tensors_are_written_in_the_dtype_that_was_asked_for(lorareg, kitchen):
    options = {"output": {"path": "out/blend", "dtype": "bfloat16"}}
    done = lorareg("compose", kitchen.recipe(**options), "--json").json
    tensors = load_file(kitchen.out / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    [mixture] = [row["nll"] for row in done["test"] if row["kind"] == "mixture"]
    assert mixture != done["output"]["nll_before_writing"]
    assert mixture == pytest.approx(done["output"]["nll_before_writing"], abs=0.05)


def test_exact_match_is_measured_where_asked_for(lorareg, kitchen):
    done = lorareg("compose", kitchen.recipe(evaluate=["nll", "exact_match"], max_new_tokens=4))
    [head] = [line for line in done.lines if "NLL" in line and line.startswith(" ")]
    assert head.split() == ["NLL", "EXACT"]
    row = kitchen.results()["test"][-1]
    assert 0 <= row["exact_match"] <= 1
    assert {s["metric"] for s in lorareg("show", "blend", "--json").json["scores"]} == {
        "nll", "exact_match",
    }  # fmt: skip


def test_lorahub_takes_adapters_of_one_shape(lorareg, kitchen):
    kitchen.lora("same")
    # The published penalty outweighs what random adapters can win here.
    method = {"type": "lorahub", "l1": 0}
    recipe = kitchen.recipe(adapters=["./loras/plain", "./loras/same"], method=method)
    done = lorareg("compose", recipe, "--json").json
    assert done["form"] == "factor"
    assert len(done["search"]) == 40
    assert "multiply the factors A and B apart" in (kitchen.out / "README.md").read_text()


def test_a_search_in_a_recipe_takes_what_the_registry_finds(lorareg, kitchen):
    kitchen.lora("rslora")
    lorareg("add", "loras")
    for name in ("plain", "rslora"):
        lorareg("tag", name, "--skill", "code")
    search = {"search": {"skill": "code", "sort": "name"}, "limit": 5}
    done = lorareg("compose", kitchen.recipe(adapters=[search]))
    assert "search took plain, rslora" in done.err
    kept = yaml.safe_load((kitchen.out / "recipe.yaml").read_text())
    assert [entry["ref"] for entry in kept["adapters"]] == ["plain", "rslora"]
    assert "search" not in json.dumps(kept["adapters"])


def test_a_search_takes_no_more_than_its_limit(lorareg, kitchen):
    lorareg("add", "loras")
    search = {"search": {"peft_type": "LORA", "sort": "name"}, "limit": 1}
    done = lorareg("compose", kitchen.recipe(adapters=[search, "./loras/wide"]), "--json")
    assert [m["name"] for m in done.json["members"]] == ["plain", "wide"]


def test_without_test_rows_there_is_no_verdict_and_it_says_so_once(lorareg, kitchen):
    done = lorareg("compose", kitchen.recipe(data={"train": {"path": "train.jsonl"}}))
    assert done.lines[2:] == ["", "4 candidates; the budget of 4 candidates was spent"]
    assert done.err.count("Warning:") == 1
    assert "no data.test: the mixture will be written without proof that it helps" in done.err
    assert "**Not evaluated:**" in (kitchen.out / "README.md").read_text()
    assert lorareg("show", "blend", "--json").json["mixture"]["verdict"] == "not evaluated"


def test_one_test_row_gives_json_that_every_parser_takes(lorareg, kitchen):
    data = {"train": {"path": "train.jsonl"}, "test": {"path": "test.jsonl", "limit": 1}}
    done = lorareg("compose", kitchen.recipe(data=data), "--json")
    assert done.json["test"][0]["nll_stderr"] is None
    assert not done.json["verdict"]["win"]
    for name in ("results.json", "README.md"):
        assert "nan" not in (kitchen.out / name).read_text().lower()
    assert "nan" not in lorareg("compose", kitchen.recipe(data=data), "--force").out.lower()


def test_test_rows_among_the_training_rows_are_told_everywhere(lorareg, kitchen):
    rows = (kitchen / "test.jsonl").read_text().splitlines(keepends=True)
    with (kitchen / "train.jsonl").open("a") as train:
        train.writelines(rows[:3])
    done = lorareg("compose", kitchen.recipe())
    said = "3 of 10 test rows are also training rows"
    assert f"Warning: {said}\n" in done.err
    assert said in kitchen.results()["notes"]
    assert kitchen.results()["overlap"] == 3
    assert (kitchen.out / "README.md").read_text().count("also training rows") == 1


def test_cut_prompts_are_told(lorareg, kitchen):
    data = {"train": {"path": "train.jsonl"}, "test": {"path": "test.jsonl"}, "max_length": 12}
    done = lorareg("compose", kitchen.recipe(data=data))
    cut = kitchen.results()["tokens"]["test"]["prompts_cut"]
    assert 0 < cut < 10
    assert f"Warning: {cut} of 10 test prompts lost their beginning (max_length)" in done.err


def test_a_base_in_a_folder_that_was_used_once_is_found_by_its_name(lorareg, kitchen):
    lorareg("compose", kitchen.recipe())
    options = {"base": "tiny-llama", "name": "second", "output": {"path": "out/second"}}
    done = lorareg("compose", kitchen.recipe(**options), "--json")
    assert done.json["base"]["name"] == "tiny-llama"
    assert math.isfinite(done.json["verdict"]["difference"])


def test_a_mixture_can_be_mixed_again(lorareg, kitchen):
    lorareg("compose", kitchen.recipe())
    again = _linear(("plain", 1))
    again["adapters"] += [{"ref": "blend", "coefficient": 0.5}]
    recipe = kitchen.recipe(name="again", **again | {"output": {"path": "out/again"}})
    done = lorareg("compose", recipe, "--json").json
    assert [m["ref"] for m in done["members"]] == ["plain", "blend"]


def test_a_mixture_s_own_recipe_is_valid(lorareg, kitchen):
    lorareg("compose", kitchen.recipe())
    assert lorareg("recipe", "validate", kitchen.out / "recipe.yaml").out.endswith(
        "a valid recipe\n"
    )


def test_adapters_that_changed_since_they_were_indexed_are_indexed_again(lorareg, kitchen):
    lorareg("add", "loras")
    before = lorareg("show", "plain", "--json").json["digest"]
    edit_tensors(kitchen / "loras/plain", lambda t: {k: v * 2 for k, v in t.items()})
    done = lorareg("compose", kitchen.recipe())
    assert "plain: its files changed since it was indexed; taken as they are now" in done.err
    assert lorareg("show", "plain", "--json").json["digest"] != before


def test_members_are_registered_by_being_used(lorareg, kitchen):
    lorareg("compose", kitchen.recipe())
    with Registry() as registry:
        assert {a.record.name for a in registry.list()} == {"plain", "wide", "blend"}
