"""TensorBoard's event files, read back by TensorBoard."""

from __future__ import annotations

import json
import signal

import pytest

pytest.importorskip("tensorboard")

from lorahub_registry.train.learner import Learner
from tests.cli.factories import shop  # noqa: F401

TWO = (
    {"name": "zog", "training": {"max_steps": 8, "eval_steps": 4}, "data": {"validation": 0.25}},
    {"name": "two", "training": {"max_steps": 5}},
)
NAMES = {"loss", "learning_rate", "grad_norm", "epoch"}


def _told(folder):
    """What TensorBoard shows: name → [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def _logged(shop, name):  # noqa: F811
    """The same, of ``training.jsonl``."""
    found = {}
    for line in (shop.out / name / "training.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        for key, value in entry.items():
            if key != "step":
                found.setdefault(key, []).append((entry["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_every_step_of_every_adapter_is_there(lorareg, shop):  # noqa: F811
    shop.factory(*TWO)
    lorareg("train", "factory.yaml", "--tensorboard", "board")
    assert sorted(p.name for p in (shop / "board").iterdir()) == ["two", "zog"]
    told = _told(shop / "board/zog")
    assert told.keys() == NAMES | {"eval_nll"}
    assert [step for step, _ in told["loss"]] == list(range(1, 9))
    assert [step for step, _ in told["eval_nll"]] == [4, 8]
    assert told == _logged(shop, "zog")
    told = _told(shop / "board/two")
    assert told.keys() == NAMES
    assert told == _logged(shop, "two")


def test_a_run_that_goes_on_shows_each_step_once(lorareg, shop, monkeypatch):  # noqa: F811
    shop.factory(*TWO, save_steps=3)
    words = ("train", "factory.yaml", "--tensorboard", "board")
    before, step = signal.signal(signal.SIGINT, signal.default_int_handler), Learner.step

    def killed(one, loss):
        if one.at.step == 5:
            raise MemoryError  # no checkpoint is written: what was logged since is logged again
        return step(one, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", killed)
        lorareg.fails(*words)
    signal.signal(signal.SIGINT, before)
    assert "going on after round 3" in lorareg(*words).err
    for name in ("zog", "two"):
        assert _told(shop / "board" / name) == _logged(shop, name), name
