"""A trained adapter on the command line: shown, found, given a card, published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from lorahub_registry.api.papers import enter
from lorahub_registry.registry.store import Registry
from tests import trained
from tests.cli.conftest import Kitchen


@pytest.fixture
def zog(kitchen: Kitchen) -> Path:
    """A trained adapter that the registry knows."""
    folder = trained.adapter(kitchen.tiny, kitchen / "out" / "zog")
    with Registry() as registry:
        enter(folder, trained.results(), trained.FACTORY, "f" * 64, registry)
    return folder


def test_show_tells_how_it_was_made(lorareg, zog):
    said = lorareg("show", "zog").out
    block = said.split("\ntrained\n")[1].split("\nfiles\n")[0]
    assert block == (
        "  by LoRA, 24 steps (3 epochs) of 16 rows, learning rate 0.0002, dropout 0, seed 7: "
        "beats the base by 1.88 ± 0.01 nats per output token\n"
        "  train       zog.jsonl: 128 rows, 9,000 tokens (5,000 in outputs)\n"
        "  validation  zog.jsonl: 16 rows, 9,000 tokens (5,000 in outputs)\n"
        "  test        zog-test.jsonl: 200 rows, 9,000 tokens (5,000 in outputs)\n"
        "  loss        2.7500 (step 1) to 0.5000 (step 24)\n"
        "  validation  1.6250 (step 10) to 0.7500 (step 20)"
    )
    for line in (
        "base        tiny-llama",
        "about       Every name becomes Zog.",
        "  names  (user: factory.yaml)",
        "  zog-test nll 0.625 ± 0.01  (measured, n=200)",
        "  zog-test, base nll 2.5 ± 0.01  (measured, n=200)",
    ):
        assert line in said.splitlines()
    assert "made of" not in said
    assert "mixture" not in said


def test_what_was_changed_since_is_not_published(lorareg, zog):
    path = zog / "results.json"
    facts = json.loads(path.read_text("utf-8"))
    lorareg("push", "zog", "me/zog", "--dry-run")  # of before there were digests
    path.write_text(json.dumps({**facts, "digest": "0" * 64}), "utf-8")
    said = lorareg.fails("push", "zog", "me/zog", "--dry-run")
    assert "adapter_model.safetensors: these are not the tensors that were trained" in said
    assert "Hint: train again with --force" in said


def test_show_as_json_has_the_same_facts(lorareg, zog):
    shown = lorareg("show", "zog", "--json").json
    assert shown["mixture"] is None
    found, told = shown["trained"], trained.results()
    for key in ("lora", "training", "data", "tokens", "steps", "epochs", "stopped", "together"):
        assert found[key] == told[key]
    assert (found["method"], found["seed"]) == ("LoRA", 7)
    assert found["verdict"] == told["verdict"]["text"]
    assert found["loss"] == {"first": [1, 2.75], "last": [24, 0.5]}
    assert shown["description"] == told["description"]


def test_show_tells_of_stopping_and_of_the_step_that_was_kept(lorareg, kitchen):
    told = {"stopped": "early: no gain over 3 evaluations", "best_step": 20, "loss": [[1, None]],
            "validation_loss": []}  # fmt: skip
    folder = trained.adapter(kitchen.tiny, kitchen / "zog", **told)
    with Registry() as registry:
        enter(folder, trained.results(**told), trained.FACTORY, "f" * 64, registry)
    lines = lorareg("show", "zog").lines
    assert "  stopped early: no gain over 3 evaluations" in lines
    assert "  the weights are those of step 20" in lines
    assert "  loss        not finite (step 1) to not finite (step 1)" in lines
    assert lorareg("show", "zog", "--json").json["trained"]["validation_loss"] is None


def test_without_its_files_the_registry_s_own_facts_are_shown(lorareg, zog):
    (zog / "results.json").write_text("{")
    said = lorareg("show", "zog").out
    assert "  by LoRA, seed 7: beats the base by 1.88" in said
    assert f"{zog / 'results.json'}: cannot be read" in said
    assert "cannot be read" in lorareg("show", "zog", "--json").json["trained"]["problem"]
    shutil.rmtree(zog)
    said = lorareg("show", "zog").out
    assert "  by LoRA, seed 7: beats the base by 1.88" in said
    assert "cannot be read" not in said


def test_what_was_not_trained_here_has_no_such_facts(lorareg, kitchen):
    lorareg("add", "loras")
    assert lorareg("show", "plain", "--json").json["trained"] is None
    lorareg("compose", kitchen.recipe())
    assert lorareg("show", "blend", "--json").json["trained"] is None
    assert "\ntrained\n" not in lorareg("show", "blend").out


def test_list_and_search_find_it(lorareg, zog):
    assert lorareg("list", "-q").lines == ["zog"]
    assert lorareg("search", "--skill", "names", "--base", "tiny-llama", "-q").lines == ["zog"]
    assert lorareg("search", "--min-score", "zog-test/exact_match=0.8", "-q").lines == ["zog"]
    assert lorareg("search", "--skill", "code", "-q").lines == []


def test_indexed_again_it_keeps_what_was_said_and_measured(lorareg, zog):
    before = lorareg("show", "zog", "--json").json
    lorareg("add", zog)
    after = lorareg("show", "zog", "--json").json
    for key in ("scores", "trained", "skills", "base", "base_how", "digest"):
        if key == "scores":
            measured = [s for s in after["scores"] if s["source"] == "measured"]
            assert measured == before["scores"]
        elif key == "skills":
            assert set(before["skills"]) <= set(after["skills"])
        else:
            assert after[key] == before[key]
    assert after["description"].startswith(before["description"])


def test_its_card_is_written_again(lorareg, zog):
    first = (zog / "README.md").read_bytes()
    (zog / "README.md").write_text("spoiled")
    assert lorareg("card", "zog").out == f"{zog / 'README.md'}\n"
    assert (zog / "README.md").read_bytes() == first
    (zog / "factory.yaml").unlink()
    assert f"Error: {zog / 'factory.yaml'}: cannot be read" in lorareg.fails("card", zog)


def test_push_sends_all_of_it_in_one_commit(hub, logged_in, lorareg, zog, monkeypatch):
    (zog / "notes.txt").write_text("mine")
    done = lorareg("push", "zog", "me/zog")
    assert "not published: notes.txt" in done.err
    assert "Warning: its base, tiny-llama, is a folder of yours" in done.err
    assert "8 files in one commit" in done.err
    files = hub.files("me/zog")
    assert sorted(set(files) - {".gitattributes"}) == trained.FILES
    for name in trained.FILES:
        assert files[name] == (zog / name).read_bytes()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # the validator asks the Hub
    card = ModelCard(files["README.md"].decode())
    card.validate()
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["org/stories"]
    assert {"names", "translation:zog", "base_model:adapter:tiny-llama"} <= set(card.data.tags)
    found = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert found == {"nll": 0.625, "exact_match": 0.875}
    assert 'PeftModel.from_pretrained(base, "me/zog")' in card.text
    assert "has all of it already" in lorareg("push", zog, "me/zog").err


def test_pulled_it_brings_its_papers(hub, logged_in, lorareg, zog):
    lorareg("push", "zog", "me/zog")
    [path] = lorareg("pull", "me/zog", "-q").lines
    there = {p.name for p in Path(path).iterdir()}
    assert there >= set(trained.FILES) - {"loss.png"}
    ours, theirs = (lorareg("show", ref, "--json").json for ref in (zog, "me/zog"))
    assert ours["digest"] == theirs["digest"]


@pytest.mark.parametrize("what", ["path", "token", "licence"])
def test_what_may_not_be_published_is_not(what, hub, logged_in, lorareg, zog):
    results = json.loads((zog / "results.json").read_text())
    if what == "path":
        results["notes"] = [f"read from {zog.parent}/zog.jsonl"]
    elif what == "token":
        (zog / "training.jsonl").write_text(json.dumps({"note": logged_in}) + "\n")
    else:
        results["license"] = None
    (zog / "results.json").write_text(json.dumps(results))
    said = lorareg.fails("push", "zog", "me/zog")
    expected = {
        "path": "the path of",
        "token": "training.jsonl holds an access token",
        "licence": "say it in the factory (license: …), and train again with --force",
    }
    assert expected[what] in said
    assert "me/zog" not in hub.store.repos


def test_an_edited_card_is_published_as_it_is(hub, logged_in, lorareg, zog):
    text = (zog / "README.md").read_text().replace("# zog", "# My zog\n\nWith love.")
    (zog / "README.md").write_text(text)
    assert "README.md was edited by hand" in lorareg("push", zog, "me/zog").err
    assert hub.files("me/zog")["README.md"].decode() == text
