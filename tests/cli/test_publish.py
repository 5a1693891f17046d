"""Publish: from a recipe, by ``push``, and what never leaves this machine."""

import json
import socket

import pytest
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

from lorahub_registry.adapters.tensors import read_header

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "lorareg.lock",
         "recipe.yaml", "results.json", "trace.png"]  # fmt: skip
PUBLISH = {"repo": "me/blend", "private": True, "license": "apache-2.0"}


def _composed(lorareg, kitchen, **options):
    lorareg("compose", kitchen.recipe(**options))
    return kitchen.out


def test_a_recipe_that_says_so_is_published_in_one_commit(hub, logged_in, lorareg, kitchen):
    done = lorareg("compose", kitchen.recipe(publish=PUBLISH))
    assert f"✓ written to {kitchen.out}, published at {hub.url}/me/blend" in done.err
    files = hub.files("me/blend")
    assert sorted(set(files) - {".gitattributes"}) == FILES
    first, *rest = hub.commits("me/blend")
    assert first.title == "Publish blend with lorareg"
    assert not any(set(FILES) & set(commit.files) for commit in rest)
    assert hub.repo("me/blend").private
    for name in FILES:
        assert files[name] == (kitchen.out / name).read_bytes()


def test_the_published_card_has_metadata_that_the_hub_takes(
    hub, logged_in, lorareg, kitchen, monkeypatch
):
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # the validator asks the Hub
    lorareg("compose", kitchen.recipe(publish=PUBLISH, evaluate=["nll", "exact_match"]))
    card = ModelCard(hub.files("me/blend")["README.md"].decode())
    card.validate()
    data = card.data
    assert (data.base_model, data.library_name) == ("tiny-llama", "peft")
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "text-generation"
    assert {"lora", "lorareg", "base_model:adapter:tiny-llama"} <= set(data.tags)
    found = {r.metric_type: r.metric_value for r in data.eval_results}
    row = kitchen.results()["test"][-1]
    assert found == {
        "nll": round(row["nll"], 6), "exact_match": round(row["exact_match"], 6),
    }  # fmt: skip
    assert 'PeftModel.from_pretrained(base, "me/blend")' in card.text


def test_nothing_published_tells_whose_machine_or_token_it_was(hub, logged_in, lorareg, kitchen):
    recipe = kitchen.recipe(
        publish=PUBLISH,
        base=str(kitchen / "tiny-llama"),
        adapters=[str(kitchen / "loras/plain"), str(kitchen / "loras/wide")],
        data={
            "train": {"path": str(kitchen / "train.jsonl")},
            "test": {"path": str(kitchen / "test.jsonl")},
        },
        output={"path": str(kitchen.out)},
    )
    lorareg("compose", recipe)
    secrets = [logged_in, str(kitchen.folder), str(kitchen.tiny.folder.parent), "/tmp/", "/home/"]
    if len(socket.gethostname()) > 7:
        secrets.append(socket.gethostname())
    files = hub.files("me/blend")
    for name in FILES:
        for secret in secrets:
            assert secret.encode() not in files[name], f"{secret} is in {name}"
    assert read_header(kitchen.out / "adapter_model.safetensors").metadata == {"format": "pt"}


def test_no_push_does_not_publish(hub, logged_in, lorareg, kitchen):
    done = lorareg("compose", kitchen.recipe(publish=PUBLISH), "--no-push", "--json")
    assert done.json["url"] is None
    assert hub.requests == []
    assert 'from_pretrained(base, "me/blend")' in (kitchen.out / "README.md").read_text()


def test_a_push_that_fails_keeps_the_mixture(hub, logged_in, lorareg, kitchen, waits):
    hub.fail("*/commit/*", status=403, message="you may not", times=None)
    done = lorareg("compose", kitchen.recipe(publish=PUBLISH), code=1)
    assert f"Warning: the mixture is whole in {kitchen.out}; only the push failed" in done.err
    assert "Error: me/blend: not allowed: you may not" in done.err
    assert sorted(p.name for p in kitchen.out.iterdir()) == FILES
    assert lorareg("show", "blend", "--json").json["path"] == str(kitchen.out)
    hub.heal()
    lorareg("push", "blend", "me/blend")
    assert hub.files("me/blend")["results.json"] == (kitchen.out / "results.json").read_bytes()


def test_nobody_logged_in_is_told_how_to(hub, lorareg, kitchen):
    done = lorareg("compose", kitchen.recipe(publish=PUBLISH), code=1)
    assert "me/blend: pushing needs an account, and nobody is logged in" in done.err
    assert "Hint: hf auth login" in done.err
    assert kitchen.out.is_dir()


def test_without_a_licence_nothing_is_published_and_nothing_is_run(lorareg, kitchen):
    said = lorareg.fails("compose", kitchen.recipe(publish={"repo": "me/blend"}, license=None))
    assert "the adapters do not agree on a licence (plain: unknown, wide: unknown)" in said
    assert "say the mixture's own in the recipe: publish: {license: …}" in said
    assert not kitchen.out.exists()


def test_push_sends_a_mixture_by_name(hub, logged_in, lorareg, kitchen):
    folder = _composed(lorareg, kitchen)
    done = lorareg("push", "blend", "me/mine", "--private", "-m", "Here it is", "--json")
    assert done.json["url"] == f"{hub.url}/me/mine"
    assert done.json["commit"] == hub.sha("me/mine")
    assert done.json["changed"] is True
    assert [f["name"] for f in done.json["files"]] == FILES
    assert hub.repo("me/mine").private
    assert hub.commits("me/mine")[0].title == "Here it is"
    assert 'from_pretrained(base, "me/mine")' in (folder / "README.md").read_text()


def test_pushing_the_same_again_changes_nothing(hub, logged_in, lorareg, kitchen):
    folder = _composed(lorareg, kitchen)
    first = lorareg("push", folder, "me/mine")
    assert first.out == f"{hub.url}/me/mine\n"
    assert "✓ 7 files in one commit" in first.err
    head = hub.sha("me/mine")
    again = lorareg("push", folder, "me/mine")
    assert "✓ the Hub has all of it already" in again.err
    assert hub.sha("me/mine") == head


def test_a_pull_request_leaves_main_alone(hub, logged_in, lorareg, kitchen):
    hub.add_repo("me/mine", {"README.md": "---\nlicense: mit\n---\n"})
    head = hub.sha("me/mine")
    folder = _composed(lorareg, kitchen)
    done = lorareg("push", folder, "me/mine", "--create-pr", "-q")
    assert done.out == f"{hub.url}/me/mine/discussions/1\n"
    assert hub.sha("me/mine") == head
    assert sorted(set(hub.files("me/mine", "refs/pr/1")) - {".gitattributes"}) == FILES


def test_a_card_that_somebody_wrote_is_published_as_it_is(hub, logged_in, lorareg, kitchen):
    folder = _composed(lorareg, kitchen)
    text = (folder / "README.md").read_text().replace("# blend", "# My blend\n\nWith love.")
    (folder / "README.md").write_text(text)
    done = lorareg("push", folder, "me/mine")
    assert "README.md was edited by hand: it is published as it is" in done.err
    assert hub.files("me/mine")["README.md"].decode() == text


def test_a_base_that_only_the_user_has_is_warned_of(lorareg, kitchen):
    _composed(lorareg, kitchen)
    said = lorareg("push", "blend", "me/mine", "--dry-run").err
    assert "Warning: its base, tiny-llama, is a folder of yours" in said


def test_a_dry_run_lists_the_files_and_asks_nobody(hub, lorareg, kitchen):
    folder = _composed(lorareg, kitchen)
    (folder / "notes.txt").write_text("mine")
    card = (folder / "README.md").read_bytes()
    done = lorareg("push", "blend", "me/mine", "--dry-run", "-q")
    assert done.lines == FILES
    said = lorareg("push", "blend", "me/mine", "--dry-run").err
    assert "not published: notes.txt" in said
    assert "these would go to me/mine; nothing was sent" in said
    assert hub.requests == []
    assert (folder / "README.md").read_bytes() == card


def test_a_token_in_a_file_stops_a_push(hub, logged_in, lorareg, kitchen):
    folder = _composed(lorareg, kitchen)
    results = json.loads((folder / "results.json").read_text())
    results["notes"].append(f"made with {logged_in}")
    (folder / "results.json").write_text(json.dumps(results))
    said = lorareg.fails("push", folder, "me/mine")
    assert "holds an access token; nothing was published" in said
    assert logged_in not in said
    assert "me/mine" not in hub.store.repos


def test_a_mixture_of_unknown_licence_is_not_pushed(lorareg, kitchen):
    done = lorareg("compose", kitchen.recipe(license=None))
    # Before anything is computed that would have to be computed again.
    assert done.err.startswith("Warning: its licence is unknown, so it cannot be pushed; license:")
    said = lorareg.fails("push", "blend", "me/mine", "--dry-run")
    assert "blend: its licence is unknown, and the unknown is not published" in said
    assert "license: …" in said


def test_adapters_that_agree_give_the_mixture_their_licence(lorareg, kitchen):
    for name in ("plain", "wide"):
        (kitchen / "loras" / name / "README.md").write_text("---\nlicense: MIT\n---\n")
    lorareg("compose", kitchen.recipe(license=None))
    assert kitchen.results()["license"] == "mit"
    assert ModelCard.load(kitchen.out / "README.md").data.license == "mit"


def test_what_is_no_mixture_is_not_pushed(lorareg, kitchen):
    said = lorareg.fails("push", "loras/plain", "me/mine")
    assert "holds no results.json, so it is nothing that lorareg mixed or trained" in said


@pytest.mark.parametrize("repo", ["mine", "me/a/b", "me/a@main", "../me"])
def test_what_is_no_repo_s_name_is_refused(repo, lorareg, kitchen):
    _composed(lorareg, kitchen)
    said = lorareg.fails("push", "blend", repo, "--dry-run", code=2)
    assert repr(repo) in said


def test_a_pulled_mixture_is_the_one_that_was_pushed(hub, logged_in, lorareg, kitchen):
    folder = _composed(lorareg, kitchen)
    lorareg("push", "blend", "me/mine")
    [path] = lorareg("pull", "me/mine", "-q").lines
    ours = load_file(folder / "adapter_model.safetensors")
    theirs = load_file(f"{path}/adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)
    by_digest = {a["digest"] for ref in ("blend", "me/mine")
                 for a in [lorareg("show", ref, "--json").json]}  # fmt: skip
    assert len(by_digest) == 1


def test_card_writes_the_same_card_again(lorareg, kitchen):
    folder = _composed(lorareg, kitchen)
    first = (folder / "README.md").read_bytes()
    (folder / "README.md").write_text("spoiled")
    assert lorareg("card", "blend").out == f"{folder / 'README.md'}\n"
    assert (folder / "README.md").read_bytes() == first
    lorareg("card", folder, "--repo", "me/other")
    assert 'from_pretrained(base, "me/other")' in (folder / "README.md").read_text()


def test_card_of_what_is_no_mixture_says_so(lorareg, kitchen):
    said = lorareg.fails("card", "loras/plain")
    assert "holds no results.json, so it is nothing that lorareg mixed or trained" in said
    assert "cards are written for what `lorareg compose`, `lorareg train` or" in said


def test_card_of_half_a_mixture_names_what_is_missing(lorareg, kitchen):
    folder = _composed(lorareg, kitchen)
    (folder / "recipe.yaml").unlink()
    assert f"Error: {folder / 'recipe.yaml'}: cannot be read" in lorareg.fails("card", folder)
