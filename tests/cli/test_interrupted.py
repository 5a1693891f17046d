"""``compose`` ended in the middle: what was there before is as it was."""

import os
import signal
import subprocess
import sys

import pytest

from lorahub_registry.api import mix
from lorahub_registry.compose import run
from lorahub_registry.weights.files import load_deltas
from tests.cli.conftest import ROOT, tree

# Said once the rows are tokenised, right before the search, which here would take hours.
STARTED = "train prompts lost their beginning"


@pytest.fixture
def searching(lorareg, kitchen):
    """A ``compose`` in a process of its own, in the middle of its search."""
    lorareg("add", "loras")
    kitchen.recipe(
        method={"type": "learn", "budget": 100_000, "optimizer": "RandomSearch"},
        data={"train": {"path": "train.jsonl"}, "max_length": 12},
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "lorahub_registry", "compose", "recipe.yaml", "--force"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # Where the tests themselves run in the background, a child would ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        for line in process.stderr:
            if STARTED in line:
                break
        else:
            raise AssertionError(f"it ended by itself with {process.wait()}")
        yield process
    finally:
        process.kill()
        process.communicate()


def test_an_interrupt_leaves_nothing(searching, lorareg, kitchen):
    searching.send_signal(signal.SIGINT)
    out, err = searching.communicate(timeout=60)
    # Python itself may end by the signal, which shells call 130, too.
    assert searching.returncode in {130, -signal.SIGINT}, err
    assert out == ""
    # Whether an evaluation was kept by then, chance decides; test_resumed.py has that.
    said = err[err.index("Error: ") :]
    assert said.startswith(
        "Error: interrupted\nHint: nothing half-done stands in its place; the same command"
    )
    assert tree(kitchen / "out") == []
    known = lorareg("list", "--json").json
    assert [a["ref"] for a in known] == ["plain", "wide"]
    assert all(a["scores"] == [] for a in known)


def test_after_a_kill_the_same_command_starts_again(searching, lorareg, kitchen):
    searching.kill()
    searching.wait()
    assert not kitchen.out.exists()
    assert [a["ref"] for a in lorareg("list", "--json").json] == ["plain", "wide"]
    lorareg("compose", kitchen.recipe())
    assert (kitchen.out / "adapter_config.json").is_file()
    assert [name for name in tree(kitchen / "out") if "/" not in name] == ["blend"]
    assert lorareg("db", "status", "-q").out == "current\n"


@pytest.mark.parametrize(
    ("number", "lost"), [(signal.SIGINT, "dropped"), (signal.SIGTERM, "another error")]
)
def test_an_interrupt_that_a_library_loses_still_ends_the_run(
    number, lost, lorareg, kitchen, monkeypatch, request
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def losing(*_, **__):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if lost == "another error":
                raise ValueError("could not determine the shape") from None
        return load_deltas(*_, **__)

    monkeypatch.setattr(run, "load_deltas", losing)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    said = lorareg.fails("compose", kitchen.recipe(), code=130)
    assert "Error: interrupted\nHint: " in said
    assert said.count("Error:") == 1
    assert tree(kitchen / "out") == []
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    lorareg("list")  # the next command is not interrupted


@pytest.mark.parametrize(("module", "step"), [(run, "compose"), (mix, "_write_papers")])
def test_a_failure_keeps_the_mixture_that_was_there(module, step, lorareg, kitchen, monkeypatch):
    recipe = kitchen.recipe()
    lorareg("compose", recipe)
    before = {p.name: p.read_bytes() for p in kitchen.out.iterdir()}
    shown = lorareg("show", "blend", "--json").json

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, step, full)
    said = lorareg.fails("compose", recipe, "--force")
    assert f"Error: {kitchen.out} cannot be written: No space left on device" in said
    assert {p.name: p.read_bytes() for p in kitchen.out.iterdir()} == before
    assert tree(kitchen / "out") == ["blend", *(f"blend/{name}" for name in sorted(before))]
    assert lorareg("show", "blend", "--json").json == shown
