"""Training many adapters on one base: round after round, until each has had its steps.

In a round every adapter that still runs takes one optimizer step. The micro-batches of all of them
are put together into passes (:mod:`~lorahub_registry.train.dispatch`). Parameters change only
after the last pass of a round, so a round that runs out of memory, or is interrupted, has changed
nothing and is done again.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.progress import Progress, Task, silent
from lorahub_registry.runtime.grouped import Grouped
from lorahub_registry.train.crew import Crew
from lorahub_registry.train.dispatch import passes
from lorahub_registry.train.learner import Learner, Micro
from lorahub_registry.train.passes import Passes, Standing, checkpointing
from lorahub_registry.train.scoring import NoMemory

_NO_MEMORY = -1.0
_TRY_AGAIN = 50  # rounds after which more adapters go together again; each time twice as many


@dataclass
class Run:
    """How far a run is, beside what each learner knows.

    Attributes:
        rounds: how many have been done.
        together: most adapters that were in one pass.
        reduced: (round, most adapters in a pass from then on), each time that memory ran out.
    """

    rounds: int = 0
    together: int = 0
    reduced: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Hooks:
    """Who is told what.

    Attributes:
        logged: what a learner's step, or the scoring of its validation rows, was like.
        finished: a learner has ended, in whatever way.
        save: all is between two rounds: after every ``save_steps`` rounds, and when the run is
            interrupted.
        save_steps: None: only when interrupted.
    """

    logged: Callable[[Learner, dict[str, Any]], None] = lambda learner, entry: None
    finished: Callable[[Learner], None] = lambda learner: None
    save: Callable[[Run], None] = lambda run: None
    save_steps: int | None = None


def train(
    base: LoadedBase,
    learners: Sequence[Learner],
    *,
    max_together: int | None = None,
    gradient_checkpointing: bool = False,
    run: Run | None = None,
    hooks: Hooks | None = None,
    crew: Crew | None = None,
    standing: Grouped | Standing | None = None,
    progress: Progress = silent,
) -> Run:
    """Train all that still run to their ends.

    Args:
        learners: numbered in their order.
        max_together: most adapters in one pass; None: no bound.
        gradient_checkpointing: see :func:`~lorahub_registry.train.passes.checkpointing`.
        run: an earlier part of the same run, to go on from.
        crew: the processes that share the work; None: this one alone.
        standing: what makes the base compute with the learners' parameters; None: the operator
            of adapters.
    """
    run, hooks, crew = run or Run(), hooks or Hooks(), crew or Crew()
    grouped = standing or Grouped(
        base.model,
        [learner.parameters.factors for learner in learners],
        [learner.parameters.experts for learner in learners],
    )
    with ExitStack() as stack:
        stack.enter_context(checkpointing(base.model, gradient_checkpointing))
        stack.enter_context(grouped)
        work = Passes(base, grouped, learners, progress)
        crew.check_same(run.rounds)
        if not run.rounds:
            work.probe()
        room = _Room(max_together or len(learners), run, progress)
        bars = {
            learner.number: stack.enter_context(_bar(learner, progress))
            for learner in learners
            if learner.running
        }
        for number, bar in bars.items():
            bar.advance(learners[number].at.step)
        try:
            _rounds(learners, work, room, bars, run, hooks, crew)
        except KeyboardInterrupt:
            for learner in learners:
                learner.parameters.grad.zero_()
            hooks.save(run)
            raise
    for learner in learners:
        learner.finish()
    return run


def _bar(learner: Learner, progress: Progress) -> Any:
    return progress.task(learner.plan.name, learner.total, "step")


def _rounds(
    learners: Sequence[Learner],
    work: Passes,
    room: _Room,
    bars: Mapping[int, Task],
    run: Run,
    hooks: Hooks,
    crew: Crew,
) -> None:
    """All rounds; between any two statements here, all learners are between two steps."""
    ended = {learner.number for learner in learners if not learner.running}
    while True:
        # Here, so that a run that goes on makes up for what an interrupt left out.
        for learner in learners:
            if learner.wants_validation:
                nll = crew.leaders(partial(_validation, work, learner))
                with undisturbed():
                    if nll == _NO_MEMORY:
                        learner.fail("memory does not hold one of its validation rows")
                    else:
                        learner.validated(nll)
                        hooks.logged(learner, {"step": learner.at.step, "eval_nll": nll})
            if not learner.running and learner.number not in ended:
                ended.add(learner.number)
                hooks.finished(learner)
        active = [learner for learner in learners if learner.running]
        if not active:
            return
        began = time.perf_counter()
        micros = [micro for learner in active for micro in learner.micros()]
        outputs = {learner.number: 0 for learner in active}
        for micro in micros:
            outputs[micro.adapter] += micro.outputs
        losses = _gradients(active, crew.own(micros), outputs, work, room, crew)
        if losses is None:
            continue
        extra = crew.sums({a.number: work.extra.get(a.number, 0.0) for a in active})
        each = (time.perf_counter() - began) / sum(outputs.values())
        stepped = []
        with undisturbed():
            for learner in active:
                learner.at.tokens += outputs[learner.number]
                learner.at.seconds += each * outputs[learner.number]
                entry = learner.step(losses[learner.number])
                if entry is not None:
                    if extra[learner.number]:
                        entry["aux_loss"] = extra[learner.number]
                    stepped.append(learner)
                    hooks.logged(learner, entry)
            run.rounds += 1
            run.together = max(run.together, work.most)
        for learner in stepped:
            bars[learner.number].describe(_told(learner, losses[learner.number]))
            bars[learner.number].advance()
        if hooks.save_steps and run.rounds % hooks.save_steps == 0:
            hooks.save(run)


def _validation(work: Passes, learner: Learner) -> float:
    """What all processes go by: no NLL is negative."""
    try:
        return work.validation(learner)
    except NoMemory:
        return _NO_MEMORY


def _told(learner: Learner, loss: float) -> str:
    """What stands beside its bar."""
    if learner.at.why:
        return learner.at.why
    held_out = f"  validation {learner.at.validation[-1][1]:.3f}" if learner.at.validation else ""
    return f"loss {loss:.3f}{held_out}"


def _gradients(
    active: Sequence[Learner],
    micros: Sequence[Micro],
    outputs: Mapping[int, int],
    work: Passes,
    room: _Room,
    crew: Crew,
) -> dict[int, float] | None:
    """Each one's loss; None where memory ran out, and nothing has changed."""
    losses: dict[int, float] | None = None
    try:
        losses = work.gradients(passes(micros, tokens=work.tokens, together=room.now), outputs)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
    # Out of the handler, whose error holds what was computed.
    if crew.any(losses is None):
        for learner in active:
            learner.parameters.grad.zero_()
        room.less(active, work, crew, here=losses is None)
        return None
    room.more()
    assert losses is not None
    return crew.add_up(active, losses)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    for number in came[:1]:
        signal.raise_signal(number)


class _Room:
    """How many adapters memory has room for.

    Attributes:
        now: most adapters in one pass.
    """

    def __init__(self, most: int, run: Run, progress: Progress) -> None:
        self.now = self._most = most
        self._run, self._progress, self._good, self._wait = run, progress, 0, _TRY_AGAIN

    def less(self, active: Sequence[Learner], work: Passes, crew: Crew, *, here: bool) -> None:
        """Memory ran out; a learner of which one batch alone does not fit fails.

        Args:
            here: it was in this process.
        """
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._good = 0
        micro = work.at
        number = crew.most(micro.adapter if here and micro and work.last == 1 else -1)
        if number < 0:
            self.now = (work.last + 1) // 2 if here else self.now
            self._run.reduced.append((self._run.rounds, self.now))
            self._progress.warn(
                f"memory ran out in round {self._run.rounds + 1}; it is done again with at most "
                f"{self.now} {'adapters' if self.now > 1 else 'adapter'} in one pass"
            )
            return
        learner = next(a for a in active if a.number == number)
        widest = max(learner.micros(), key=lambda m: m.rows * m.width)
        learner.fail(
            f"memory does not hold one of its batches ({widest.rows} rows of up to {widest.width} "
            "tokens): lower its batch_size or max_length, or set gradient_checkpointing"
        )
        self._progress.warn(f"{learner.plan.name}: {learner.at.why}")

    def more(self) -> None:
        """A round went well."""
        self._good += 1
        if self.now < self._most and self._good >= self._wait:
            self.now, self._good, self._wait = min(self._most, 2 * self.now), 0, 2 * self._wait
            self._progress.say(f"trying {self.now} adapters in one pass again")
