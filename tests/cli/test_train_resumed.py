"""A training run that was stopped goes on to the same bytes, or says why it cannot."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from random import Random

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from lorahub_registry.cli import cli
from lorahub_registry.errors import DataError
from lorahub_registry.evaluate import measure
from lorahub_registry.train.checkpoint import NAME
from lorahub_registry.train.learner import Learner
from lorahub_registry.train.passes import Passes
from tests import tiny
from tests.cli.conftest import ROOT, child, write_rows
from tests.cli.factories import LORA, Workshop, open_workshop, shop  # noqa: F401

TWO = (
    {"name": "zog", "lora": LORA | {"lora_dropout": 0.2}, "data": {"validation": 0.25},
     "training": {"max_steps": 20, "eval_steps": 2}},
    {"name": "two", "lora": {"use_dora": True, "loraplus_lr_ratio": 4},
     "training": {"max_steps": 14}},
)  # fmt: skip


def start(*words: object):
    """``lorareg train …`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lorahub_registry", "train", "factory.yaml", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # Where the tests themselves run in the background, a child would ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def kept(shop: Workshop):  # noqa: F811
    """The checkpoint of a run that was stopped."""
    return shop.part / ".checkpoint" / NAME


def all_of(shop: Workshop):  # noqa: F811
    """What of a shelf does not tell the time: tensors, configs, logs, curves."""
    return {
        path.relative_to(shop.out).as_posix(): path.read_bytes()
        for path in shop.out.rglob("*")
        if path.suffix in {".safetensors", ".jsonl", ".png"} or path.name == "adapter_config.json"
    }


def facts(shop: Workshop, name: str = "zog"):  # noqa: F811
    """An adapter's results but for how long it took, and the company it was in at its end."""
    return {k: v for k, v in shop.results(name).items() if k not in {"seconds", "together"}}


@pytest.fixture(scope="module")
def unbroken(tiny_llama, tmp_path_factory):
    """``TWO`` without an interruption: (files, results of each)."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("unbroken")
        patch.setenv("LORAREG_HOME", str(folder / "home"))
        workshop = open_workshop(tiny_llama, folder / "desk")
        done = CliRunner().invoke(cli, ["train", str(workshop.factory(*TWO)), "-q"])
        assert done.exit_code == 0, done.output
    return all_of(workshop), [facts(workshop, plan["name"]) for plan in TWO]


@pytest.fixture
def pressed(lorareg, monkeypatch):
    """Ctrl-C when a function is called for the ``at``-th time; what ``train`` then says."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(at, *words, where=(Passes, "gradients")):
        through, calls = getattr(*where), []

        def counted(*args, **options):
            calls.append(args)
            if len(calls) == at:
                signal.raise_signal(signal.SIGINT)
            return through(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(*where, counted)
            return lorareg.fails("train", "factory.yaml", *words, code=130)

    yield run
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [1, "any", 20])
def test_after_ctrl_c_the_same_command_goes_on_to_the_same_bytes(
    at,
    lorareg,
    shop,  # noqa: F811
    pressed,
    unbroken,
):
    at = Random().randint(2, 19) if at == "any" else at
    shop.factory(*TWO, save_steps=3)
    said = pressed(at)
    assert "Error: interrupted\n" in said
    assert f"in {shop.part.name}: the same command goes on from there" in said
    assert not shop.out.exists()
    assert lorareg("list", "-q").lines == []
    done = lorareg("train", "factory.yaml")
    if at > 1:
        assert f"going on after round {at - 1}" in done.err
    assert not shop.part.exists()
    assert all_of(shop) == unbroken[0], f"stopped in round {at}"
    assert [facts(shop, plan["name"]) for plan in TWO] == unbroken[1], f"stopped in round {at}"
    assert lorareg("list", "-q").lines == ["two", "zog"]
    assert sorted(p.name for p in shop.out.iterdir()) == ["lorareg.json", "two", "zog"]


def test_ctrl_c_while_it_is_scored_loses_no_training(
    lorareg,
    shop,  # noqa: F811
    pressed,
    unbroken,
    monkeypatch,
):
    shop.factory(*TWO)
    pressed(3, where=(measure, "measure"))
    assert not shop.out.exists()

    def refuse(*_, **__):
        raise AssertionError("it is trained again")

    monkeypatch.setattr(Passes, "gradients", refuse)
    lorareg("train", "factory.yaml")
    assert all_of(shop) == unbroken[0]


def test_ctrl_c_in_the_middle_of_a_step_loses_no_line_of_the_log(
    lorareg,
    shop,  # noqa: F811
    pressed,
    unbroken,
):
    shop.factory(*TWO)
    pressed(12, where=(Learner, "step"))
    assert "going on after round 6" in lorareg("train", "factory.yaml").err
    assert all_of(shop) == unbroken[0]


def test_a_killed_process_is_made_up_for(lorareg, shop):  # noqa: F811
    steps = {"max_steps": 100, "eval_steps": 20}
    plan = {"name": "zog", "lora": {"r": 2}, "training": steps, "data": {"validation": 0.25}}
    shop.factory(plan, save_steps=40)
    log = shop.part / "zog" / "training.jsonl"
    process = start()
    try:
        # Steps after the first checkpoint are in the log, as its buffer happens to be full.
        while not (kept(shop).is_file() and log.read_bytes().count(b"\n") > 42):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(Random().random() / 10)
    finally:
        process.kill()
        process.communicate()
    assert not shop.out.exists()
    assert lorareg("list", "-q").lines == []
    done = lorareg("train", "factory.yaml")
    assert "going on after round" in done.err
    resumed = all_of(shop), facts(shop)
    entries = [json.loads(line) for line in (shop.out / "zog/training.jsonl").open()]
    assert [e["step"] for e in entries if "loss" in e] == list(range(1, 101))
    assert [e["step"] for e in entries if "eval_nll" in e] == list(range(20, 101, 20))
    lorareg("train", "factory.yaml", "--force")
    assert (all_of(shop), facts(shop)) == resumed


def test_one_that_had_diverged_stays_so(lorareg, shop, pressed):  # noqa: F811
    wild = {"name": "wild", "training": {"learning_rate": 3e38}}
    shop.factory(wild, {"name": "zog"})
    pressed(5)
    lorareg("train", "factory.yaml", code=1)
    resumed = all_of(shop)
    assert b"diverged" in resumed["wild/training.jsonl"]
    lorareg("train", "factory.yaml", "--force", code=1)
    assert all_of(shop) == resumed


CHANGES = {
    "rows": ("zog: its train and validation rows have changed", None),
    "test rows": ("zog: its test rows have changed", None),
    "rate": (
        "zog: training.learning_rate was 0.01, is 0.02",
        {"training": {"max_steps": 20, "learning_rate": 0.02}},
    ),
    "rank": ("zog: lora.r was 4, is 3", {"lora": {"r": 3}}),
    "template": ("zog: data.template was", {"data": {"template": "{{ input }}: "}}),
    "name": ("adapters that only one of them has: other, zog", {"name": "other"}),
    "base": ("its base is tiny-llama, with other files or type", None),
    "dtype": ("its base is tiny-llama, with other files or type", {}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_begun_otherwise_is_not_gone_on_with(what, lorareg, shop, pressed):  # noqa: F811
    expected, changed = CHANGES[what]
    plan = {"name": "zog", "training": {"max_steps": 20}, "data": {"validation": 0.25}}
    plan |= {"data": {}} if what == "template" else {}
    shop.factory(plan)
    pressed(5)
    checkpoint = kept(shop).read_bytes()
    first = json.loads((shop.part / "zog/training.jsonl").read_text().splitlines()[0])["loss"]
    if what == "rows":
        write_rows(shop / "train.jsonl", tiny.rows(15))
    elif what == "test rows":
        write_rows(shop / "test.jsonl", tiny.rows(5))
    elif what == "base":
        model = shop.tiny.model()
        model.lm_head.weight.data.mul_(1.5)
        model.save_pretrained(shop / "tiny-llama")
    else:
        shop.factory(plan | changed, dtype="bfloat16" if what == "dtype" else "auto")
    said = lorareg.fails("train", "factory.yaml")
    assert f"Error: {shop.out}: an unfinished run is there, of another factory: {expected}" in said
    assert "Hint: put that back as it was to go on, or give --force to begin anew" in said
    assert kept(shop).read_bytes() == checkpoint
    done = lorareg("train", "factory.yaml", "--force")
    assert "going on" not in done.err
    [adapter] = lorareg("list", "-q").lines
    assert shop.results(adapter)["loss"][0][0] == 1
    assert shop.results(adapter)["loss"][0][1] != first or what not in {"rows", "template", "base"}


def test_what_does_not_decide_the_adapter_may_change(lorareg, shop, pressed, unbroken):  # noqa: F811
    shop.factory(*TWO)
    pressed(9)
    shop.factory(*TWO, save_steps=2, evaluate=["nll", "exact_match"], max_new_tokens=4)
    done = lorareg("train", "factory.yaml", "--max-together", "2")
    assert "going on after round 8" in done.err
    assert all_of(shop) == unbroken[0]


def test_a_run_over_a_finished_one_goes_on_too(lorareg, shop, pressed, unbroken):  # noqa: F811
    shop.factory({"name": "old", "training": {"max_steps": 1}})
    lorareg("train", "factory.yaml")
    before = all_of(shop)
    shop.factory(*TWO)
    pressed(9, "--force")
    assert all_of(shop) == before
    assert "--force replaces it" in lorareg.fails("train", "factory.yaml")
    assert "going on after round 8" in lorareg("train", "factory.yaml", "--force").err
    assert all_of(shop) == unbroken[0]


@pytest.mark.parametrize("how", ["cut", "another"])
def test_a_damaged_checkpoint_is_told_and_force_begins_anew(how, lorareg, shop, pressed, unbroken):  # noqa: F811
    shop.factory(*TWO)
    pressed(9)
    if how == "cut":
        kept(shop).write_bytes(kept(shop).read_bytes()[:-100])
    else:
        others = {key.replace("two/", "other/"): t for key, t in load_file(kept(shop)).items()}
        save_file(others, kept(shop))
    damaged = kept(shop).read_bytes()
    said = lorareg.fails("train", "factory.yaml")
    assert f"Error: {kept(shop)}: not a checkpoint of this run (" in said
    assert "--force" in said
    assert kept(shop).read_bytes() == damaged
    lorareg("train", "factory.yaml", "--force")
    assert all_of(shop) == unbroken[0]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="it is installed")
def test_a_library_that_is_not_there_costs_no_training(lorareg, shop, pressed):  # noqa: F811
    shop.factory(*TWO)
    pressed(9)
    checkpoint = kept(shop).read_bytes()
    lorareg.fails("train", "factory.yaml", "--tensorboard", "board", code=2)
    assert kept(shop).is_file()
    assert kept(shop).read_bytes() == checkpoint


def test_an_error_while_scoring_costs_no_training(lorareg, shop, monkeypatch):  # noqa: F811
    shop.factory()

    def fails(*_, **__):
        raise DataError("the rows cannot be scored")

    with monkeypatch.context() as patch:
        patch.setattr(measure, "measure", fails)
        assert "Error: the rows cannot be scored" in lorareg.fails("train", "factory.yaml")
    assert kept(shop).is_file()
    assert "going on after round 6" in lorareg("train", "factory.yaml").err


def test_a_second_run_keeps_off_the_first_one_s_folder_until_that_ends(lorareg, shop):  # noqa: F811
    shop.factory({"name": "zog", "training": {"max_steps": 100_000}}, save_steps=1)
    process = start()
    try:
        while not kept(shop).is_file():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        # Of another factory: force may forget what was left, not what is under way.
        shop.factory({"name": "zog", "training": {"max_steps": 5}})
        for words in ((), ("--force",)):
            said = lorareg.fails("train", "factory.yaml", *words)
            assert shop.part.is_dir()
        assert "another process is writing it" in said
        assert process.poll() is None
        assert kept(shop).is_file()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode in {130, -signal.SIGINT}, err
    assert out == ""
    assert f"in {shop.part.name}: the same command goes on from there" in err
    assert err.endswith(
        "Error: interrupted\n"
        "Hint: nothing half-done stands in its place; the same command starts again, or goes on\n"
    )


def test_a_full_disk_leaves_the_checkpoint_before(lorareg, shop, pressed):  # noqa: F811
    # Larger than the registry, so that the checkpoint is what does not fit.
    wide = {"r": 64, "target_modules": "all-linear"}
    shop.factory({"name": "zog", "lora": wide, "training": {"max_steps": 12}}, save_steps=3)
    pressed(5)
    before = kept(shop).read_bytes()
    assert len(before) > 600_000
    done = child(
        "train",
        "factory.yaml",
        # No file may grow beyond this: what a disk without room answers, but for the number.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )
    assert (done.code, done.out) == (1, ""), done.err
    assert "Traceback" not in done.err
    assert f"Error: {kept(shop)}: the checkpoint cannot be written (" in done.err
    assert "File too large" in done.err
    assert "Hint: make room, and give the same command again" in done.err
    assert not shop.out.exists()
    assert kept(shop).read_bytes() == before
    assert [p.name for p in kept(shop).parent.iterdir()] == [NAME]
    assert "going on after round 4" in lorareg("train", "factory.yaml").err
    resumed = all_of(shop)
    lorareg("train", "factory.yaml", "--force")
    assert all_of(shop) == resumed


def test_a_place_behind_a_link_is_the_same_place(lorareg, shop, pressed):  # noqa: F811
    (shop / "real").mkdir()
    (shop / "link").symlink_to("real")
    shop.factory(*TWO, output={"path": "link"})
    pressed(9)
    changed = {**TWO[0], "lora": {"r": 3}}
    shop.factory(changed, TWO[1], output={"path": "link"})
    assert "zog: lora.r was 4, is 3" in lorareg.fails("train", "factory.yaml")
    shop.factory(*TWO, output={"path": "link"})
    assert "going on after round 8" in lorareg("train", "factory.yaml").err
    assert (shop / "real/zog/adapter_config.json").is_file()
