"""Mixtures that decide while they run, by the command line: composed, run, published."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

import lorahub_registry as lr
from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.registry.store import Registry
from tests.cli.conftest import edit_config, tree, write_rows

FLOW = {"type": "lora_flow", "training": {"max_steps": 3, "learning_rate": 0.2}}
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors",
         "dynamic/adapter_config.json", "dynamic/adapter_model.safetensors", "lorareg.lock",
         "recipe.yaml", "results.json"]  # fmt: skip


def _sharp(kitchen):
    """Adapters loud enough that the mixture answers otherwise than its plain LoRA."""
    return kitchen.recipe(method={**FLOW, "per": "module", "init": "wide", "training": {
        "max_steps": 6, "learning_rate": 1.0, "warmup_ratio": 0.0,
    }})  # fmt: skip


def _logits(kitchen, folder):
    with torch.inference_mode():
        model = PeftModel.from_pretrained(kitchen.tiny.model(), str(folder)).eval()
        return model(torch.tensor([[1, 40, 41, 42, 43]])).logits


@pytest.mark.parametrize("method", [FLOW, {"type": "arrow", "top_k": 1}], ids=lambda m: m["type"])
def test_it_is_composed_shown_and_registered(method, lorareg, kitchen):
    lorareg("add", "loras")
    done = lorareg("compose", kitchen.recipe(method=method))
    results = kitchen.results()
    shown = [line.split("  ")[0].strip() for line in done.lines]
    apart = "layer" if method is FLOW else "module"
    for name in ("base", "plain", "wide", "uniform average", "mixture",
                 "learned static coefficients (per model)", "plain LoRA with mean coefficients",
                 f"learned static coefficients (per {apart})"):  # fmt: skip
        assert name in shown
    verb = "" if results["verdict"]["win"] else "is "
    assert done.lines[-1] == f"blend {verb}{results['verdict']['text']}"
    written = [name for name in tree(kitchen.out) if not name.endswith(".png")]
    assert written == sorted([*FILES, "dynamic"])
    stored = lorareg("show", "blend", "--json").json
    assert stored["mixture"]["method"] == method["type"]
    said = [(m["name"], m["coefficient"], m["digest"]) for m in stored["mixture"]["members"]]
    assert said == [(m["name"], m["coefficient"], m["digest"]) for m in results["members"]]
    lock = json.loads((kitchen.out / "lorareg.lock").read_text())
    assert set(lock["adapters"]) == {"plain", "wide"}
    by_task = {s["task"]: s["value"] for s in stored["scores"]}
    test = {row["name"]: row["nll"] for row in results["test"]}
    # What is registered, and shown on the card, is the root: the plain LoRA.
    plain = test["plain LoRA with mean coefficients"]
    assert plain != pytest.approx(test["mixture"], rel=1e-6)
    assert by_task["blend"] == pytest.approx(plain)
    assert by_task["blend, dynamic"] == pytest.approx(test["mixture"])
    for name in ("base", "uniform average", "learned static coefficients (per model)"):
        assert by_task[f"blend, {name}"] == pytest.approx(test[name])
    front = yaml.safe_load((kitchen.out / "README.md").read_text("utf-8").split("---\n")[1])
    [metric] = front["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == pytest.approx(plain, abs=1e-6)


def test_scores_of_members_are_their_own_with_general_knowledge_too(lorareg, kitchen):
    kitchen.lora("rslora")
    lorareg("add", "loras")
    loras = ["./loras/plain", "./loras/wide", "./loras/rslora"]
    named = [{"ref": ref, "name": ref[8:]} for ref in loras]
    lorareg(
        "compose", kitchen.recipe(adapters=named, method={"type": "arrow", "general": ["plain"]})
    )
    test = {row["name"]: row["nll"] for row in kitchen.results()["test"]}
    alone = kitchen.recipe(
        adapters=[{**one, "coefficient": 1} for one in named], method={"type": "linear"},
        output={"path": "out/other"}, name="other",
    )  # fmt: skip
    known = {row["name"]: row["nll"] for row in lorareg("compose", alone, "--json").json["test"]}
    for name in ("plain", "wide", "rslora"):
        assert test[name] == pytest.approx(known[name], rel=1e-5)
    members = lorareg("show", "blend", "--json").json["mixture"]["members"]
    assert {m["name"] for m in members} == {"plain", "wide", "rslora"}


def test_the_same_recipe_gives_the_same_bytes_and_force_replaces(lorareg, kitchen):
    recipe = kitchen.recipe(method=FLOW)
    first = lorareg("compose", recipe, "--json").json
    before = {name: (kitchen.out / name).read_bytes() for name in FILES}
    said = lorareg.fails("compose", recipe)
    assert "--force replaces it" in said
    assert lorareg("compose", recipe, "--force", "--json").json == first
    assert {name: (kitchen.out / name).read_bytes() for name in FILES} == before
    lorareg("compose", kitchen.recipe(method=FLOW, seed=1), "--force")
    weights = "dynamic/adapter_model.safetensors"
    assert (kitchen.out / weights).read_bytes() != before[weights]
    lorareg("compose", kitchen.recipe(), "--force")
    assert not (kitchen.out / "dynamic").exists(), "a static mixture leaves nothing of it"


def test_load_and_generate_take_the_one_that_decides(lorareg, kitchen):
    recipe = _sharp(kitchen)
    lorareg("compose", recipe)
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    loaded = [lr.load(kitchen.out), lr.load("blend"), lr.load(recipe), lr.load(str(recipe))]
    expected = _logits(kitchen, kitchen.out / "dynamic")
    assert (expected - _logits(kitchen, kitchen.out)).abs().max() > 1e-3
    for one in loaded:
        with torch.inference_mode():
            torch.testing.assert_close(one.model(ids).logits, expected, rtol=0, atol=1e-5)
    options = ("--max-new-tokens", "8", "--json")
    [said] = lorareg("generate", kitchen.out, "ab cd", *options).json
    assert said["text"] == loaded[0].generate("ab cd", max_new_tokens=8)
    assert lr.load(kitchen.out / "dynamic", base="tiny-llama").generate(
        "ab cd", max_new_tokens=8
    ) == loaded[0].generate("ab cd", max_new_tokens=8)
    beside = lorareg("generate", "blend", "ab cd", "--against", "base, plain", *options).json
    assert [row["name"] for row in beside] == ["blend", "base", "plain"]
    assert beside[0]["text"] == said["text"]


def test_load_of_a_recipe_wants_it_composed_and_unchanged(lorareg, kitchen):
    recipe = kitchen.recipe(method=FLOW)
    with pytest.raises(lr.LoraregError, match="was not composed yet") as caught:
        lr.load(recipe)
    assert caught.value.hint == f"lorareg compose {recipe}"
    lorareg("compose", recipe)
    assert lr.load(recipe).name == "blend"
    kitchen.recipe(method={**FLOW, "temperature": 2})
    with pytest.raises(lr.LoraregError, match="lock") as caught:
        lr.load(recipe)
    kitchen.recipe(method=FLOW)
    edit_config(kitchen / "loras/plain", lora_alpha=2)
    with pytest.raises(lr.LoraregError, match="plain"):
        lr.load(recipe)


def test_add_knows_the_root_and_what_decides_for_what_they_are(lorareg, kitchen):
    lorareg("compose", kitchen.recipe(method=FLOW))
    lorareg("remove", "blend")
    lorareg("add", kitchen.out)
    listed = {row["path"]: row for row in lorareg("list", "--json").json}
    kinds = {path: lorareg("show", path, "--json").json["peft_type"] for path in listed}
    assert kinds[str(kitchen.out)] == "LORA"
    assert set(kinds.values()) <= {"LORA", "LORA_MIXTURE"}
    page = lorareg("show", kitchen.out / "dynamic").out
    assert "LORA_MIXTURE" in page


def test_what_decides_is_published_with_the_rest(hub, logged_in, lorareg, kitchen):
    lorareg("compose", kitchen.recipe(method=FLOW))
    (kitchen.out / "dynamic" / "notes.txt").write_text("mine")
    done = lorareg("push", "blend", "me/mine", "--dry-run", "-q")
    assert [name for name in done.lines if not name.endswith(".png")] == FILES
    assert (
        "not published: dynamic/notes.txt" in lorareg("push", "blend", "me/mine", "--dry-run").err
    )
    lorareg("push", "blend", "me/mine")
    files = hub.files("me/mine")
    for name in FILES:
        if name != "README.md":
            assert files[name] == (kitchen.out / name).read_bytes()
    card = files["README.md"].decode()
    assert 'subfolder="dynamic"' in card
    assert "import lorahub_registry.runtime" in card
    # Nobody else's machine has a base there.
    edit_config(kitchen.out / "dynamic", base_model_name_or_path="/home/jo/models/base")
    said = lorareg.fails("push", "blend", "me/other")
    assert "dynamic/adapter_config.json" in said
    assert "/home/jo" in said
    edit_config(kitchen.out / "dynamic", base_model_name_or_path="./models/base")
    assert "names the base './models/base'" in lorareg.fails("push", "blend", "me/other")
    assert "me/other" not in hub.store.repos


@pytest.mark.parametrize("what", ["folder", "file", "lacking"])
def test_a_link_out_of_the_folder_is_not_published(what, hub, logged_in, lorareg, kitchen):
    lorareg("compose", kitchen.recipe(method=FLOW))
    inner = kitchen.out / "dynamic"
    if what == "folder":
        inner.rename(kitchen / "elsewhere")
        inner.symlink_to(kitchen / "elsewhere")
    else:
        weights = inner / "adapter_model.safetensors"
        weights.rename(kitchen / "elsewhere")
        if what == "file":
            weights.symlink_to(kitchen / "elsewhere")
    said = lorareg.fails("push", "blend", "me/mine")
    assert "dynamic" in said
    assert ("no such file" if what == "lacking" else "leads out of its folder") in said
    assert "me/mine" not in hub.store.repos


def test_damaged_gates_are_not_published_and_nor_is_what_lacks_them(
    hub, logged_in, lorareg, kitchen
):
    lorareg("compose", kitchen.recipe(method=FLOW))
    weights = kitchen.out / "dynamic" / "adapter_model.safetensors"
    tensors = load_file(weights)
    gate = next(name for name in tensors if name.endswith("lora_gate"))
    save_file(tensors | {gate: tensors[gate] * float("nan")}, weights)
    assert "holds NaN" in lorareg.fails("push", "blend", "me/mine", "--dry-run")
    shutil.rmtree(kitchen.out / "dynamic")
    assert "the card promises it" in lorareg.fails("push", "blend", "me/mine", "--dry-run")
    assert "me/mine" not in hub.store.repos


def test_what_is_shown_says_that_it_is_the_plain_lora(lorareg, kitchen):
    lorareg("compose", kitchen.recipe(method=FLOW))
    shown = lorareg("show", "blend").out
    assert "the mixture itself is in dynamic/" in shown
    assert "dynamic/adapter_model.safetensors" in shown


def test_a_mixture_that_decides_is_no_member_but_its_plain_lora_is(lorareg, kitchen):
    lorareg("compose", kitchen.recipe(method=FLOW))
    for method in (FLOW, {"type": "arrow"}, {"type": "learn", "budget": 3}):
        again = kitchen.recipe(
            name="second", adapters=["./out/blend/dynamic", "./loras/plain"], method=method,
            output={"path": "out/second"},
        )  # fmt: skip
        said = lorareg.fails("compose", again)
        assert "dynamic: it is LORA_MIXTURE" in said
        assert not (kitchen / "out/second").exists()
    plain = kitchen.recipe(
        name="second", adapters=["./out/blend", "./loras/plain"], method={"type": "arrow"},
        output={"path": "out/second"},
    )  # fmt: skip
    said = lorareg("compose", plain).err
    assert "blend decides while it runs; its plain LoRA is taken" in " ".join(said.split())


def test_bad_input_is_refused_by_name_and_nothing_is_written(lorareg, kitchen):
    kitchen.lora("embedding")
    kitchen.lora("head")
    for changes, said in (
        ({"adapters": ["./loras/plain"]}, "lora_flow chooses among two or more adapters"),
        ({"method": {**FLOW, "init": "plane"}}, "'plane', did you mean 'plain'?"),
        ({"method": {"type": "arrow", "general": ["wide"]}}, "leaves 1 to choose among"),
        ({"method": {"type": "arrow", "general": ["nobody"]}}, "no adapter is called 'nobody'"),
        ({"adapters": ["./loras/plain", "./loras/embedding"]}, "embed_tokens is an embedding"),
        ({"adapters": ["./loras/plain", "./loras/head"]}, "lm_head is in no layer"),
    ):
        assert said in lorareg.fails("compose", kitchen.recipe(**{"method": FLOW, **changes}))
        assert not (kitchen / "out").exists() or not any((kitchen / "out").iterdir())
    edit_config(kitchen / "loras/wide", base_model_name_or_path="someone/other-7b")
    said = lorareg.fails("compose", kitchen.recipe(method=FLOW))
    assert "wide" in said
    assert "other-7b" in said


def test_arrow_needs_no_rows_at_all(lorareg, kitchen):
    done = lorareg("compose", kitchen.recipe(method={"type": "arrow"}, data={}))
    assert "no data.test" in done.err
    assert "no data.train: the plain LoRA has the uniform average" in done.err
    assert "verdict" not in kitchen.results()
    assert lorareg("show", "blend", "--json").json["mixture"]["verdict"] == "not evaluated"


def test_the_recipe_that_is_kept_makes_it_again(lorareg, kitchen):
    lorareg("compose", kitchen.recipe(method=FLOW))
    kept = yaml.safe_load((kitchen.out / "recipe.yaml").read_text())
    assert kept["method"]["training"]["adam_beta2"] == 0.95
    assert str(kitchen.folder) not in "".join(
        path.read_text("utf-8", errors="replace") for path in kitchen.out.rglob("*.*")
    )
    again = lr.load(kitchen.out)
    shutil.rmtree(kitchen / "loras")
    assert lr.load(kitchen.out).generate("ab") == again.generate("ab"), "it needs no member"


def test_a_dry_run_tells_what_it_learns_and_trains(lorareg, kitchen):
    done = lorareg("compose", kitchen.recipe(method=FLOW), "--dry-run")
    assert "lora_flow, 3 steps of training and at most 80 evaluations of 10 rows" in done.out
    assert "proof     9 models on 10 rows" in done.out
    assert not (kitchen / "out").exists()
    left_out = "activations, which are kept of a whole batch while gradients are computed"
    assert f"not counted: {left_out} (of gates' training, too), and gates with their" in done.out
    assert "not counted: loading, generation, attention's scores, what gates and" in done.out
    epochs = {"type": "lora_flow", "training": {"batch_size": 3, "gradient_accumulation_steps": 2}}
    facts = lorareg("compose", kitchen.recipe(method=epochs), "--dry-run", "--json").json
    assert (facts["steps"], facts["evaluations"], facts["models"]) == (2 * 5, 80, 9)
    test = {"test": {"path": "test.jsonl"}}
    arrow = kitchen.recipe(method={"type": "arrow"}, data=test)
    facts = lorareg("compose", arrow, "--dry-run", "--json").json
    assert (facts["steps"], facts["evaluations"], facts["models"]) == (0, 0, 7)
    page = lorareg("compose", arrow, "--dry-run").out
    assert "arrow, nothing to learn" in page
    assert "of weights; not counted: activations\n" in page, "no gradients here"
    # Of each forward, what the adapters compute counts, too.
    forwards = facts["models"] * facts["test_tokens"]
    beside = sum(read_facts(kitchen / f"loras/{n}").parameters for n in ("plain", "wide"))
    wanted = 2 * (facts["parameters"] + beside) * forwards / facts["gflops"] / 1e9
    assert facts["seconds"] == pytest.approx(wanted)
    wrong = kitchen.recipe(method={**FLOW, "init": "plane"})
    said = lorareg.fails("compose", wrong, "--dry-run")
    line = wrong.read_text().split("\n").index("  init: plane") + 1
    assert f"recipe.yaml: not a valid recipe:\n  line {line}: method.init: must be" in said
    assert "did you mean 'plain'?" in said
    assert "Hint: the adapters are plain, wide" in said


def test_prompts_are_sent_to_whose_rows_they_are_like(lorareg, kitchen):
    write_rows(kitchen / "a.jsonl", [("aaaa", "x"), ("aaab", "x")])
    write_rows(kitchen / "z.jsonl", [("zzzz", "x"), ("zzzy", "x")])
    # Whoever is asked for is known by the prompt; answers do not count.
    write_rows(kitchen / "train.jsonl", [("aaaa", "zzzz"), ("zzzz", "aaaa"), ("zzzy", "aaaa")])
    named = [{"ref": f"./loras/{name}", "name": name} for name in ("plain", "wide")]
    method = {"type": "prompt_router", "examples": {"plain": "a.jsonl", "wide": "z.jsonl"}}
    lorareg("compose", kitchen.recipe(adapters=named, method=method))
    found = {m["name"]: m["coefficient"] for m in kitchen.results()["members"]}
    assert found == pytest.approx({"plain": 1 / 3, "wide": 2 / 3}, abs=0.02)
    options = ("--max-new-tokens", "6", "--json", "--against", "plain, wide")
    for prompt, owner in (("aaaa", "plain"), ("zzzz", "wide")):
        said = {r["name"]: r["text"] for r in lorareg("generate", "blend", prompt, *options).json}
        assert said["blend"] == said[owner]


def test_where_examples_lie_on_this_machine_is_told_nowhere(hub, logged_in, lorareg, kitchen):
    secret = kitchen / "of-nobody-else"
    secret.mkdir()
    write_rows(secret / "a.jsonl", [("aaaa", "x"), ("aaab", "x")])
    write_rows(secret / "z.jsonl", [("zzzz", "x"), ("zzzy", "x")])
    named = [{"ref": f"./loras/{name}", "name": name} for name in ("plain", "wide")]
    places = {"plain": str(secret / "a.jsonl"), "wide": str(secret / "z.jsonl")}
    recipe = kitchen.recipe(adapters=named, method={"type": "prompt_router", "examples": places})
    lorareg("compose", recipe)
    files = [path for path in kitchen.out.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert "of-nobody-else" not in path.read_text("utf-8", errors="replace"), path
    short = {"plain": "a.jsonl", "wide": "z.jsonl"}
    assert kitchen.results()["method"]["examples"] == short
    kept = yaml.safe_load((kitchen.out / "recipe.yaml").read_text("utf-8"))
    assert kept["method"]["examples"] == short
    lorareg("push", "blend", "me/mine", "--dry-run")
    # Moved to another folder they are the same files, and it is the same recipe.
    secret.rename(kitchen / "elsewhere")
    moved = {name: str(kitchen / "elsewhere" / path) for name, path in short.items()}
    kitchen.recipe(adapters=named, method={"type": "prompt_router", "examples": moved})
    lorareg("compose", recipe, "--force", "--lock", kitchen.out / "lorareg.lock")


def test_where_rows_lie_is_pinned_with_what_was_stored(lorareg, kitchen):
    lorareg("add", "loras")
    write_rows(kitchen / "plain.jsonl", [("aaaa", "x"), ("aaab", "x")])
    write_rows(kitchen / "wide.jsonl", [("zzzz", "x"), ("zzzy", "x")])
    learn = ("route", "--base", "./tiny-llama", "--learn")
    for name in ("plain", "wide"):
        lorareg(*learn, name, "--rows", f"{name}.jsonl")
    named = [{"ref": name, "name": name} for name in ("plain", "wide")]
    recipe = kitchen.recipe(adapters=named, method={"type": "prompt_router"})
    lorareg("compose", recipe)
    lock = shutil.copy(kitchen.out / "lorareg.lock", kitchen / "kept.lock")
    pins = json.loads((kitchen / "kept.lock").read_text())["data"]
    assert set(pins) == {"train", "test", "rows of plain", "rows of wide"}
    lorareg("compose", recipe, "--force", "--lock", lock)
    write_rows(kitchen / "plain.jsonl", [("bbbb", "x"), ("bbba", "x")])
    lorareg(*learn, "plain", "--rows", "plain.jsonl")
    said = lorareg.fails("compose", recipe, "--force", "--lock", lock)
    assert "data rows of plain: centroid has another content" in said
    assert "wide" not in said
    with Registry() as registry:
        [(one, stored)] = [(a, c) for a, c in registry.centroids() if a.record.name == "wide"]
        registry.put_centroid(one.ref, replace(stored, layer=stored.layer + 1))
    said = lorareg.fails("compose", recipe, "--force")
    assert f"wide: what is stored of its rows is of hidden state {stored.layer + 1}" in said
    assert "lorareg route --learn wide" in said


def test_examples_that_are_tested_on_are_told(lorareg, kitchen):
    tested = (kitchen / "test.jsonl").read_text().splitlines()
    (kitchen / "a.jsonl").write_text("\n".join(tested[:3]))
    write_rows(kitchen / "z.jsonl", [("zzzz", "x")])
    named = [{"ref": f"./loras/{name}", "name": name} for name in ("plain", "wide")]
    examples = {"plain": "a.jsonl", "wide": "z.jsonl"}
    method = {"type": "prompt_router", "examples": examples}
    lorareg("compose", kitchen.recipe(adapters=named, method=method))
    assert "3 of 10 test rows are also training rows or examples" in kitchen.results()["notes"]
