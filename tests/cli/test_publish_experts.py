"""A converted MixLoRA, LoRAMoE or MoLA is published with its own card, and comes back whole."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from lorahub_registry.adapters.readme import read_card
from lorahub_registry.adapters.tensors import file_sha256
from lorahub_registry.lock import Lock
from tests.cli.conftest import edit_config, edit_tensors
from tests.mixlora import legacy, make, save
from tests.runtime import moe_making as moe

BASE = "meta-llama/Llama-2-7b-hf"
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "lorareg.lock",
         "results.json"]  # fmt: skip
CARD = """---
license: apache-2.0
base_model: {base}
tags: [code, lora]
datasets: [org/gsm8k-de]
language: [de, en]
model-index:
- name: old
  results:
  - task: {{type: text-generation}}
    dataset: {{name: humaneval, type: humaneval}}
    metrics: [{{type: pass@1, value: 12.5}}]
---
# The old one

It was taught translation by `patience`, and |pipes| too.

````
a fence of four
````
"""


def checkpoint(folder, strategy="mixlora", *, pickled=False, old=False, card=None, **options):
    made = make(strategy, **{"base_model_name_or_path": BASE, **moe.LOUD, **options})
    save(folder, legacy(made) if old else made, pickled=pickled)
    if card is not None:
        (folder / "README.md").write_text(card.format(base=BASE), "utf-8")
    return folder


def facts(folder):
    return json.loads((folder / "results.json").read_text("utf-8"))


def fails_to_push(lorareg, folder):
    return lorareg.fails("push", folder, "me/x", "--dry-run")


@pytest.mark.parametrize(
    ("strategy", "title", "router", "loss"),
    [
        ("mixlora", "MixLoRA", "the 2 likeliest of each token", "0.001"),
        ("mixlora-switch", "MixLoRA", "at most 2 tokens of a sequence", "0.001, z loss 0.001"),
        ("loramoe", "LoRAMoE", "all of them, weighted by a softmax", "none"),
        ("mola", "MoLA", "the 2 likeliest of each token", "none"),
    ],
)
def test_what_is_pulled_computes_what_the_source_does(
    hub, logged_in, lorareg, tmp_path, strategy, title, router, loss
):
    capacity = {"expert_capacity": 2} if strategy == "mixlora-switch" else {}
    source = checkpoint(tmp_path / "old", strategy, pickled=strategy == "mixlora",
                        card=CARD, **capacity)  # fmt: skip
    done = lorareg("convert", source, "new", "--to", "peft")
    assert "licence" not in done.err
    dry = lorareg("push", "new", "me/new", "--dry-run", "--json").json
    assert [file["name"] for file in dry] == FILES
    assert not hub.find("*/commit/*")
    pushed = lorareg("push", "new", "me/new")
    assert "edited by hand" not in pushed.err
    assert sorted(set(hub.files("me/new")) - {".gitattributes"}) == FILES

    text = hub.files("me/new")["README.md"].decode()
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.library_name) == (BASE, "apache-2.0", "peft")
    kind = strategy.partition("-")[0]
    assert data.tags[:4] == ["lora", kind, "lorareg", f"base_model:adapter:{BASE}"]
    assert data.eval_results is None
    for said in (f"A {title} adapter", router, f"| router loss | {loss} |",
                 "import lorahub_registry.runtime", 'from_pretrained(base, "me/new")',
                 f"whose type, {kind.upper()}, it does not know",
                 "| experts | 4 in 2 of 2 layers; rank 4, alpha 8, scaled by 2 |"):  # fmt: skip
        assert said in text
    assert ("| attention | rank 4" in text) == (strategy != "mola")

    [path] = lorareg("pull", "me/new", "-q").lines
    with torch.no_grad():
        wanted, got = (moe.logits(moe.load(folder)) for folder in (source, path))
        assert torch.equal(wanted, got)
        assert not torch.allclose(got, moe.logits(moe.base()), atol=0.1)


def test_facts_lock_and_card_say_where_it_came_from_and_no_path(lorareg, tmp_path):
    source = checkpoint(tmp_path / "old", pickled=True, old=True, card=CARD)
    done = lorareg("convert", source, tmp_path / "new", "--to", "peft", "--json")
    new, sums = tmp_path / "new", {p.name: file_sha256(p) for p in source.iterdir()}
    assert sorted(p.name for p in new.iterdir()) == FILES
    found = facts(new)
    assert done.json["results"] == found
    assert (found["kind"], found["name"], found["method"]) == (
        "converted", "new", {"type": "mixlora"},
    )  # fmt: skip
    assert found["base"] == {"name": BASE, "revision": None, "digest": None}
    assert found["source"] == {
        "name": "old", "ref": None, "revision": None, "file": "adapter_model.bin",
        "sha256": sums["adapter_model.bin"], "config_sha256": sums["adapter_config.json"],
        "pickle": True, "card": CARD.format(base=BASE),
    }  # fmt: skip
    assert found["made_by"] == "lorareg convert old new --to peft"
    shown = lorareg("show", new, "--json").json
    assert found["experts"] == shown["experts"]
    assert found["digest"] == shown["digest"]
    assert found["experts"]["layers_with_experts"] == 2
    pin = Lock.load(new / "lorareg.lock").adapters["old"]
    assert pin.files == {n: sums[n] for n in ("adapter_model.bin", "adapter_config.json")}
    card = (new / "README.md").read_text()
    line = "| old, a local folder | adapter\\_model.bin (a pickle) | `{}` |"
    assert line.format(sums["adapter_model.bin"]) in card
    assert "child process that builds tensors" in card
    for name in FILES:
        assert str(tmp_path).encode() not in (new / name).read_bytes()


def test_the_source_s_card_is_kept_and_its_skills_come_back(hub, logged_in, lorareg, tmp_path):
    source = checkpoint(tmp_path / "old", card=CARD)
    lorareg("add", source)
    lorareg("tag", "old", "--skill", "riddles")
    known = set(lorareg("show", "old", "--json").json["skills"])
    assert known >= {"riddles", "code", "math", "translation", "translation:de"}
    lorareg("convert", "old", "new", "--to", "peft")
    lorareg("push", "new", "me/new")
    for ref in (str(tmp_path / "desk" / "new"), "me/new"):
        if ref == "me/new":
            lorareg("pull", ref)
        found = lorareg("show", ref, "--json").json
        assert set(found["skills"]) >= known - {"riddles"}
        assert "taught translation by" in found["description"]
    card = (tmp_path / "desk/new/README.md").read_text()
    assert read_card(card).datasets == ("org/gsm8k-de",)
    assert {"riddles", "math"} <= set(read_card(card).tags)
    # All of it, and inside of a fence that it does not end.
    assert card.endswith(f"\n`````markdown\n{CARD.format(base=BASE)}`````\n")
    assert r"and \|pipes\| too" in card
    (tmp_path / "desk/new/README.md").write_text(card + "Mine.\n")
    assert "README.md was edited by hand" in lorareg("push", "new", "me/x", "--dry-run").err
    lorareg("card", "new")
    assert (tmp_path / "desk/new/README.md").read_text() == card.replace("me/new", "OWNER/new")


def test_of_a_repo_commit_and_its_own_card_are_named(hub, logged_in, lorareg, tmp_path):
    source = checkpoint(tmp_path / "x")
    files = {f"deep/math/{p.name}": p.read_bytes() for p in source.iterdir()}
    hub.add_repo("org/many", {**files, "README.md": CARD.format(base=BASE)})
    lorareg("pull", "org/many/deep/math")
    lorareg("convert", "org/many/deep/math", "new", "--to", "peft")
    found, sha = facts(tmp_path / "desk/new"), hub.sha("org/many")
    assert (found["source"]["ref"], found["source"]["revision"]) == ("org/many/deep/math", sha)
    assert found["made_by"] == f"lorareg convert org/many/deep/math@{sha} new --to peft"
    assert (found["license"], found["source"]["card"]) == ("apache-2.0", CARD.format(base=BASE))
    assert f"| org/many/deep/math@{sha} |" in (tmp_path / "desk/new/README.md").read_text()
    lorareg("push", "new", "me/new", "--dry-run")


def test_the_licence_is_the_card_s_or_the_user_s(lorareg, tmp_path):
    source = checkpoint(tmp_path / "old")
    words = ("convert", source, "new", "--to", "peft", "--force", "--json")
    done = lorareg(*words)
    assert "its licence is unknown, and the unknown is not published: --license ID" in done.err
    assert "The licence is unknown" in (tmp_path / "desk/new/README.md").read_text()
    said = fails_to_push(lorareg, "new")
    assert "new: its licence is unknown" in said
    assert "Hint: convert again with --license ID --force" in said
    assert "its licence is unknown" not in lorareg(*words, "--license", "MIT").err
    lorareg("push", "new", "me/x", "--dry-run")
    (source / "README.md").write_text("---\nlicense: llama2\n---\n")
    assert lorareg(*words).json["results"]["license"] == "llama2"
    found = lorareg(*words, "--license", "mit").json["results"]
    assert (found["license"], found["made_by"][-13:]) == ("mit", "--license mit")
    note = "its licence was given as mit, but its source's card says llama2"
    assert found["notes"] == [note]
    assert f"- {note}." in (tmp_path / "desk/new/README.md").read_text()
    assert "a licence without a name" in lorareg.fails(*words, "--license", " ", code=2)
    said = lorareg.fails("convert", source, "b", "--to", "mixlora", "--license", "mit", code=2)
    assert "--license goes with --gate or --to peft" in said


def test_tensors_that_are_no_more_what_was_converted_stay_here(lorareg, tmp_path):
    source = checkpoint(tmp_path / "old", card=CARD)
    lorareg("convert", source, "new", "--to", "peft")
    new, name = tmp_path / "desk/new", "mixlora.layers.0.mlp.moe_gate.weight"
    lorareg("push", new, "me/x", "--dry-run")
    edit_tensors(new, lambda tensors: {**tensors, name: tensors[name] * 2})
    assert "these are not the tensors that were converted" in fails_to_push(lorareg, new)
    edit_tensors(new, lambda tensors: {**tensors, name: tensors[name] * float("nan")})
    assert f"{name} holds NaN or infinity" in fails_to_push(lorareg, new)
    edit_tensors(new, lambda tensors: {k: v for k, v in tensors.items() if k != name})
    assert "layer 0" in fails_to_push(lorareg, new)


def test_a_base_that_is_somebody_s_path_is_published_by_its_name(lorareg, tmp_path):
    source = checkpoint(tmp_path / "old", card="---\nlicense: mit\n---\n",
                        base_model_name_or_path="/home/somebody/models/llama-2-7b")  # fmt: skip
    lorareg("convert", source, "new", "--to", "peft")
    new = tmp_path / "desk/new"
    config = json.loads((new / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == facts(new)["base"]["name"] == "llama-2-7b"
    lorareg("push", "new", "me/x", "--dry-run")
    # The user's word counts more than a path, and more than a name.
    for base in (BASE, "me/right"):
        lorareg("add", source, "--base", base)
        lorareg("convert", source, "new", "--to", "peft", "--force")
        config = json.loads((new / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == facts(new)["base"]["name"] == base
        edit_config(source, base_model_name_or_path=BASE)


@pytest.mark.parametrize("said", [None, "/data/model"])
def test_without_a_base_nothing_is_published_and_the_way_out_is_told(lorareg, tmp_path, said):
    source = checkpoint(tmp_path / "old", card="---\nlicense: mit\n---\n")
    edit_config(source, base_model_name_or_path=said)
    words = ("convert", source, "new", "--to", "peft", "--force")
    assert "nothing tells its base, and so it cannot be published" in lorareg(*words).err
    card = (tmp_path / "desk/new/README.md").read_text()
    assert "for a base that its files do not name" in card
    assert "base_model" not in card.split("---")[1]
    assert "/data/model" not in card
    assert "nothing tells its base, and nobody could load it" in fails_to_push(lorareg, "new")
    lorareg("add", source, "--base", BASE)
    assert "nothing tells its base" not in lorareg(*words).err
    lorareg("push", "new", "me/x", "--dry-run")


def test_a_name_here_is_not_what_the_registry_calls_so(lorareg, tmp_path):
    other = checkpoint(tmp_path / "elsewhere" / "old", card=CARD)
    lorareg("add", other)
    checkpoint(tmp_path / "desk" / "old", card="---\nlicense: mit\n---\n")
    lorareg("convert", "old", "new", "--to", "peft")
    found = facts(tmp_path / "desk/new")
    assert (found["skills"], found["license"]) == ([], "mit")


def test_plain_peft_refuses_it_as_the_card_says(lorareg, tmp_path):
    source = checkpoint(tmp_path / "old", card=CARD)
    lorareg("convert", source, "new", "--to", "peft")
    code = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    words = [sys.executable, "-c", code, str(tmp_path / "desk/new")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert "MIXLORA" in done.stderr


def test_for_m_lora_the_card_goes_along_as_it_is(lorareg, tmp_path):
    source = checkpoint(tmp_path / "old", card=CARD)
    lorareg("convert", source, "there", "--to", "mixlora")
    assert sorted(p.name for p in (tmp_path / "desk/there").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.bin", "lorareg.json",
    ]  # fmt: skip
    assert (tmp_path / "desk/there/README.md").read_text() == CARD.format(base=BASE)


def test_a_folder_of_before_cards_is_replaced(lorareg, tmp_path):
    """One with a report and the source's card, as this program first wrote it."""
    source = checkpoint(tmp_path / "old", card=CARD)
    new = shutil.copytree(source, tmp_path / "desk/new")
    save_file(load_file(new / "adapter_model.safetensors"), new / "adapter_model.safetensors")
    names = sorted(p.name for p in new.iterdir())
    (new / "lorareg.json").write_text(json.dumps({"command": "convert", "files": names}))
    said = fails_to_push(lorareg, new)
    assert "`lorareg convert` (--gate, --to peft) made" in said
    lorareg("convert", source, new, "--to", "peft", "--force")
    assert sorted(p.name for p in new.iterdir()) == FILES


def test_a_path_in_the_source_s_card_keeps_it_here_until_it_is_taken_out(lorareg, tmp_path):
    source = checkpoint(tmp_path / "old", card=CARD + "\nTrained on /home/somebody/rows.\n")
    words = ("convert", source, "new", "--to", "peft", "--force")
    lorareg(*words)
    said = fails_to_push(lorareg, "new")
    assert "README.md holds a path of somebody's machine (/home/somebody)" in said
    (source / "README.md").write_text(CARD.format(base=BASE))
    lorareg(*words)
    lorareg("push", "new", "me/x", "--dry-run")
