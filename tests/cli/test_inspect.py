"""`show --weights`, `--plot` and `compare`: what they print, draw and refuse."""

import os
import shutil

import pytest
import torch

from lorahub_registry.api.inspect import compare, weights
from tests.cli.conftest import edit_config, edit_tensors, tree
from tests.hub.made import BASE, adapter, card
from tests.weights import two

PNG = b"\x89PNG\r\n\x1a\n"


def scaled(folder, factor):
    """Make an adapter louder; a layout that several tests share."""
    edit_tensors(folder, lambda t: {k: v * factor if "lora_B" in k else v for k, v in t.items()})


def dense(folder, scaling):
    """Module → ΔW, float64, by PEFT's own names."""
    found = {}

    def read(tensors):
        for key, a in tensors.items():
            if "lora_A" in key:
                b = tensors[key.replace("lora_A", "lora_B")]
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                found[name] = scaling * b.double() @ a.double()

    edit_tensors(folder, read)
    return found


def test_show_weights_tells_every_module_to_a_program(lorareg, kitchen):
    lorareg("add", "loras")
    shown = lorareg("show", "plain", "--weights", "--json").json
    expected = dense(kitchen / "loras/plain", 8 / 4)
    told = shown["weights"]
    assert [m["name"] for m in told["modules"]] == sorted(expected)
    for module in told["modules"]:
        matrix = expected[module["name"]]
        assert (module["out"], module["in"], module["rank"]) == (*matrix.shape, 4)
        assert module["norm"] == pytest.approx(float(matrix.norm()))
        values = torch.linalg.svdvals(matrix)[:4].tolist()
        assert module["singular_values"] == pytest.approx(values)
        assert module["energy_by_rank"][0] == pytest.approx(values[0] ** 2 / module["norm"] ** 2)
        assert 1 <= module["effective_rank"] <= 4
    first = told["modules"][0]
    assert (first["stack"], first["layer"], first["kind"]) == (
        "model.layers",
        0,
        "self_attn.q_proj",
    )
    whole = torch.stack([m.norm() for m in expected.values()]).norm()
    assert told["norm"] == pytest.approx(float(whole))
    assert told["energy_by_rank"][-1] == pytest.approx(1)
    del shown["weights"]
    assert shown == lorareg("show", "plain", "--json").json


def test_show_weights_takes_a_folder_that_is_not_registered(lorareg, kitchen):
    places = ("./loras/plain", "loras/plain", kitchen / "loras/plain")
    shown = [lorareg("show", place, "--weights", "--json").json for place in places]
    assert shown[0] == shown[1] == shown[2]
    assert lorareg("list", "--json").json == []
    assert shown[0]["added_at"] is None
    assert "weights     norm" in lorareg("show", "./loras/plain", "--weights").out
    lorareg("add", "loras")
    known = lorareg("show", "plain", "--weights", "--json").json
    assert shown[0] == known | {"added_at": None, "updated_at": None}
    assert "no adapter at ./nowhere" in lorareg.fails("show", "./nowhere", "--weights")


def test_show_weights_draws_the_norms_in_words(lorareg, kitchen):
    edit_tensors(
        kitchen / "loras/plain",
        lambda t: {k: v * (0 if "1.self_attn.v_proj.lora_B" in k else 1) for k, v in t.items()},
    )
    lorareg("add", "loras")
    page, plain = lorareg("show", "plain", "--weights").lines, lorareg("show", "plain").lines
    assert page[: len(plain)] == plain
    title, rank, energy, head, q, v = page[len(plain) :]
    assert title.startswith("weights     norm ")
    assert title.endswith("in 4 modules")
    assert rank.startswith("effective   rank ")
    assert energy.startswith("energy      50% in rank ")
    assert energy.endswith(" of 4")
    assert "by layer, █ = " in head
    assert [line.split()[0] for line in (q, v)] == ["q_proj", "v_proj"]
    strips = [line.split()[-1] for line in (q, v)]
    assert [len(s) for s in strips] == [2, 2]
    assert "█" in "".join(strips)
    assert strips[1][1] == "▁"  # nothing is left of that one


def test_many_layers_fit_a_narrow_terminal(lorareg, kitchen, monkeypatch):
    def more(tensors):
        made = {}
        for n in range(40):
            for k, v in tensors.items():
                if "layers.0.self_attn.q" in k:
                    made[k.replace("layers.0", f"layers.{n}")] = v * (9 if n == 13 else 1)
        return made

    edit_tensors(kitchen / "loras/plain", more)
    lorareg("add", "loras/plain")
    monkeypatch.setenv("COLUMNS", "56")
    *_, head, strip = lorareg("show", "plain", "--weights").lines
    assert "the largest of every 2" in head
    assert strip.split()[-1] == "▁" * 6 + "█" + "▁" * 13
    assert len(strip) <= 56
    monkeypatch.setenv("COLUMNS", "200")
    assert len(lorareg("show", "plain", "--weights").lines[-1].split()[-1]) == 40


def test_an_adapter_of_zeros_is_called_so(lorareg, kitchen):
    scaled(kitchen / "loras/plain", 0)
    lorareg("add", "loras")
    assert lorareg("show", "plain", "--weights").lines[-1].endswith("it changes nothing")
    assert lorareg("show", "plain", "--weights", "--json").json["weights"]["energy_by_rank"] == []
    lorareg("show", "plain", "--plot", "zero.png")
    assert "0.00" in lorareg("compare", "plain", "wide").out
    [pair] = lorareg("compare", "plain", "wide", "--json").json["pairs"]
    assert pair["interference"] == {"plain": None, "wide": 0}


def test_a_plot_is_a_png_and_replaces_only_such(lorareg, kitchen):
    lorareg("add", "loras")
    done = lorareg("show", "plain", "--plot", "new.png")
    assert (kitchen / "new.png").read_bytes().startswith(PNG)
    assert done.err == "✓ drawn to new.png\n"
    assert "effective   rank" in done.out
    assert os.stat(kitchen / "new.png").st_mode & 0o777 == 0o644
    (kitchen / "new.png").write_bytes(PNG)
    assert lorareg("show", "plain", "--plot", "new.png", "-q").lines == ["plain"]
    assert len((kitchen / "new.png").read_bytes()) > 5000

    (kitchen / "mine.png").write_text("a diary")
    assert "is no PNG file" in lorareg.fails("show", "plain", "--plot", "mine.png")
    assert (kitchen / "mine.png").read_text() == "a diary"
    said = lorareg.fails("show", "plain", "--plot", "figure.pdf", code=2)
    assert "write figure.png" in said
    assert "no such folder" in lorareg.fails("show", "plain", "--plot", "nowhere/a.png")
    assert not [name for name in tree(kitchen.folder) if name.startswith(".")]


def test_compare_says_who_drowns_whom(lorareg, kitchen):
    shutil.copytree(kitchen / "loras/plain", kitchen / "loras/loud")
    scaled(kitchen / "loras/loud", 3)
    lorareg("add", "loras")
    page = lorareg("compare", "plain", "wide", "loud").out
    assert "loud drowns plain: 3.00 times as loud where plain reads, most in model.layers." in page
    assert "modules that both change" in page
    table = page.split("\n\n")[1].splitlines()
    assert table[0] == "interference: what a row feels of a column"
    assert table[2].split() == ["1", "-", table[2].split()[2], "3.00"]
    assert table[4].split()[1] == "0.33"
    assert page.split("\n\n")[2].splitlines()[2].split()[-1] == "1.00"  # cosine
    pair = lorareg("compare", "plain", "loud").out
    assert "all change the same 4 modules" in pair
    assert "modules that both change" not in pair
    quiet = lorareg("compare", "plain", "loud", "-q").lines
    assert quiet == ["plain loud 3.00", "loud plain 0.33"]


def test_compare_tells_everything_to_a_program(lorareg, kitchen):
    lorareg("add", "loras")
    told = lorareg("compare", "plain", "./loras/wide", "--json").json
    names = ["plain", "wide"]
    assert [a["name"] for a in told["adapters"]] == names
    assert told["adapters"][0]["id"] == str(kitchen / "loras/plain")
    [pair] = told["pairs"]
    assert pair["adapters"] == names
    assert pair["shared_modules"] == 4
    assert pair["own_modules"] == {"plain": 0, "wide": 10}
    one, other = dense(kitchen / "loras/plain", 2), dense(kitchen / "loras/wide", 0.5)
    inner = sum(float((one[m] * other[m]).sum()) for m in one)
    norms = [float(torch.cat([m.flatten() for m in d.values()]).norm()) for d in (one, other)]
    assert list(pair["norms"].values()) == pytest.approx(norms)
    assert pair["cosine"] == pytest.approx(inner / norms[0] / norms[1])
    assert [m["name"] for m in pair["modules"]] == sorted(one)
    assert [(x["stack"], x["layer"]) for x in pair["layers"]] == [
        ("model.layers", 0), ("model.layers", 1),
    ]  # fmt: skip
    assert lorareg("compare", "wide", "plain", "--json").json["pairs"][0]["interference"] == {
        name: pytest.approx(value) for name, value in pair["interference"].items()
    }


def test_compare_wants_two_that_are_not_one(lorareg, kitchen):
    lorareg("add", "loras")
    assert "name two or more" in lorareg.fails("compare", "plain", code=2)
    assert "plain is named twice" in lorareg.fails("compare", "plain", "./loras/plain", code=2)
    lorareg.fails("compare", "plain", "nobody")
    assert "no adapter_config.json" in lorareg.fails("compare", "plain", "./nowhere")


def test_two_of_one_name_go_by_what_was_typed(lorareg, kitchen):
    shutil.copytree(kitchen / "loras/plain", kitchen / "other/plain")
    lines = lorareg("compare", "./loras/plain", "other/plain", "-q").lines
    assert lines == ["./loras/plain other/plain 1.00", "other/plain ./loras/plain 1.00"]


def test_other_shapes_are_refused_with_both_names(lorareg, kitchen):
    kitchen.lora("same", "narrow")
    edit_tensors(
        kitchen / "loras/narrow",
        lambda t: {k: v[:, :16].clone() if "lora_A" in k else v for k, v in t.items()},
    )
    said = lorareg.fails("compare", "./loras/plain", "./loras/narrow")
    assert "model.layers.0.self_attn.q_proj is linear 32x32 in plain and linear 32x16 in " in said


def test_other_bases_are_compared_with_a_warning(lorareg, kitchen):
    edit_config(kitchen / "loras/wide", base_model_name_or_path="me/other-1b")
    done = lorareg("compare", "./loras/plain", "./loras/wide")
    assert "Warning: plain sits on tiny-llama, wide on me/other-1b; " in done.err
    assert "drowns" not in done.err
    edit_config(kitchen / "loras/wide", base_model_name_or_path="tiny-llama")
    assert "Warning" not in lorareg("compare", "./loras/plain", "./loras/wide").err


def test_adapters_without_a_common_module_are_not_called_harmless(lorareg, kitchen):
    ours = {"k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    edit_tensors(
        kitchen / "loras/wide",
        lambda t: {k: v for k, v in t.items() if any(name in k for name in ours)},
    )
    said = lorareg("compare", "./loras/plain", "./loras/wide").err
    assert "plain and wide change no module in common" in said


@pytest.mark.parametrize(
    ("kind", "feature"),
    [("dora", "use_dora"), ("modules_to_save", "modules_to_save"), ("lora_bias", "lora_bias")],
)
def test_what_a_delta_does_not_tell_is_warned_of_by_name(lorareg, kitchen, kind, feature):
    kitchen.lora(kind)
    lorareg("add", "loras")
    for words in (("show", kind, "--weights"), ("compare", "plain", kind)):
        said = lorareg(*words, "-q").err
        assert f"Warning: {kind} has {feature}" in said
        assert "not all that it changes" in said


def test_embeddings_are_deltas_too(lorareg, kitchen):
    kitchen.lora("embedding")
    lorareg("add", "loras")
    modules = lorareg("show", "embedding", "--weights", "--json").json["weights"]["modules"]
    [row] = [m for m in modules if m["name"] == "model.embed_tokens"]
    assert (row["layer"], row["out"]) == (None, 32)
    assert row["norm"] > 0
    lorareg("compare", "embedding", "plain")


def test_weights_that_cannot_be_read_are_refused(hub, lorareg, kitchen):
    kitchen.lora("ia3")
    hub.add_repo("me/far", adapter() | {"README.md": card()})
    lorareg("sync", "--base", BASE)
    lorareg("add", "loras")
    assert "lorareg pull me/far" in lorareg.fails("compare", "plain", "me/far")
    assert "lorareg pull me/far" in lorareg.fails("show", "me/far", "--weights")
    assert "it is IA3, and only LoRA" in lorareg.fails("compare", "plain", "ia3")
    weights_file = kitchen / "loras/wide/adapter_model.safetensors"
    weights_file.rename(weights_file.with_suffix(".bin"))
    said = lorareg.fails("compare", "plain", "./loras/wide")
    assert "its weights are a pickle" in said
    assert "lorareg convert" in said
    weights_file.with_suffix(".bin").unlink()
    assert "it has no weights" in lorareg.fails("compare", "plain", "./loras/wide")


def test_nan_is_refused_by_its_tensor(lorareg, kitchen):
    scaled(kitchen / "loras/plain", float("nan"))
    assert "holds NaN or infinity" in lorareg.fails("compare", "./loras/plain", "./loras/wide")


def test_from_python_without_a_registry_of_one_s_own(kitchen):
    found = compare([kitchen / "loras/plain", "./loras/wide"])
    assert found.names == ("plain", "wide")
    assert weights(kitchen / "loras/plain").norm == pytest.approx(found.pairs[0].norms[0])


def test_two_models_are_compared_module_by_module(lorareg, tmp_path):
    base = two.model("Llama")
    tuned = two.tuned(base)
    folders = two.save(base, tmp_path / "plain"), two.save(tuned, tmp_path / "tuned")
    done = lorareg("compare", *folders)
    assert done.lines[0] == "difference  tuned - plain"
    assert "1 embedding, 5 norms, 1 head" in done.out
    found = lorareg("compare", *folders, "--json").json
    squares, lost = 0.0, 0.0
    for module in found["modules"]:
        weight = base.get_parameter(f"{module['name']}.weight").detach().double()
        delta = tuned.get_parameter(f"{module['name']}.weight").detach().double() - weight
        values = torch.linalg.svdvals(delta)
        assert module["singular_values"] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-6)
        assert module["relative_norm"] == pytest.approx(float(delta.norm() / weight.norm()))
        shares = values.square() / values.square().sum()
        rank = float(torch.special.entr(shares).sum().exp())
        assert module["effective_rank"] == pytest.approx(rank, rel=1e-4)
        squares += float(values.square().sum())
        lost += float(values[4:].square().sum())
    assert len(found["modules"]) == 14
    assert found["kept_by_rank"]["4"] == pytest.approx(1 - lost / squares, abs=1e-5)
    assert list(found["kept_by_rank"]) == ["4", "16"], "there are 32 directions"
    quiet = lorareg("compare", *folders, "--format", "quiet").lines
    assert [line.split()[0] for line in quiet] == ["4", "16"]
    assert "are the same, number by number" in lorareg.fails("compare", folders[0], folders[0])


def test_a_model_is_not_compared_with_an_adapter(lorareg, tiny_llama, tmp_path):
    words = "compare", tiny_llama.folder, tiny_llama.adapter("plain")
    assert "is a model: it is compared with one other model" in lorareg.fails(*words, code=2)
