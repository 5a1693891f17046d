"""Runs that are broken off and go on, against runs that are not."""

import os
import signal

import pytest
import torch

from lorahub_registry.errors import OutputError
from lorahub_registry.train import checkpoint
from lorahub_registry.train.run import Hooks, Run, train
from tests.train.making import base_of, learner, llama

KINDS = [
    {"lora": {"lora_dropout": 0.2}},
    {"lora": {"r": 2, "use_dora": True, "loraplus_lr_ratio": 2.0}, "batch_size": 3},
    {"max_steps": 3},
    {"validation": 6, "eval_steps": 2, "early_stopping_patience": 2, "learning_rate": 0.05},
]


def made(model):
    return [learner(model, n, data=n, **options) for n, options in enumerate(KINDS)]


@pytest.mark.parametrize("when", ["in a forward", "between the steps", "after the validation"])
@pytest.mark.parametrize("at", [1, 5, 9])
def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(tmp_path, at, when):
    model = llama()
    whole = made(model)
    train(base_of(model), whole)
    broken, seen = made(model), {"forwards": 0}

    def stop_in_a_forward(*_):
        seen["forwards"] += 1
        if seen["forwards"] == at + 1 and when == "in a forward":  # after the first look
            raise KeyboardInterrupt

    def logged(one, entry):
        stopped = "eval_nll" in entry if when == "after the validation" else True
        if when != "in a forward" and stopped and one.at.step >= min(at, 4) and not seen.get("x"):
            seen["x"] = True
            os.kill(os.getpid(), signal.SIGINT)  # which waits for the end of the round's steps

    hook = model.register_forward_pre_hook(stop_in_a_forward)
    hooks = Hooks(logged=logged, save=lambda run: checkpoint.save(tmp_path, run, broken))
    with pytest.raises(KeyboardInterrupt):
        train(base_of(model), broken, hooks=hooks)
    hook.remove()
    again = made(model)
    run = checkpoint.restore(tmp_path, again)
    assert run is not None
    train(base_of(model), again, run=run)
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one.parameters.flat, other.parameters.flat)
        assert one.at.loss == other.at.loss
        assert one.at.validation == other.at.validation
        assert (one.at.state, one.at.best_step) == (other.at.state, other.at.best_step)


def test_a_checkpoint_is_written_every_so_many_rounds(tmp_path):
    model, rounds = llama(), []
    learners = made(model)
    hooks = Hooks(save=lambda run: rounds.append(run.rounds), save_steps=4)
    run = train(base_of(model), learners, hooks=hooks)
    assert rounds == [n for n in range(1, run.rounds + 1) if n % 4 == 0]
    assert checkpoint.restore(tmp_path, learners) is None


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    learners = made(llama())
    checkpoint.save(tmp_path, Run(3), learners)
    before = (tmp_path / checkpoint.NAME).read_bytes()
    (tmp_path / f"{checkpoint.NAME}.part").mkdir()  # nothing can be written there
    with pytest.raises(OutputError, match="the checkpoint cannot be written") as raised:
        checkpoint.save(tmp_path, Run(4), learners)
    assert "goes on from the one before" in raised.value.hint
    assert (tmp_path / checkpoint.NAME).read_bytes() == before


def test_one_of_other_learners_or_damaged_is_refused(tmp_path):
    model = llama()
    learners = made(model)
    checkpoint.save(tmp_path, Run(3), learners)
    with pytest.raises(OutputError, match="not a checkpoint of this run"):
        checkpoint.restore(tmp_path, learners[:2])
    other = [learner(model, n, lora={"r": 3}) for n in range(4)]
    with pytest.raises(OutputError, match="not a checkpoint of this run"):
        checkpoint.restore(tmp_path, other)
    path = tmp_path / checkpoint.NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OutputError, match="not a checkpoint of this run"):
        checkpoint.restore(tmp_path, learners)


def test_adapters_may_change_places_between_two_parts_of_a_run(tmp_path):
    model = llama()
    one, other = learner(model, 0, data=1), learner(model, 1, data=2)
    train(base_of(model), [one, other])
    checkpoint.save(tmp_path, Run(3), [one, other])
    again = [learner(model, 0, data=2), learner(model, 1, data=1)]
    checkpoint.restore(tmp_path, again)
    assert torch.equal(again[0].parameters.flat, other.parameters.flat)
    assert again[1].at.loss == one.at.loss


def test_a_checkpoint_s_new_name_is_on_the_disk_too(tmp_path, monkeypatch):
    through, synced = os.fsync, []

    def noted(handle):
        there = (tmp_path / checkpoint.NAME).exists()
        synced.append((os.path.samestat(os.fstat(handle), tmp_path.stat()), there))
        through(handle)

    monkeypatch.setattr(os, "fsync", noted)
    checkpoint.save(tmp_path, Run(3), made(llama()))
    # The file before it has its name, the folder after.
    assert synced == [(False, False), (True, True)]
