"""``lorareg extract`` as its users meet it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.stream.part import unfinished
from tests.cli.conftest import ROOT
from tests.weights import two


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A model and one that was tuned from it."""
    folder, base = tmp_path_factory.mktemp("cli-pair"), two.model("Llama")
    return two.save(base, folder / "base"), two.save(two.tuned(base), folder / "tuned")


@pytest.fixture
def words(pair, tmp_path):
    """What every call says."""
    return ["extract", "--base", pair[0], "--tuned", pair[1], "--out", tmp_path / "lora"]


def test_a_lora_is_made_told_of_and_indexed(lorareg, words, tmp_path):
    done = lorareg(*words, "--rank", "4")
    assert done.lines[0] == "modules        14, rank 4"
    assert "no factor holds the changes of 1 embedding, 5 norms, 1 head" in done.err
    assert "indexed as lora" in done.err
    assert lorareg("list", "--format", "quiet").lines == ["lora"]
    again = lorareg(*words, "--rank", "8", "--rest", "ignore", "--force", "--json").json
    assert again["report"]["options"]["rank"] == 8
    assert len(again["report"]["modules"]) == 14
    assert lorareg(*words, "--force", "--format", "quiet", "--rest", "ignore").out == "lora\n"


def test_ranks_by_energy_and_size_and_a_picture(lorareg, words, tmp_path):
    lorareg(*words, "--energy", "0.9", "--plot", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    done = lorareg(*words, "--max-size", "50KB", "--force", "--json").json
    size = sum(m["rank"] * sum(m["shape"]) * 4 for m in done["report"]["modules"].values())
    assert 49_000 < size <= 50_000


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--rank", "4", "--energy", "0.5"], 2, "each decide the ranks"),
        (["--rank", "0"], 2, "rank 0 holds nothing"),
        (["--rank", "some"], 2, "neither a number nor full"),
        (["--energy", "1.5"], 2, "1.5 is no share of energy"),
        (["--max-size", "much"], 2, "--max-size much: no size"),
        (["--max-size", "10"], 2, "10 bytes hold no rank"),
        (["--clamp-quantile", "0"], 2, "0 is no quantile"),
        (["--include", "qproj"], 2, "'qproj' matches no linear module"),
        (["--rest", "error"], 1, "no factor holds the changes"),
        (["--plot", "p.jpg"], 2, "figures are PNG files"),
    ],
)
def test_wrong_words_leave_nothing(lorareg, words, tmp_path, more, code, said):
    assert said in lorareg.fails(*words, *more, code=code)
    assert not list(tmp_path.glob("*lora*"))


def test_an_adapter_or_a_folder_that_is_no_model_is_refused(lorareg, words, pair, tmp_path):
    lorareg(*words, "--rank", "4")
    to = ["--out", tmp_path / "other"]
    assert "is an adapter, and a whole model is wanted" in lorareg.fails(
        "extract", "--base", pair[0], "--tuned", tmp_path / "lora", *to
    )
    (tmp_path / "empty").mkdir()
    assert "no config.json there" in lorareg.fails(
        "extract", "--base", tmp_path / "empty", "--tuned", pair[1], *to
    )


def test_only_what_was_written_here_is_replaced(lorareg, words, tmp_path):
    out = tmp_path / "lora"
    lorareg(*words, "--rank", "4")
    before = (out / "adapter_model.safetensors").read_bytes()
    assert "exists and is not empty" in lorareg.fails(*words)
    (out / "thesis.tex").write_text("mine")
    assert "holds thesis.tex, which lorareg has not written" in lorareg.fails(*words, "--force")
    assert (out / "adapter_model.safetensors").read_bytes() == before


def test_a_killed_run_goes_on_to_the_same_bytes(lorareg, tmp_path):
    base = two.model("Llama", hidden_size=128, intermediate_size=344, num_hidden_layers=8)
    folders = two.save(base, tmp_path / "base"), two.save(two.tuned(base), tmp_path / "tuned")
    words = ["extract", "--base", *folders[:1], "--tuned", *folders[1:], "--max-size", "400KB"]

    def files(out):
        return {p.name: p.read_bytes() for p in out.iterdir()}

    whole, broken = tmp_path / "whole" / "lora", tmp_path / "broken" / "lora"
    lorareg(*words, "--out", whole)
    for kept in (20, 70):
        process = subprocess.Popen(
            [sys.executable, "-m", "lorahub_registry", *map(str, words), "--out", str(broken)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        journal = unfinished(broken) / ".journal.jsonl"
        while not (journal.exists() and journal.read_bytes().count(b"\n") > kept):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not broken.exists()
    journaled = journal.read_bytes().count(b"\n")
    done = lorareg(*words, "--out", broken)
    assert "an earlier run was stopped" in done.err
    assert files(broken) == files(whole)
    assert journaled < 56 * 2 + 20, "it was killed before its end"
    assert not list(broken.parent.glob(".*"))


def test_another_question_does_not_go_on_with_the_answer_of_this_one(lorareg, words, tmp_path):
    lorareg(*words, "--rank", "4", "--rest", "ignore")
    left = unfinished(tmp_path / "lora")
    shutil.copytree(tmp_path / "lora", left)
    (left / ".journal.jsonl").write_text(
        '"another"\n["model.layers.0.mlp.up_proj", {"rank": 99}]\n'
    )
    done = lorareg(*words, "--rank", "2", "--rest", "ignore", "--force", "--json")
    assert {m["rank"] for m in done.json["report"]["modules"].values()} == {2}
    assert not left.exists()


def test_ctrl_c_keeps_what_is_done_and_says_so(lorareg, tmp_path):
    base = two.model("Llama", hidden_size=128, intermediate_size=344, num_hidden_layers=8)
    folders = two.save(base, tmp_path / "base"), two.save(two.tuned(base), tmp_path / "tuned")
    out = tmp_path / "lora"
    words = ["extract", "--base", folders[0], "--tuned", folders[1], "--out", out, "--rank", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lorahub_registry", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    journal = unfinished(out) / ".journal.jsonl"
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert "the same command goes on from there" in said
    assert not Path(out).exists()
    assert "are there already" in lorareg(*words).err


def test_resize_gives_another_rank_under_another_name(lorareg, words, tmp_path):
    lorareg(*words, "--rank", "8", "--rest", "ignore")
    lorareg("tag", "lora", "--skill", "stories")
    done = lorareg("resize", "lora", "--rank", "2", "--out", tmp_path / "small")
    assert "stories" in lorareg("show", "small").out
    assert done.lines[0] == "modules        14, rank 2"
    assert "indexed as small" in done.err
    assert lorareg("list", "--format", "quiet").lines == ["lora", "small"]
    assert "wants a rank" in lorareg.fails("resize", "lora", "--out", tmp_path / "no", code=2)
    again = "resize", "lora", "--rank", "2", "--out", tmp_path / "small"
    assert "exists and is not empty" in lorareg.fails(*again)
    assert "14 of 14 modules have no 99 directions" in lorareg(
        "resize", "lora", "--rank", "99", "--out", tmp_path / "same"
    ).err  # fmt: skip
    assert (
        "no adapter"
        in lorareg.fails("resize", "nobody", "--rank", "2", "--out", tmp_path / "no").lower()
    )


def test_a_lora_of_what_dare_leaves(lorareg, pair, tmp_path):
    """The same entries are dropped as where the whole model is written."""
    words = ["dare", "--base", pair[0], "--tuned", pair[1], "--rate", "0.5", "--seed", "3"]
    lorareg(*words, "--out", tmp_path / "thin")
    done = lorareg(*words, "--to-lora", "32", "--out", tmp_path / "lora", "--json").json
    assert done["report"]["command"] == "dare"
    assert done["report"]["options"]["rate"] == 0.5
    found = load_deltas(tmp_path / "lora", read_facts(tmp_path / "lora"))
    base, thin = (load_file(f / "model.safetensors") for f in (pair[0], tmp_path / "thin"))
    assert len(found) == 14
    for name, delta in found.items():
        wanted = thin[f"{name}.weight"] - base[f"{name}.weight"]
        assert 0.3 < float((wanted == 0).float().mean()) < 0.7
        torch.testing.assert_close(delta.dense(), wanted, rtol=0, atol=1e-5)
    assert "is for two models" in lorareg.fails(
        "dare", "--adapter", "lora", "--to-lora", "4", "--out", tmp_path / "no", code=2
    )
