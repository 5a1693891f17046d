"""MixLoRA and its kin on the command line: found, shown, converted to PEFT's layout and back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.mixlora import legacy, make, save

BASE = "meta-llama/Llama-2-7b-hf"


def checkpoint(folder, strategy="mixlora", *, pickled=False, old=False, **options):
    made = make(strategy, **{"base_model_name_or_path": BASE, **options})
    return save(folder, legacy(made) if old else made, pickled=pickled)


def says(page):
    """Title → text of a page's lines."""
    return {line[:12].strip(): line[12:] for line in page.splitlines() if line[:1] != " "}


@pytest.fixture(scope="module")
def pickles(tmp_path_factory):
    """What was converted from a pickle once, for tests that only look."""
    root = tmp_path_factory.mktemp("pickles")
    checkpoint(root / "old", pickled=True, old=True)
    (root / "old" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Old\n")
    return root


def test_a_folder_is_shown_with_its_experts(lorareg, tmp_path):
    options = {"expert_lora": {"r": 2, "lora_alpha": 6}, "router_aux_loss_coef": 0.01}
    checkpoint(tmp_path / "mine", kv=16, layers=3, **options)
    lorareg("add", tmp_path)
    page = lorareg("show", "mine").out
    said = says(page)
    assert said["kind"] == "MIXLORA CAUSAL_LM"
    assert said["experts"] == "4 in 3 of 3 layers; rank 2, alpha 6, scaled by 3"
    assert said["router"].startswith("mixlora: the 2 likeliest of each token (top_k)")
    assert said["router loss"] == "0.01"
    assert said["attention"] == "rank 4, alpha 8, scaled by 2"
    assert said["base's size"] == "hidden 32, feed-forward 48"
    assert "  up_proj         3 x  48x32, rank 2 in each expert" in page
    assert "  k_proj          3 x  16x32, rank 4\n" in page


@pytest.mark.parametrize(
    ("strategy", "router", "more"),
    [
        ("mixlora", "the 2 likeliest", {"top_k": 2}),
        ("mixlora-dynamic", "probability of 0.8", {"top_p": 0.8, "temperature": 0.0}),
        ("mixlora-switch", "at most 8 tokens", {"expert_capacity": 8, "sparse_step": None}),
        ("loramoe", "all of them", {"router_loss": False}),
        ("mola", "the 2 likeliest", {"top_k": 2, "attention": None}),
    ],
)
def test_each_router_is_told_to_people_and_programs(lorareg, tmp_path, strategy, router, more):
    checkpoint(tmp_path / "mine", strategy)
    [row] = lorareg("add", tmp_path, "--json").json
    assert (row["peft_type"].lower(), row["rank"]) == (strategy.partition("-")[0], 4)
    assert router in says(lorareg("show", "mine").out)["router"]
    found = lorareg("show", "mine", "--json").json["experts"]
    assert found.items() >= {"num_experts": 4, "routing_strategy": strategy, **more}.items()
    assert found["experts"]["scaling"] == 2.0
    assert (found["hidden_size"], found["intermediate_size"], found["layers"]) == (32, 48, 2)


@pytest.mark.parametrize("strategy", ["mixlora", "loramoe"])
def test_without_attention_tensors_nothing_is_said_of_them(lorareg, tmp_path, strategy):
    source = checkpoint(tmp_path / "mine", strategy, targets=("gate_proj", "up_proj", "down_proj"))
    lorareg("add", tmp_path)
    assert "attention" not in says(lorareg("show", "mine").out)
    assert lorareg("show", "mine", "--json").json["experts"]["attention"] is None
    done = lorareg("convert", source, tmp_path / "new", "--to", "peft")
    assert "attention" not in says(done.out)
    assert "experts" in says(done.out)


def test_a_folder_that_is_not_registered_is_added_not_pulled(lorareg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "out" / "mine")
    for place in ("out/mine", "./out/mine", str(tmp_path / "out" / "mine")):
        said = lorareg.fails("show", place)
        assert f"Hint: it is on this machine: lorareg add {place}\n" in f"{said}\n"
    assert "fetch it with: lorareg pull out/other" in lorareg.fails("show", "out/other")
    # A folder of that name alone may be another thing.
    assert "lorareg add, pull or sync" in lorareg.fails("show", "out")


@pytest.mark.parametrize(
    ("strategy", "kind", "why"),
    [
        ("mixlora", "MIXLORA", "its experts stand on both sides of the activation and differ from"),
        ("loramoe", "LORAMOE", "its experts differ from token to token"),
        ("mola", "MOLA", "its experts differ from token to token"),
    ],
)
def test_experts_cannot_be_summed_and_the_way_out_is_told(lorareg, kitchen, strategy, kind, why):
    mine = checkpoint(kitchen / "mine", strategy, base_model_name_or_path="tiny-llama")
    base = kitchen.tiny.folder
    for words in (
        ("resize", mine, "--rank", "2", "--out", "no"),
        ("merge", "--base", base, "--adapter", mine, "--out", "no"),
        ("dare", "--adapter", mine, "--out", "no"),
        ("dare", "--base", base, "--tuned", mine, "--out", "no"),
        ("compose", kitchen.recipe(adapters=["./loras/plain", "./mine"])),
    ):
        said = lorareg.fails(*words)
        assert f"mine: it is {kind}: {why}" in said
        assert f"Hint: run it as it is: lorareg generate {mine} PROMPT" in said
        assert "lorahub_registry.runtime" in said
        assert "lorareg merge" not in said
    assert "lorareg merge" in lorareg.fails(
        "dare", "--base", base, "--tuned", kitchen / "loras/plain", "--out", "no"
    )


@pytest.mark.parametrize(("strategy", "kind"), [("loramoe", "LoRAMoE"), ("mola", "MoLA")])
def test_what_explain_does_not_show_is_called_by_its_name(lorareg, tmp_path, strategy, kind):
    said = lorareg.fails("explain", checkpoint(tmp_path / "mine", strategy), "ab")
    assert f"mine is {kind}: its experts, chosen among in each module, are not shown here" in said
    assert "as loud" not in said


def test_other_adapters_have_no_experts(lorareg, tiny_llama):
    lorareg("add", tiny_llama.adapter("plain"))
    assert lorareg("show", "plain", "--json").json["experts"] is None
    assert "experts" not in lorareg("show", "plain").out


def test_they_are_found_by_their_kind(lorareg, tmp_path):
    checkpoint(tmp_path / "one")
    checkpoint(tmp_path / "two", "mola")
    lorareg("add", tmp_path)
    assert lorareg("search", "--peft-type", "mixlora", "-q").lines == ["one"]
    found = lorareg("search", "--base", "llama-2-7b", "--sort", "name", "-q").lines
    assert found == ["one", "two"]


def test_a_pickle_is_shown_from_its_config_alone(lorareg, pickles):
    lorareg("add", pickles / "old")
    said = says(lorareg("show", "old").out)
    assert said["experts"] == "4; rank 4, alpha 8, scaled by 2"
    assert said["router"].startswith("mixlora: ")
    assert "gate_proj" in said["targets"]
    assert "w1" not in said["targets"]
    assert said["state"] == "a pickle, unread: lorareg convert old"


def test_what_does_not_fit_is_left_out_by_name(lorareg, tmp_path):
    checkpoint(tmp_path / "good")
    checkpoint(tmp_path / "bad", num_experts=8)
    checkpoint(tmp_path / "worse", top_k=9, pickled=True)
    done = lorareg("add", tmp_path)
    assert "num_experts says 8, and the tensors have 4 experts" in done.err
    assert "top_k is 9, and num_experts is 4" in done.err
    assert [line.split()[0] for line in done.lines[1:]] == ["good"]


def test_on_the_hub_config_and_header_are_enough(lorareg, hub, tmp_path):
    for name, options in {"new": {"expert_lora": {"r": 2}}, "old": {"pickled": True}}.items():
        folder = checkpoint(tmp_path / name, **options)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.add_repo(f"org/{name}", {**files, "README.md": f"---\nbase_model: {BASE}\n---\n"})
    lorareg("sync", "--base", BASE)
    new = lorareg("show", "org/new", "--json").json
    assert new["state"] == "listed"
    assert new["experts"]["experts"]["r"] == 2
    assert new["experts"]["hidden_size"] == 32
    old = lorareg("show", "org/old", "--json").json
    assert (old["state"], old["experts"]["num_experts"]) == ("pickle", 4)
    lorareg("pull", "org/new")
    pulled = lorareg("show", "org/new", "--json").json
    assert (pulled["state"], pulled["experts"]) == ("local", new["experts"])


def test_a_first_checkpoint_becomes_todays_and_goes_back(lorareg, pickles, tmp_path):
    before = sorted(path.name for path in (pickles / "old").iterdir())
    done = lorareg("convert", pickles / "old", tmp_path / "new", "--to", "peft")
    assert says(done.out)["experts"].startswith("4; rank 4")
    assert sorted(path.name for path in (pickles / "old").iterdir()) == before
    config, tensors = make(base_model_name_or_path=BASE)
    found = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert written == config | {"target_modules": sorted(config["target_modules"])}
    shown = lorareg("show", "new", "--json").json
    assert (shown["license"], shown["base"]) == ("apache-2.0", BASE)

    made = lorareg("convert", tmp_path / "new", tmp_path / "back", "--to", "mixlora", "--json").json
    assert made == {"path": str(tmp_path / "back"), "config": written, "tensors": len(tensors),
                    "notes": []}  # fmt: skip
    loaded = torch.load(tmp_path / "back" / "adapter_model.bin", weights_only=True)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert not (tmp_path / "back" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("strategy", ["mixlora-switch", "loramoe", "mola"])
def test_every_kind_goes_both_ways(lorareg, tmp_path, strategy):
    source = checkpoint(tmp_path / "a", strategy)
    there = lorareg("convert", source, tmp_path / "b", "--to", "mixlora")
    assert f"the package mixlora does not read routing_strategy {strategy}" in there.err
    assert lorareg("convert", tmp_path / "b", tmp_path / "c", "--to", "peft", "-q").lines == [
        str(tmp_path / "c")
    ]
    old, new = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ac")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_registered_adapter_keeps_the_base_a_user_gave(lorareg, tmp_path):
    checkpoint(tmp_path / "mine", base_model_name_or_path="/data/somebody/model")
    lorareg("add", tmp_path / "mine", "--base", BASE)
    lorareg("convert", "mine", tmp_path / "new", "--to", "peft")
    assert lorareg("show", "new", "--json").json["base"] == BASE


def test_beside_a_pickle_its_own_names_stay(lorareg, pickles, tmp_path):
    folder = shutil.copytree(pickles / "old", tmp_path / "old")
    lorareg("convert", folder)
    assert "mixlora.layers.0.gate.weight" in load_file(folder / "adapter_model.safetensors")
    assert says(lorareg("show", "old").out)["base's size"] == "hidden 32, feed-forward 48"


def test_a_place_that_is_taken_is_not_written_to(lorareg, tmp_path):
    source = checkpoint(tmp_path / "a")
    run = ("convert", source, tmp_path / "b", "--to", "mixlora")
    lorareg(*run)
    assert "exists and is not empty" in lorareg.fails(*run)
    lorareg(*run, "--force")
    (tmp_path / "b" / "mine.txt").touch()
    assert "holds mine.txt" in lorareg.fails(*run, "--force")
    assert "is made of" in lorareg.fails("convert", source, source, "--to", "peft", "--force")


def test_what_cannot_be_converted_leaves_nothing(lorareg, tmp_path, tiny_llama):
    target = tmp_path / "out"
    dora = checkpoint(tmp_path / "dora", dora=True)
    said = lorareg.fails("convert", dora, target, "--to", "mixlora")
    assert "use_dora is on, and they read no magnitudes" in said
    plain = tiny_llama.adapter("plain")
    assert "it is LORA, none of" in lorareg.fails("convert", plain, target, "--to", "peft")
    lost = checkpoint(tmp_path / "lost", use_dora=True)
    said = lorareg.fails("convert", lost, target, "--to", "peft")
    assert "m-LoRA never saved DoRA's magnitudes" in said
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "DEST goes with --to"),
        (["a", "--to", "peft"], "--to peft wants a second folder"),
        (["a", "b", "--to", "peft", "--gate", "x"], "--to and --gate exclude each other"),
        (["a", "b", "--to", "peft", "--out", "c"], "--out goes with --gate"),
        (["a", "--force"], "--force goes with --gate"),
        (["a", "b", "--to", "gguf"], "'gguf' is not one of 'peft', 'mixlora'"),
    ],
)
def test_words_that_make_no_sense_together_are_refused(lorareg, words, message):
    assert message in lorareg.fails("convert", *words, code=2)
