"""Rows scored where memory does not hold all of a batch, against a memory that does."""

import pytest
import torch

from lorahub_registry.evaluate.base import adopt
from lorahub_registry.evaluate.measure import TestSet
from lorahub_registry.evaluate.tokens import batches
from lorahub_registry.train.run import Hooks, train
from lorahub_registry.train.scoring import NoMemory, Scoring
from tests.train.making import base_of, learner, llama, rows, t5


class Small:
    """A memory that does not hold more than so many rows without gradients, as a hook."""

    def __init__(self, model, most, *, generating=None):
        self.most, self.widest = most, 0
        self._generating = most if generating is None else generating
        self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module, args, kwargs):
        if torch.is_grad_enabled():
            return
        ids = next(v for k, v in kwargs.items() if k in {"input_ids", "decoder_input_ids"})
        generating = kwargs.get("use_cache") is not False
        if ids.shape[0] > (self._generating if generating else self.most):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.widest = max(self.widest, ids.shape[0])

    def remove(self):
        self._hook.remove()


OPTIONS = {"validation": 9, "eval_steps": 2, "max_steps": 6}


def test_validation_rows_are_scored_fewer_at_a_time(recorded):
    model = llama()
    whole, other = learner(model, data=1, **OPTIONS), learner(model, data=1, **OPTIONS)
    train(base_of(model), [whole])
    memory = Small(model, 3)
    train(base_of(model), [other], progress=recorded)
    memory.remove()
    assert memory.widest == 3
    assert other.at.state == "done"
    assert other.at.validation == [(s, pytest.approx(n, rel=1e-6)) for s, n in whole.at.validation]
    assert torch.equal(other.parameters.flat, whole.parameters.flat)
    # Halved twice at the first evaluation, and kept so.
    assert recorded.warnings == [
        "validation rows of a1: memory ran out, and they are scored again with at most "
        f"{most} rows at a time"
        for most in (5, 3)
    ]


def test_one_whose_validation_row_does_not_fit_fails_and_the_others_go_on(recorded):
    model = llama()
    learners = [learner(model, 0, data=1), learner(model, 1, data=2, **OPTIONS)]
    ended = []
    hook = model.register_forward_pre_hook(_none_for_the_second(learners), with_kwargs=True)
    train(
        base_of(model),
        learners,
        hooks=Hooks(finished=lambda one: ended.append(one.number)),
        progress=recorded,
    )
    hook.remove()
    assert [one.at.state for one in learners] == ["done", "failed"]
    assert learners[1].at.why == "memory does not hold one of its validation rows"
    assert learners[1].at.step == 2
    assert ended == [1, 0]


def _none_for_the_second(learners):
    def look(*_):
        # The first look at the modules is without gradients, too.
        if not torch.is_grad_enabled() and learners[1].at.step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return look


@pytest.fixture(params=["llama", "t5"])
def tested(request, tiny_llama, tiny_t5):
    """A base and 21 rows, with both metrics."""
    tiny = {"llama": tiny_llama, "t5": tiny_t5}[request.param]
    base = adopt(tiny.model(), tiny.tokenizer(), name="tiny")
    data = rows(21, 4, longest=8)
    return base, TestSet(data, base.batches(data), ["nll", "exact_match"], 4, False)


def test_test_rows_too_and_generation_by_itself(tested, recorded):
    base, test = tested
    whole, plain = Scoring().measure(base.model, base, "zog", "adapter", test)
    memory = Small(base.model, 6, generating=2)
    found, told = Scoring(recorded).measure(base.model, base, "zog", "adapter", test)
    memory.remove()
    torch.testing.assert_close(found.sums, whole.sums)
    assert told.nll == pytest.approx(plain.nll)
    assert (told.n, told.exact_match) == (21, plain.exact_match)
    assert told.exact_match_stderr == pytest.approx(plain.exact_match_stderr, nan_ok=True)
    assert [w.split("at most ")[1] for w in recorded.warnings] == [
        f"{n} {'rows' if n > 1 else 'row'} at a time" for n in (11, 6, 11, 6, 3, 2)
    ]


def test_a_row_that_does_not_fit_alone_is_told(recorded):
    model = llama()
    memory = Small(model, 0)
    found = batches(rows(3, 1), pad=0, seq2seq=False, device="cpu")
    with pytest.raises(NoMemory, match="test rows of zog: memory does not hold one") as raised:
        Scoring(recorded).score("test rows of zog", model, found)
    memory.remove()
    assert "free some of the device's memory" in raised.value.hint
    assert len(recorded.warnings) == 2


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    model = t5()
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    found = batches(rows(3, 1), pad=0, seq2seq=True, device="cpu")
    with pytest.raises(RuntimeError, match="no"):
        Scoring().score("test rows of zog", model, found)


def test_a_step_makes_nothing_that_memory_could_lack():
    model = llama()
    one = learner(model, lora={"use_dora": True, "loraplus_lr_ratio": 4.0})

    def places():
        state = one.optimizer.state
        return [t.data_ptr() for moments in state.values() for t in moments.values()]

    before = places()
    assert len(before) == 3 * 3
    train(base_of(model), [one])
    assert places() == before
    assert [float(m["step"]) for m in one.optimizer.state.values()] == [one.total] * 3
