"""``train`` from a factory to a shelf, and what every other command then makes of it."""

from __future__ import annotations

import json
import shutil
import warnings
from random import Random

import pytest
import yaml
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

from lorahub_registry.adapters.facts import digest_of
from lorahub_registry.cli import cli
from tests.cli.conftest import tree
from tests.cli.factories import DATA, LORA, nll, open_workshop, shop  # noqa: F401
from tests.trained import FILES

THREE = (
    {
        "name": "zog",
        "skills": ["names"],
        "description": "Every name becomes Zog.",
        "training": {"learning_rate": 0.05},
        "data": {"template": "Q: {{ input }} A:"},
    },
    {"name": "directed", "lora": {"use_dora": True}},
    {
        "name": "fast",
        "skills": ["names", "speed"],
        "license": "mit",
        "lora": {"r": 2, "use_rslora": True, "loraplus_lr_ratio": 4,
                 "target_modules": "all-linear"},
        "training": {"num_train_epochs": 2, "max_steps": None, "seed": 3},
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny_llama, tmp_path_factory):
    """A shelf of three, made once: (its workshop, what the command printed)."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("shelf")
        patch.setenv("LORAREG_HOME", str(folder / "home"))
        workshop = open_workshop(tiny_llama, folder / "desk")
        patch.chdir(workshop.folder)
        workshop.factory(*THREE, evaluate=["nll", "exact_match"], max_new_tokens=8)
        before = tree(workshop.folder)
        planned = CliRunner().invoke(cli, ["train", "factory.yaml", "--dry-run", "--json"])
        assert planned.exit_code == 0, planned.output
        assert tree(workshop.folder) == before
        assert CliRunner().invoke(cli, ["list", "-q"]).stdout == ""
        done = CliRunner().invoke(cli, ["train", "factory.yaml", "--json"])
        assert done.exit_code == 0, done.output
    return workshop, json.loads(planned.stdout), json.loads(done.stdout)


@pytest.fixture
def shelf(made, monkeypatch):
    """The shelf of three; its registry is the one that commands read."""
    workshop, _, _ = made
    monkeypatch.setenv("LORAREG_HOME", str(workshop.folder.parent / "home"))
    monkeypatch.chdir(workshop.folder)
    return workshop


def test_each_folder_is_whole_and_what_was_unfinished_is_gone(shelf):
    for plan in THREE:
        assert sorted(p.name for p in (shelf.out / plan["name"]).iterdir()) == FILES
    assert sorted(p.name for p in shelf.out.iterdir()) == [
        "directed", "fast", "lorareg.json", "zog",
    ]  # fmt: skip
    assert not shelf.part.exists()
    report = json.loads((shelf.out / "lorareg.json").read_text())
    assert (report["together"], report["failed"]) == (3, {})
    for text in shelf.out.rglob("*"):
        if text.suffix in {".json", ".md", ".yaml", ".jsonl", ".lock"}:
            assert str(shelf.folder) not in text.read_text("utf-8"), text


@pytest.mark.parametrize("name", [plan["name"] for plan in THREE])
def test_what_is_told_of_a_test_is_what_stock_peft_gives(name, shelf):
    template = "Q: {} A:" if name == "zog" else "{} "
    base, own = shelf.results(name)["test"]
    rows = shelf / "test.jsonl"
    assert base["nll"] == pytest.approx(nll(shelf.tiny, None, rows, template), abs=1e-5)
    assert own["nll"] == pytest.approx(nll(shelf.tiny, shelf.out / name, rows, template), abs=1e-5)
    assert abs(base["nll"] - own["nll"]) > 1e-3
    assert (base["n"], own["n"]) == (6, 6)
    assert own["exact_match"] is not None


def test_results_say_how_each_was_made(shelf):
    zog, directed, fast = (shelf.results(plan["name"]) for plan in THREE)
    assert [r["method"] for r in (zog, directed, fast)] == ["LoRA", "DoRA", "rsLoRA LoRA+"]
    assert [r["modules"] for r in (zog, directed, fast)] == [4, 4, 14]
    assert [r["steps"] for r in (zog, directed, fast)] == [6, 6, 8]
    assert [r["epochs"] for r in (zog, directed, fast)] == [1.5, 1.5, 2]
    assert [r["seed"] for r in (zog, directed, fast)] == [0, 0, 3]
    assert [r["license"] for r in (zog, directed, fast)] == ["apache-2.0", "apache-2.0", "mit"]
    assert [step for step, _ in fast["loss"]] == list(range(1, 9))
    assert zog["data"]["validation"] is None
    assert zog["data"]["train"]["rows"] == 16
    log = [json.loads(line) for line in (shelf.out / "zog/training.jsonl").open()]
    assert [[entry["step"], entry["loss"]] for entry in log] == zog["loss"]
    assert log[0]["learning_rate"] == 0.05


def test_a_dry_run_said_what_the_run_then_did(made):
    workshop, planned, _ = made
    for facts in planned["adapters"]:
        found = workshop.results(facts["name"])
        for key in ("steps", "modules", "parameters"):
            assert facts[key] == found[key], key
        train = found["data"]["train"]
        assert facts["rows"] == train["rows"] - train["dropped"]
        assert facts["dropped"] == train["dropped"]
        path = workshop.out / facts["name"] / "adapter_model.safetensors"
        with safe_open(path, "pt") as file:
            numbers = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
        assert numbers == facts["parameters"]
        assert facts["tokens"] == round(train["tokens"] * found["epochs"])


def test_json_and_quiet(made, lorareg, shop):  # noqa: F811
    workshop, _, printed = made
    assert printed["path"] == str(workshop.out)
    assert printed["adapters"] == ["directed", "fast", "zog"]
    assert [r["name"] for r in printed["results"]] == ["zog", "directed", "fast"]
    assert printed["results"][0] == workshop.results("zog")
    shop.factory({"name": "one"}, {"name": "two"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = lorareg("train", "factory.yaml", "-q")
    # They would stand on stderr.
    assert [str(w.message) for w in caught if "serializ" in str(w.message)] == []
    assert done.lines == [str(shop.out / "one"), str(shop.out / "two")]
    assert done.err == ""


def test_the_registry_finds_and_shows_them(lorareg, shelf):
    assert set(lorareg("list", "-q").lines) >= {"zog", "directed", "fast"}
    found = lorareg("search", "--skill", "names", "--base", "tiny-llama", "-q").lines
    assert {"zog", "fast"} <= set(found)
    assert "directed" not in found
    shown = lorareg("show", "zog", "--json").json
    assert shown["description"] == "Every name becomes Zog."
    assert shown["trained"]["verdict"] == shelf.results()["verdict"]["text"]
    scores = {(s["task"], s["metric"]): s["value"] for s in shown["scores"]}
    base, own = shelf.results()["test"]
    assert scores["zog", "nll"] == own["nll"]
    assert scores["zog, base", "nll"] == base["nll"]
    said = lorareg("show", "fast").out
    assert "by rsLoRA LoRA+, 8 steps (2 epochs) of 4 rows" in said
    assert "licence     mit" in said


def test_a_prompt_finds_them_by_the_rows_that_they_learned_from(lorareg, shelf):
    found = lorareg("route", "ab ac", "--base", "tiny-llama", "--json").json
    assert sorted(one["name"] for one in found) == ["directed", "fast", "zog"]


def test_two_of_them_are_mixed_by_a_recipe(lorareg, shelf):
    recipe = {
        "version": 1, "name": "both", "base": "tiny-llama",
        "adapters": [{"ref": "zog", "coefficient": 0.5}, {"ref": "fast", "coefficient": 0.5}],
        "method": {"type": "linear"}, "data": {"test": {"path": "test.jsonl"}},
        "output": {"path": "mixed/both"}, "license": "apache-2.0",
    }  # fmt: skip
    (shelf / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lorareg("compose", "recipe.yaml")
    told = json.loads((shelf / "mixed/both/results.json").read_text())
    assert {row["name"] for row in told["test"]} >= {"zog", "fast"}
    members = lorareg("show", "both", "--json").json["mixture"]["members"]
    assert [m["name"] for m in members] == ["zog", "fast"]
    assert lorareg("show", "zog", "--json").json["used_in"] == ["both"]
    recipe["adapters"][0]["ref"] = "directed"
    recipe["output"]["path"] = "mixed/other"
    (shelf / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "DoRA" in lorareg.fails("compose", "recipe.yaml")


def test_a_conversation_has_the_template_of_training(lorareg, shelf):
    options = ("--max-new-tokens", "8", "--json")
    own = lorareg("generate", "zog", "ab", *options).json
    assert own == lorareg("generate", "zog", "ab", "--template", "Q: {{ input }} A:", *options).json
    assert own != lorareg("generate", "zog", "ab", "--template", "{{ input }}", *options).json


def test_it_is_pushed_as_it_lies(hub, logged_in, lorareg, shelf):
    listed = lorareg("push", "fast", "me/fast", "--dry-run", "--json").json
    assert sorted(row["name"] for row in listed) == FILES
    assert "me/fast" not in hub.store.repos
    lorareg("push", "fast", "me/fast")
    files = hub.files("me/fast")
    for name in FILES:
        assert files[name] == (shelf.out / "fast" / name).read_bytes()


def test_the_factory_beside_an_adapter_makes_it_again(lorareg, shelf, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(shelf / "tiny-llama", again / "tiny-llama")
    for name in ("train.jsonl", "test.jsonl", "out/fast/factory.yaml"):
        shutil.copy(shelf / name, again)
    assert lorareg("train", again / "factory.yaml", "-q").lines == [str(again / "out/fast")]
    ours = load_file(shelf.out / "fast/adapter_model.safetensors")
    theirs = load_file(again / "out/fast/adapter_model.safetensors")
    # Alone here, beside two others there: the same to rounding.
    assert ours.keys() == theirs.keys()
    assert all((ours[key] - theirs[key]).abs().max() < 1e-4 for key in ours)


# Options, one at a time


def test_pissa_is_written_as_a_plain_lora_on_the_untouched_base(lorareg, shop):  # noqa: F811
    before = (shop / "tiny-llama/model.safetensors").read_bytes()
    shop.factory({"name": "zog", "lora": {"init_lora_weights": "pissa"}})
    lorareg("train", "factory.yaml")
    assert (shop / "tiny-llama/model.safetensors").read_bytes() == before
    config = json.loads((shop.out / "zog/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["init_lora_weights"] is True
    found = shop.results()
    assert (found["method"], found["parameters"]) == ("PiSSA", 896)
    # Before its first step it is the base itself.
    first = found["loss"][0][1]
    shop.factory({"name": "plain"}, output={"path": "plain"})
    lorareg("train", "factory.yaml")
    plain = json.loads((shop / "plain/plain/results.json").read_text())
    assert plain["digest"] == digest_of(shop / "plain/plain")
    assert first == pytest.approx(plain["loss"][0][1], abs=1e-4)
    own = found["test"][1]["nll"]
    assert own == pytest.approx(nll(shop.tiny, shop.out / "zog", shop / "test.jsonl"), abs=1e-5)
    assert lorareg("show", "zog", "--json").json["ranks"] == {"8": 4}


def test_a_share_is_held_out_and_the_best_of_it_is_kept(lorareg, shop):  # noqa: F811
    shop.factory(
        {
            "name": "zog",
            "lora": {"target_modules": "all-linear"},
            "training": {
                "learning_rate": 0.08, "max_steps": 120, "eval_steps": 2,
                "early_stopping_patience": 2, "lr_scheduler_type": "constant",
            },
            "data": {"validation": 0.25},
        }
    )  # fmt: skip
    lorareg("train", "factory.yaml")
    found = shop.results()
    assert found["stopped"] == "early: no gain over 2 evaluations"
    steps, losses = zip(*found["validation_loss"], strict=True)
    assert found["best_step"] == steps[losses.index(min(losses))] == found["steps"] - 4
    assert found["steps"] < 120
    data = found["data"]
    assert (data["train"]["rows"], data["validation"]["rows"]) == (12, 4)
    assert data["train"]["sha256"] == data["validation"]["sha256"]
    # What is written is the best step, not the last one: the four rows say so.
    lines = (shop / "train.jsonl").read_text().splitlines(keepends=True)
    out = set(Random(0).sample(range(16), 4))
    (shop / "held.jsonl").write_text("".join(lines[i] for i in sorted(out)))
    own = nll(shop.tiny, shop.out / "zog", shop / "held.jsonl")
    assert own == pytest.approx(min(losses), abs=1e-4)
    shown = lorareg("show", "zog").out
    assert f"the weights are those of step {found['best_step']}" in shown


def test_each_is_compared_with_the_base_on_its_own_test_rows(lorareg, shop):  # noqa: F811
    test = {"path": "test.jsonl", "limit": 2, "select": "random"}
    shop.factory(
        *({"name": f"seed{n}", "training": {"seed": n}, "data": {"test": test}} for n in range(4))
    )
    lorareg("train", "factory.yaml")
    base = {round(shop.results(f"seed{n}")["test"][0]["nll"], 6) for n in range(4)}
    assert len(base) > 1


def test_plain_text_is_learned_whole(lorareg, shop):  # noqa: F811
    texts = [" ".join(["ab cd"] * n) for n in range(1, 9)]
    for name in ("text.jsonl", "more.jsonl"):
        (shop / name).write_text("".join(json.dumps({"words": t}) + "\n" for t in texts))
    split = {"path": "text.jsonl", "text": "words"}
    data = {"train": split, "max_length": 24, "test": split | {"path": "more.jsonl"}}
    plan = {"name": "zog", "data": data, "lora": LORA, "training": {"max_steps": 4}}
    shop.factory(plan, defaults={}, evaluate=["nll", "exact_match"])
    done = lorareg("train", "factory.yaml")
    found = shop.results()
    assert found["objective"] == "lm"
    assert found["data"]["train"]["rows"] == 8
    tokenizer = shop.tiny.tokenizer()
    assert found["data"]["train"]["tokens"] >= sum(len(tokenizer(t)["input_ids"]) for t in texts)
    assert found["test"][1]["exact_match"] is None
    assert "train texts are longer than max_length and became several rows" in done.err
    assert any("became several rows" in note for note in found["notes"])


def test_rows_that_are_packed_are_the_same_rows(lorareg, shop):  # noqa: F811
    packing = {"packing": True, "batch_size": 1, "max_steps": None, "num_train_epochs": 1}
    data = {"max_length": 64}
    shop.factory(
        {"name": "packed", "training": packing, "data": data},
        {"name": "loose", "training": packing | {"packing": False}, "data": data},
    )
    planned = lorareg("train", "factory.yaml", "--dry-run", "--json").json["adapters"]
    lorareg("train", "factory.yaml")
    packed, loose = shop.results("packed"), shop.results("loose")
    assert packed["data"]["train"] == loose["data"]["train"]
    assert loose["steps"] == 16
    least = -(-packed["data"]["train"]["tokens"] // 64)
    assert least <= packed["steps"] < 8
    assert [a["steps"] for a in planned] == [packed["steps"], 16]
    # All in one step: what is learned from the packs is what is learned from the rows.
    whole = {"batch_size": 16, "num_train_epochs": 1, "max_steps": None}
    shop.factory(
        {"name": "packed", "training": whole | {"packing": True}, "data": data},
        {"name": "loose", "training": whole, "data": data},
    )
    lorareg("train", "factory.yaml", "--force")
    [packed], [loose] = (shop.results(name)["loss"] for name in ("packed", "loose"))
    assert packed[1] == pytest.approx(loose[1], abs=1e-5)


@pytest.mark.parametrize("option", ["together", "checkpointing", "accumulation"])
def test_what_saves_memory_changes_no_adapter(option, lorareg, shop):  # noqa: F811
    adapters = [{"name": "zog"}, {"name": "two", "lora": {"r": 2}}]
    shop.factory(*adapters)
    lorareg("train", "factory.yaml")
    before = {name: shop.results(name) for name in ("zog", "two")}
    assert before["zog"]["together"] == 2
    words = ["--max-together", "1"] if option == "together" else []
    if option == "accumulation":
        half = {"batch_size": 2, "gradient_accumulation_steps": 2}
        adapters = [{**a, "training": half} for a in adapters]
    shop.factory(*adapters, gradient_checkpointing=option == "checkpointing")
    lorareg("train", "factory.yaml", "--force", *words)
    for name, then in before.items():
        now = shop.results(name)
        assert now["loss"] == [[s, pytest.approx(loss, abs=1e-4)] for s, loss in then["loss"]]
        assert now["test"][1]["nll"] == pytest.approx(then["test"][1]["nll"], abs=1e-4)
    assert shop.results()["together"] == (1 if option == "together" else 2)
    report = json.loads((shop.out / "lorareg.json").read_text())
    assert report["together"] == shop.results()["together"]


def test_without_rows_to_test_on_nothing_is_said_to_be_better(lorareg, shop):  # noqa: F811
    data = {key: value for key, value in DATA.items() if key != "test"}
    plan = {"name": "zog", "lora": LORA, "training": {"max_steps": 3}, "data": data}
    shop.factory(plan, defaults={})
    assert lorareg("train", "factory.yaml").lines[1].endswith("not evaluated")
    found = shop.results()
    assert found["test"] is None
    assert "verdict" not in found
    assert lorareg("show", "zog", "--json").json["scores"] == []


def test_a_seq2seq_base(lorareg, tiny_t5, tmp_path):
    there = open_workshop(tiny_t5, tmp_path / "desk" / "t5")
    there.factory({"name": "zog", "lora": {"target_modules": ["q", "v"]}})
    lorareg("train", "t5/factory.yaml")
    found = there.results()
    assert found["seq2seq"] is True
    base, own = found["test"]
    rows = there / "test.jsonl"
    assert base["nll"] == pytest.approx(nll(tiny_t5, None, rows), abs=1e-5)
    assert own["nll"] == pytest.approx(nll(tiny_t5, there.out / "zog", rows), abs=1e-5)
    config = json.loads((there.out / "zog/adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
