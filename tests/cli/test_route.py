"""Which adapters a prompt is for: learned from rows, asked without any adapter's files."""

from __future__ import annotations

import json
import shutil

import pytest

from lorahub_registry.registry.index import record_of_folder
from lorahub_registry.registry.records import MemberRecord, MixtureRecord
from lorahub_registry.registry.store import Registry
from tests import tiny
from tests.cli.conftest import edit_config, write_rows


@pytest.fixture
def shelf(lorareg, kitchen):
    """Two adapters, one for the letters a to e, one for v to z; and a third."""
    kitchen.lora("same")
    for kind in ("plain", "wide", "same"):
        edit_config(kitchen / "loras" / kind, base_model_name_or_path="tiny-llama")
    lorareg("add", "loras", "--base", "tiny-llama")
    for name, letters in (("low", "abcde"), ("high", "vwxyz")):
        write_rows(kitchen / f"{name}.jsonl", tiny.rows(20, letters=letters))
    return kitchen


@pytest.fixture
def learned(lorareg, shelf):
    """The first two know what they are for."""
    for name, rows in (("plain", "low"), ("wide", "high")):
        lorareg("route", "--learn", name, "--rows", f"{rows}.jsonl", "--base", "./tiny-llama")
    return shelf


def names(done):
    return [row["name"] for row in done.json]


def test_a_prompt_goes_to_the_adapter_whose_rows_are_like_it(lorareg, learned):
    for prompt, wanted in (("ab ac ea", ["plain", "wide"]), ("zy vw xx", ["wide", "plain"])):
        done = lorareg("route", prompt, "--base", "./tiny-llama", "--json")
        assert names(done) == wanted
        first, second = done.json
        assert first["probability"] + second["probability"] == pytest.approx(1, abs=1e-6)
        assert first["probability"] > 0.9
        assert first["similarity"] > second["similarity"]
        assert "1 more of tiny-llama have no centroid and take no part: same" in done.err
        assert f"--learn {learned / 'loras' / 'same'} --rows" in done.err


def test_none_of_their_files_is_needed(lorareg, learned):
    shutil.rmtree(learned / "loras")
    done = lorareg("route", "ab", "--base", "./tiny-llama", "--top-k", "1", "--json")
    assert [(row["name"], row["probability"]) for row in done.json] == [("plain", 1.0)]


def test_the_three_formats(lorareg, learned):
    words = ("route", "ab ac", "--base", "./tiny-llama")
    human = lorareg(*words).lines
    assert human[0].split() == ["NAME", "PROBABILITY", "SIMILARITY", "DISTANCE", "SKILLS", "REF"]
    assert human[1].split()[0] == "plain"
    quiet = lorareg(*words, "--quiet")
    assert quiet.lines == [str(learned / "loras" / "plain"), str(learned / "loras" / "wide")]
    assert quiet.err == ""
    assert set(lorareg(*words, "--json").json[0]) == {
        "name", "ref", "probability", "similarity", "distance", "skills"
    }  # fmt: skip


def test_a_prompt_that_may_be_for_nobody_is_told(lorareg, learned):
    words = ("route", "--base", "./tiny-llama", "--json")
    near = lorareg(*words, "ab ac ea")
    assert "none of them" not in near.err
    first, second = near.json
    assert first["distance"] < 2 < second["distance"]
    far = lorareg("route", "--base", "./tiny-llama", "?!?!?!", "-q")
    assert "the prompt may be for none of them: it lies" in far.err
    assert "as that adapter's own rows do on average" in far.err
    # By one's own rows, on average, it is 1.
    rows = [json.loads(line)["input"] for line in (learned / "low.jsonl").read_text().splitlines()]
    own = [lorareg(*words, row).json for row in rows]
    each = [r["distance"] for one in own for r in one if r["name"] == "plain"]
    assert sum(each) / len(each) == pytest.approx(1, abs=1e-3)
    # One row lies where it lies: nothing is known of how far others may.
    write_rows(learned / "one.jsonl", tiny.rows(1, letters="abc"))
    lorareg("route", "--learn", "plain", "--rows", "one.jsonl", "--base", "./tiny-llama")
    again = {row["name"]: row["distance"] for row in lorareg(*words, "?!?!?!").json}
    assert again["plain"] is None
    assert again["wide"] > 0


def test_of_one_that_was_trained_again_the_newest_takes_part(lorareg, learned):
    again = shutil.copytree(learned / "loras/plain", learned / "later/plain")
    with Registry() as registry:
        for folder in (learned / "loras/plain", again):
            made = MixtureRecord("plain", "train LoRA", f"# {folder}", str(folder), 0, "", ())
            registry.add_mixture(record_of_folder(folder, name="plain"), made)
    lorareg("route", "--learn", again, "--rows", "low.jsonl", "--base", "./tiny-llama")
    done = lorareg("route", "ab ac ea", "--base", "./tiny-llama", "--json")
    assert [row["ref"] for row in done.json] == [str(again), str(learned / "loras/wide")]
    assert done.json[0]["probability"] > 0.9, "and not half of it"
    old = learned / "loras/plain"
    assert f"plain was trained again: {again} takes part, the older {old} does not" in done.err
    assert "1 more of tiny-llama have no centroid and take no part: same" in done.err
    lorareg("remove", old)
    done = lorareg("route", "ab ac ea", "--base", "./tiny-llama", "--json")
    assert (len(done.json), "trained again" in done.err) == (2, False)
    # Two of one name that were not trained here are two.
    other = shutil.copytree(learned / "loras/wide", learned / "other/wide")
    lorareg("add", other, "--base", "tiny-llama")
    lorareg("route", "--learn", other, "--rows", "high.jsonl", "--base", "./tiny-llama")
    done = lorareg("route", "zy vw xx", "--base", "./tiny-llama", "--json")
    assert [row["name"] for row in done.json] == ["wide", "wide", "plain"]
    assert done.json[0]["ref"] != done.json[1]["ref"]


def test_temperature_and_skill(lorareg, learned):
    words = ("route", "ab ac", "--base", "./tiny-llama", "--json")
    sharp, flat = (lorareg(*words, "--temperature", t).json[0] for t in ("0.05", "50"))
    assert flat["probability"] < 0.6 < sharp["probability"]
    assert flat["similarity"] == sharp["similarity"]
    lorareg("tag", "wide", "--skill", "code")
    found = lorareg(*words, "--skill", "Code")
    assert [(row["name"], row["skills"]) for row in found.json] == [("wide", ["code"])]
    assert "no centroid" not in found.err
    err = lorareg.fails(*words, "--skill", "chat")
    assert "no adapter of tiny-llama with the skill 'chat'" in err


def test_what_was_learned_is_told_and_learning_again_replaces_it(lorareg, learned):
    words = ("route", "--learn", "plain", "--base", "./tiny-llama", "--rows")
    told = lorareg(*words, "high.jsonl", "--json").json
    assert told["name"] == "plain"
    assert told["centroid"]["rows"] == 20
    assert told["centroid"]["layer"] == 1
    assert told["centroid"]["base"] == "tiny-llama"
    assert lorareg(*words, "low.jsonl").lines == ["plain: 20 rows, hidden state 1 of tiny-llama"]
    assert lorareg(*words, "low.jsonl", "-q").lines == ["plain"]
    done = lorareg("route", "ab ac", "--base", "./tiny-llama", "--json")
    assert names(done) == ["plain", "wide"]


def test_columns_and_template_are_a_recipe_s(lorareg, learned):
    rows = [{"question": f"{a}{b}", "query": "x"} for a in "klm" for b in "nop"]
    (learned / "sql.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    words = ("route", "--learn", "same", "--rows", "sql.jsonl", "--base", "./tiny-llama")
    assert "there is no column 'input'" in lorareg.fails(*words)
    words += ("--input", "question", "--output", "query")
    assert "--output" not in lorareg(*words, "--template", "Q: {{ input }}\nA: ").err
    done = lorareg("route", "ko mn", "--base", "./tiny-llama", "--json")
    # It was put into the template for this one, and into the usual one for the others.
    assert names(done)[0] == "same"
    # A prompt has no such column, so this one cannot be asked.
    lorareg(*words, "--template", "{{ question }} ")
    done = lorareg("route", "ko mn", "--base", "./tiny-llama", "--json")
    assert names(done) == ["plain", "wide"] or names(done) == ["wide", "plain"]
    assert "same is left out: the prompt: data.template cannot be filled" in done.err


def test_a_removed_adapter_is_no_longer_asked(lorareg, learned):
    lorareg("remove", "plain")
    assert names(lorareg("route", "ab", "--base", "./tiny-llama", "--json")) == ["wide"]


def test_other_weights_of_the_same_name_are_another_space(lorareg, learned, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    other = tmp_path / "elsewhere" / "tiny-llama"
    shutil.copytree(learned / "tiny-llama", other)
    tensors = load_file(other / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + torch.ones_like(tensors[name])
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    err = lorareg.fails("route", "ab", "--base", other)
    assert "none of the 3 adapters of tiny-llama has a centroid on it; 2 on other weights" in err
    assert "lorareg route --learn" in err


def test_nobody_to_ask(lorareg, kitchen, shelf):
    err = lorareg.fails("route", "ab", "--base", "./tiny-llama")
    assert "none of the 3 adapters of tiny-llama has a centroid" in err
    assert "Hint: lorareg route --learn" in err
    for name in ("plain", "wide", "same"):
        lorareg("remove", name)
    err = lorareg.fails("route", "ab", "--base", "./tiny-llama")
    assert "the registry has no adapter of tiny-llama" in err
    assert "Hint: lorareg add FOLDER --base tiny-llama" in err


def mixtures(kitchen, count):
    """So many mixtures of plain and wide, more used than any adapter."""
    with Registry() as registry:
        for i in range(count):
            folder = shutil.copytree(kitchen / "loras/plain", kitchen / f"out/mix{i}")
            made = MixtureRecord(
                f"mix{i}", "linear", f"# {i}", f"{i}", 0, "",
                tuple(MemberRecord(name, name, 0.5) for name in ("plain", "wide")),
            )  # fmt: skip
            registry.add_mixture(record_of_folder(folder, name=f"mix{i}"), made)


def test_mixtures_hide_no_adapter(lorareg, learned):
    mixtures(learned, 6)
    done = lorareg("route", "ab", "--base", "./tiny-llama", "--json")
    assert "1 more of tiny-llama have no centroid and take no part: same;" in done.err
    for name in ("plain", "wide"):
        lorareg("remove", name)
    err = lorareg.fails("route", "ab", "--base", "./tiny-llama")
    assert "none of the 1 adapters of tiny-llama has a centroid on it" in err
    assert f"--learn {learned / 'loras' / 'same'}" in err


def test_mixtures_alone_are_told_as_such(lorareg, shelf):
    mixtures(shelf, 1)
    for name in ("plain", "wide", "same"):
        lorareg("remove", name)
    err = lorareg.fails("route", "ab", "--base", "./tiny-llama")
    assert "tiny-llama has mixtures only, and they are made of what prompts are sent to" in err
    assert "Hint: add or train adapters of it" in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "there is no prompt"),
        (["ab"], 2, "--base is missing"),
        (["  ", "--base", "./tiny-llama"], 2, "the prompt is empty"),
        (["ab", "--base", "./nowhere"], 1, "nowhere"),
        (["ab", "--base", "./tiny-llama", "--rows", "low.jsonl"], 2, "--rows goes with --learn"),
        (["--learn", "plain"], 2, "--learn needs --rows"),
        (["ab", "--learn", "plain", "--rows", "low.jsonl"], 2, "--learn takes no PROMPT"),
        (["--learn", "plain", "--rows", "low.jsonl", "--top-k", "2"], 2, "--top-k does not go"),
        (["--learn", "nobody", "--rows", "low.jsonl"], 1, "nobody"),
        (["--learn", "plain", "--rows", "gone.jsonl"], 1, "gone.jsonl: no such file"),
        (["--learn", "plain", "--rows", "low.txt"], 2, "must end in one of .jsonl"),
        (["--learn", "plain", "--rows", "bad.jsonl"], 1, "bad.jsonl, line 1: not JSON"),
        (["--learn", "plain", "--rows", "low.jsonl", "--template", "{{ x"], 2, "template: "),
        (["--learn", "plain", "--rows", "low.jsonl", "--template", "{{ x }}"], 1, "column 'x'"),
        (["--learn", "plain", "--rows", "low.jsonl", "--output", "input"], 2, "same column"),
        (["ab", "--base", "./tiny-llama", "--temperature", "0"], 2, "temperature"),
    ],
)
def test_wrong_calls_are_told(lorareg, shelf, words, code, said):
    (shelf / "bad.jsonl").write_text("no json\n", "utf-8")
    assert said in lorareg.fails("route", *words, code=code)


def test_a_prompt_longer_than_the_base_takes_is_cut_and_told(lorareg, learned):
    done = lorareg("route", "ab " * 200, "--base", "./tiny-llama", "--json")
    assert "the prompt is longer than tiny-llama takes" in done.err
    assert names(done)[0] == "plain"
