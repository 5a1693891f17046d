"""MixLoRA made of adapters, by the command line: composed, shown, run, explained, published."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import lorahub_registry as lr
from lorahub_registry.adapters.facts import digest_of
from lorahub_registry.errors import BrokenAdapter
from tests.cli.conftest import edit_tensors, tree, write_rows

EXPERTS = {"type": "mixlora", "training": {"max_steps": 3, "learning_rate": 0.2}}
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors",
         "dynamic/adapter_config.json", "dynamic/adapter_model.safetensors", "lorareg.lock",
         "recipe.yaml", "results.json"]  # fmt: skip


def logits(kitchen, folder):
    with torch.inference_mode():
        model = PeftModel.from_pretrained(kitchen.tiny.model(), str(folder)).eval()
        return model(torch.tensor([[1, 40, 41, 42, 43]])).logits


@pytest.fixture
def composed(lorareg, kitchen):
    """A mixture of two adapters, of which only "wide" has a feed-forward part."""
    lorareg("compose", kitchen.recipe(method=EXPERTS))
    return kitchen


def test_it_is_composed_shown_and_registered(lorareg, kitchen):
    planned = lorareg("compose", kitchen.recipe(method=EXPERTS), "--dry-run", "--json").json
    assert planned["steps"] == 3
    done = lorareg("compose", kitchen.recipe(method=EXPERTS))
    results = kitchen.results()
    shown = [line.split("  ")[0].strip() for line in done.lines]
    for name in ("base", "plain", "wide", "uniform average", "mixture",
                 "learned static coefficients (per model)", "plain LoRA with mean coefficients",
                 "learned static coefficients (per layer)"):  # fmt: skip
        assert name in shown
    verb = "" if results["verdict"]["win"] else "is "
    assert done.lines[-1] == f"blend {verb}{results['verdict']['text']}"
    assert [name for name in tree(kitchen.out) if name != "gates.png"] == sorted(
        [*FILES, "dynamic"]
    )
    assert (kitchen.out / "gates.png").read_bytes().startswith(b"\x89PNG")
    stored = lorareg("show", "blend", "--json").json
    assert stored["mixture"]["method"] == "mixlora"
    page = lorareg("show", "blend").out
    assert "the mixture itself is in dynamic/" in page
    assert "\nexperts     2 in 2 of 2 layers; rank " in page
    assert "\nrouter      mixlora: the 2 likeliest of each token (top_k)" in page
    assert stored["experts"].items() >= {"num_experts": 2, "top_k": 2, "layers": 2}.items()
    # A part that decides and is not what was composed is not offered.
    assert stored["dynamic_problem"] is None
    weights = kitchen.out / "dynamic" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    said = lorareg("show", "blend", "--json").json["dynamic_problem"]
    assert "long where its header promises" in said
    page = lorareg("show", "blend").out
    assert "\ndynamic     damaged, so that nothing runs it: " in page
    assert "generate and explain take" not in page
    weights.write_bytes(whole)
    # Without its part that decides it is the plain LoRA that its config says.
    (kitchen.out / "dynamic" / "adapter_config.json").unlink()
    assert lorareg("show", "blend", "--json").json["experts"] is None


def test_its_plain_lora_is_not_taken_for_it(lorareg, composed):
    inner = composed.out / "dynamic"
    words = ("--base", composed.tiny.folder, "--out")
    done = lorareg("merge", "--adapter", "blend", *words, "merged")
    [said] = [line for line in done.err.splitlines() if "another model than" in line]
    assert "blend: what is merged is its plain LoRA with fixed coefficients" in said
    [note] = json.loads((composed / "merged" / "lorareg.json").read_text())["notes"]
    assert note in said
    done = lorareg("merge", "--adapter", "plain", *words, "alone")
    assert "another model than" not in done.err
    said = lorareg.fails("merge", "--adapter", inner, *words, "no")
    assert f"its plain LoRA, another model, stands beside it: {composed.out}" in said
    for layout in ("mixlora", "peft"):
        said = lorareg.fails("convert", composed.out, "new", "--to", layout)
        assert "here it is LORA; the experts of the mixture are in dynamic/" in said
        assert f"Hint: lorareg convert {inner} new --to {layout}" in said
    lorareg("convert", inner, "new", "--to", "mixlora")
    said = lorareg.fails("convert", composed / "loras/plain", "x", "--to", "mixlora")
    assert said.splitlines()[-1].endswith("a recipe with method: {type: mixlora}")


def test_the_card_tells_loads_entropy_and_the_dead(lorareg, composed):
    card = (composed.out / "README.md").read_text("utf-8")
    routing = composed.results()["routing"]
    assert "sends each token to 2 of the 2 experts" in card
    assert "No expert is dead" in card
    assert "The routers were trained, on 10 rows" in card
    assert "+0.5000 of plain, +0.5000 of wide." in card
    first = routing["entropy"]["model.layers.0"]
    share = routing["entropy_share"]["model.layers.0"]
    mean = routing["mean"]["model.layers.0"]["wide"]
    [line] = [one for one in card.splitlines() if one.startswith("| model.layers.0 |")]
    assert line.startswith(f"| model.layers.0 | {first:.4f} ({100 * share:.0f}%) | 100.0%, ")
    assert line.endswith(f"100.0%, {mean:.4f} |")
    facts = composed.results()
    facts["routing"]["dead"] = ["layer 1: wide", "layer 0: plain"]
    from lorahub_registry.card import render

    said = render(facts, "version: 1\n")
    assert "fewer than 0.1% of a layer's tokens choose: layer 1: wide, layer 0: plain." in said
    assert "PEFT learns the type MIXLORA" in said


def test_dead_experts_are_told_on_stderr(lorareg, kitchen):
    # Routers that start at huge logits, and are hardly trained.
    kitchen.lora("patterns")
    kitchen.lora("rslora")
    kitchen.lora("same")
    names = ["plain", "wide", "patterns", "rslora", "same"]
    method = {**EXPERTS, "router_init_range": 1e4, "training": {"max_steps": 1}}
    write_rows(kitchen / "train.jsonl", [("a", "b")])
    loras = [f"./loras/{name}" for name in names]
    done = lorareg("compose", kitchen.recipe(method=method, adapters=loras))
    routing = kitchen.results()["routing"]
    expected = [
        f"layer {i}: {name}"
        for i in (0, 1)
        for name in names
        if routing["load"][f"model.layers.{i}"][name] < 0.001
    ]
    # Four tokens or so cannot choose all five.
    assert routing["dead"] == expected != []
    assert f"dead experts, chosen by fewer than 0.1% of a layer's tokens: {expected[0]}" in done.err


def test_load_generate_and_explain_take_the_one_that_decides(lorareg, composed):
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    expected = logits(composed, composed.out / "dynamic")
    assert (expected - logits(composed, composed.out)).abs().max() > 1e-4
    inner = lr.load(composed.out / "dynamic", base="tiny-llama")
    for one in (lr.load(composed.out), lr.load("blend"), inner):
        with torch.inference_mode():
            torch.testing.assert_close(one.model(ids).logits, expected, rtol=0, atol=1e-5)
    options = ("--max-new-tokens", "8", "--json")
    [said] = lorareg("generate", composed.out, "ab cd", *options).json
    assert said["text"] == inner.generate("ab cd", max_new_tokens=8)
    found = lorareg("explain", "blend", "ab cd", *options).json
    assert (found["router"], found["answer"]) == ("mixlora", said["text"])
    assert [one["name"] for one in found["adapters"]] == ["plain", "wide"]
    assert list(found["layers"]) == ["model.layers.0", "model.layers.1"]
    for token in found["tokens"]:
        assert sum(token["coefficients"].values()) == pytest.approx(1)
    assert "\nADAPTER " in lorareg("explain", "blend", "ab cd", "--max-new-tokens", "0").out
    layer = lorareg("explain", "blend", "ab cd", "--layer", "1", *options).json
    assert layer["layer"] == ["model.layers.1"]
    assert "no layer with adapters is called so" in lorareg.fails(
        "explain", "blend", "ab cd", "--layer", "7", code=2
    )
    alone = lorareg("explain", composed.out / "dynamic", "ab", "--base", "tiny-llama", "--json")
    assert [one["name"] for one in alone.json["adapters"]] == ["plain", "wide"]
    (composed.out / "results.json").unlink()
    alone = lorareg("explain", composed.out / "dynamic", "ab", "--base", "tiny-llama", "--json")
    assert [one["name"] for one in alone.json["adapters"]] == ["expert 0", "expert 1"]
    words = (composed.out / "dynamic", "ab", "--base", "tiny-llama", "--max-new-tokens", "0")
    assert "\nEXPERT " in lorareg("explain", *words).out


def test_the_weights_that_are_told_are_the_router_s(lorareg, composed):
    found = lorareg("explain", "blend", "ab cd", "--max-new-tokens", "0", "--json").json
    model = PeftModel.from_pretrained(
        composed.tiny.model(), str(composed.out / "dynamic")
    ).eval()  # fmt: skip
    heard = []
    prompt = composed.tiny.tokenizer()("ab cd ")["input_ids"]
    with torch.inference_mode(), model.watching(lambda _, __, logits, *rest: heard.append(logits)):
        model(torch.tensor([prompt]))
    expected = torch.stack([each.softmax(-1) for each in heard]).mean(0)
    said = [list(token["coefficients"].values()) for token in found["tokens"]]
    torch.testing.assert_close(torch.tensor(said), expected, rtol=0, atol=1e-5)


def test_the_same_recipe_gives_the_same_bytes_and_force_replaces(lorareg, kitchen):
    recipe = kitchen.recipe(method=EXPERTS)
    first = lorareg("compose", recipe, "--json").json
    before = {name: (kitchen.out / name).read_bytes() for name in FILES}
    assert "--force replaces it" in lorareg.fails("compose", recipe)
    assert lorareg("compose", recipe, "--force", "--json").json == first
    assert {name: (kitchen.out / name).read_bytes() for name in FILES} == before
    lorareg("compose", kitchen.recipe(), "--force")
    assert not (kitchen.out / "dynamic").exists()


def test_a_damaged_expert_is_not_published(lorareg, composed):
    listed = lorareg("push", composed.out, "me/blend", "--dry-run", "--json").json
    assert {"dynamic/adapter_model.safetensors", "gates.png"} <= {file["name"] for file in listed}
    path = composed.out / "dynamic" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "mixlora.layers.1.mlp.moe_gate.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, path, metadata={"format": "pt"})
    assert "moe_gate" in lorareg.fails("push", composed.out, "me/blend", "--dry-run")


def times_three(tensors):
    return {n: 3 * t if n.endswith("lora_B.weight") else t for n, t in tensors.items()}


def test_what_was_changed_since_is_neither_run_nor_published(lorareg, composed):
    inner, results = composed.out / "dynamic", composed.out / "results.json"
    words = ("ab", "--base", "tiny-llama", "--max-new-tokens", "1")
    push = ("push", composed.out, "me/blend", "--dry-run")
    facts = composed.results()
    assert facts["digest"] == digest_of(composed.out)
    assert facts["routing"]["digest"] == digest_of(inner)
    edit_tensors(inner, times_three)
    wanted = f"{inner / 'adapter_model.safetensors'}: these are not the tensors that were composed"
    for command in (
        push, ("generate", composed.out, *words), ("generate", inner, *words),
        ("explain", composed.out, *words), ("generate", "plain", "--against", "blend", *words),
    ):  # fmt: skip
        said = lorareg.fails(*command)
        assert wanted in said
        assert "Hint: compose again with --force" in said
    with pytest.raises(BrokenAdapter, match="these are not the tensors"):
        lr.load(composed.out, base="tiny-llama")
    # Results of before say nothing of them.
    del facts["digest"], facts["routing"]["digest"]
    results.write_text(json.dumps(facts), "utf-8")
    lorareg("generate", composed.out, *words)
    lorareg(*push)


def test_its_plain_lora_is_published_as_it_was_composed(lorareg, composed):
    edit_tensors(composed.out, times_three)
    said = lorareg.fails("push", composed.out, "me/blend", "--dry-run")
    wanted = composed.out / "adapter_model.safetensors"
    assert f"{wanted}: these are not the tensors that were composed" in said


def test_without_its_tensors_the_file_is_named(lorareg, composed):
    path = composed.out / "dynamic" / "adapter_model.safetensors"
    path.unlink()
    for command in ("generate", "explain"):
        said = lorareg.fails(command, composed.out, "ab", "--base", "tiny-llama")
        assert f"{path}: no such file, so no mixture" in said
        assert "Hint: compose it again" in said
    assert f"{path}: no such file" in lorareg.fails("push", composed.out, "me/x", "--dry-run")


def test_what_cannot_be_is_told_before_anything_is_loaded(lorareg, kitchen):
    def told(code=1, **changes):
        return lorareg.fails("compose", kitchen.recipe(**changes), code=code)

    said = told(method={"type": "mixlora", "top_k": 3}, adapters=[
        {"ref": "./loras/plain", "name": "plain"}, {"ref": "./loras/wide", "name": "wide"},
    ])  # fmt: skip
    assert "method.top_k: is 3, and the 2 adapters are 2 experts" in said
    assert "mixlora chooses among two or more" in told(
        method={"type": "mixlora"}, adapters=["./loras/wide"]
    )
    assert "method.attention: must be average, learn or an adapter's name" in told(
        method={"type": "mixlora", "attention": "wied"}
    )
    kitchen.lora("rslora")
    kitchen.lora("same")
    said = told(method={"type": "mixlora"}, adapters=["./loras/plain", "./loras/same"])
    assert "none of the adapters changes the feed-forward modules" in said
    assert not json.loads(lorareg("list", "--json").out)
