"""A search that was stopped goes on where it was, to the same bytes; its processes end with it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorahub_registry.api import mix, resume
from lorahub_registry.api.prepare import prepare
from lorahub_registry.compose.objective import Measure
from lorahub_registry.progress import silent
from lorahub_registry.registry.store import Registry
from tests.cli.conftest import ROOT, tree

# Several candidates share a forward, and so many take some seconds.
METHOD = {
    "type": "learn", "budget": 480, "optimizer": "CMA", "num_workers": 8, "l1": 0.0,
    "screen": {"keep": 2},
}  # fmt: skip


def _start(*words):
    """``lorareg compose …`` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lorahub_registry", "compose", "recipe.yaml", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # Where the tests themselves run in the background, a child would ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        start_new_session=True,
    )


def _journals():
    return sorted((Path(os.environ["LORAREG_HOME"]) / "journals").glob("*"))


def _until(count, process):
    """Wait until so many evaluations are kept; the journal."""
    while True:
        assert process.poll() is None, process.communicate()
        for path in _journals():
            if path.read_bytes().count(b"\n") >= count:
                return path
        time.sleep(0.002)


def _members(group):
    """The processes of a group that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def _all_end(group):
    until = time.monotonic() + 30
    while _members(group):
        assert time.monotonic() < until, f"still there: {_members(group)}"
        time.sleep(0.02)


@pytest.fixture
def three(kitchen):
    """Three adapters, of which screening keeps two."""
    kitchen.lora("same")
    return {"adapters": ["./loras/plain", "./loras/wide", "./loras/same"], "method": METHOD}


def test_a_killed_run_goes_on_to_the_same_bytes(lorareg, kitchen, three, monkeypatch):
    kitchen.recipe(**three)
    process = _start()
    try:
        journal = _until(60, process)
    finally:
        process.kill()
        process.communicate()
    assert not kitchen.out.exists()
    kept = [json.loads(line) for line in journal.read_text().splitlines(keepends=True)
            if line.endswith("\n")]  # fmt: skip
    # Each scope ends with what its rows are.
    scopes = {line["scope"].rpartition(" ")[0] for line in kept}
    assert scopes >= {"alone", "together", "search"}
    # The last line may be half a one.
    with journal.open("a") as file:
        file.write('{"v": 1, "scope": "sea')
    asked = []
    through = Measure.__call__

    def watched(self, candidates):
        asked.extend(candidates)
        return through(self, candidates)

    monkeypatch.setattr(Measure, "__call__", watched)
    done = lorareg("compose", "recipe.yaml")
    assert f"an earlier run of this recipe was stopped: {len(kept)} evaluations are known" in (
        done.err
    )
    resumed = {p.name: p.read_bytes() for p in kitchen.out.iterdir()}
    assert _journals() == []
    measured = len(asked)
    asked.clear()
    again = lorareg("compose", "recipe.yaml", "--force")
    assert "earlier run" not in again.err
    unbroken = {p.name: p.read_bytes() for p in kitchen.out.iterdir()}
    assert unbroken == resumed
    assert len(json.loads(unbroken["results.json"])["search"]) == 480
    # What shared a forward with a lost candidate is measured again; nothing else is.
    searched = sum(not line["scope"].startswith("alone ") for line in kept)
    assert measured <= len(asked) - searched + 10
    assert _journals() == []


def test_ctrl_c_says_that_the_evaluations_are_kept(lorareg, kitchen, three):
    # NGOpt runs others' code in a thread of its own here.
    kitchen.recipe(method=METHOD | {"optimizer": "NGOpt", "num_workers": 1, "budget": 100_000})
    process = _start()
    try:
        _until(3, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in {130, -signal.SIGINT}, err
    assert out == ""
    kept, *rest = err.splitlines()[-3:]
    assert int(kept.removesuffix(" evaluations are kept: the same command goes on from there")) > 2
    assert rest == [
        "Error: interrupted",
        "Hint: nothing half-done stands in its place; the same command starts again, or goes on",
    ]
    assert tree(kitchen / "out") == []


@pytest.mark.xdist_group("spawned")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_run(number, kitchen, three):
    kitchen.recipe(**three | {"method": METHOD | {"budget": 100_000}})
    process = _start("--jobs", "2")
    try:
        _until(30, process)
        assert len(_members(process.pid)) >= 3
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: everybody hears it
        else:
            process.kill()
        _, err = process.communicate(timeout=60)
        _all_end(process.pid)
    finally:
        for pid in _members(process.pid):
            os.kill(pid, signal.SIGKILL)
    if number == signal.SIGINT:
        assert "Traceback" not in err
        assert err.count("interrupted") == 1
        assert "evaluations are kept: the same command goes on from there" in err


@pytest.fixture
def key(kitchen, three):
    """What a run's journal is called, for a recipe with changes."""

    def _key(jobs=None, **changes):
        with Registry() as registry:
            ready = prepare(kitchen.recipe(**three | changes), registry=registry, force=True)
            return resume._run_key(ready, mix._loaded(ready, None, silent), jobs)

    return _key


def test_a_journal_is_for_one_run_and_no_other(key, kitchen):
    first = key()
    assert key() == first
    assert key(jobs=1) == key(jobs=3)
    assert key(output={"path": "elsewhere"}) == first, "where it goes decides no number"
    others = [
        key(seed=1),
        key(method=METHOD | {"budget": 481}),
        key(method=METHOD | {"l1": 0.01}),
        key(adapters=["./loras/plain", "./loras/wide"]),
        key(dtype="bfloat16"),
        key(data={"train": {"path": "train.jsonl", "limit": 9}, "test": {"path": "test.jsonl"}}),
    ]
    rows = kitchen / "train.jsonl"
    rows.write_text(rows.read_text().replace("a", "b", 1))
    others.append(key())
    assert len({first, *others}) == len(others) + 1


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"l1": 1e6, "budget": 4}, "no mixture is better on the training rows than the base"),
        ({"folds": 11, "budget": 4}, "folds: 11 needs as many training rows, and there are 10"),
        ({"per": "module", "form": "delta", "budget": 4}, "do not determine them"),
    ],
)
def test_an_end_that_comes_every_time_leaves_no_journal(method, said, lorareg, kitchen, three):
    rows = (kitchen / "train.jsonl").read_text().splitlines(keepends=True)
    if "per" in method:
        (kitchen / "train.jsonl").write_text(rows[0])
    method = {"type": "learn", "screen": {"keep": 2}, "optimizer": "NGOpt", **method}
    assert said in lorareg.fails("compose", kitchen.recipe(**three | {"method": method}))
    assert _journals() == []


def test_an_end_that_may_be_chance_keeps_the_journal(lorareg, kitchen, three, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    recipe = kitchen.recipe(**three | {"method": METHOD | {"budget": 8}})
    with monkeypatch.context() as patch:
        patch.setattr(mix, "_write_papers", full)
        said = lorareg.fails("compose", recipe)
    [journal] = _journals()
    count = len(journal.read_text().splitlines())
    assert f"{count} evaluations are kept: the same command goes on from there" in said
    assert f"{count} evaluations are known" in lorareg("compose", recipe).err
    assert _journals() == []


def test_jobs_with_a_base_that_is_loaded_is_wrong_usage(kitchen):
    from lorahub_registry.errors import UsageError

    base = kitchen.tiny.model(), kitchen.tiny.tokenizer()
    with pytest.raises(UsageError, match="jobs cannot be used with a base that is already loaded"):
        mix.compose(kitchen.recipe(), base=base, jobs=2)
    assert not kitchen.out.exists()


def test_a_static_method_takes_any_jobs(lorareg, kitchen):
    adapters = [{"ref": "./loras/plain", "coefficient": 1}]
    recipe = kitchen.recipe(adapters=adapters, method={"type": "linear"})
    lorareg("compose", recipe, "--jobs", "2")
    assert _journals() == []
    lorareg.fails("compose", recipe, "--jobs", "0", code=2)
