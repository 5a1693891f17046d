"""Several processes that train the same adapters, each on its share of every batch.

Started by ``accelerate launch``, one a GPU. Every process holds the base and all the adapters;
gradients are added up over the processes before each step, so that all of them take the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from lorahub_registry.errors import OutputError
from lorahub_registry.runtime.seeds import seed_of
from lorahub_registry.train.learner import Learner, Micro


class Crew:
    """The processes of one run; in most there is one.

    Attributes:
        rank, size: which process this is, and of how many.
        device: this process's own; None where there is one process, and the factory says.
    """

    def __init__(self) -> None:
        state = PartialState(cpu=not torch.cuda.is_available())
        self._state = state
        self.rank, self.size = state.process_index, state.num_processes
        self.device = str(state.device) if self.size > 1 else None

    @property
    def leads(self) -> bool:
        """Whether this process writes and talks."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()

    def own(self, micros: Sequence[Micro]) -> list[Micro]:
        """This process's rows of a step, dealt out one by one."""
        if self.size == 1:
            return list(micros)
        shares, at = [], 0
        for micro in micros:
            mine = micro.items[(self.rank - at) % self.size :: self.size]
            at += micro.rows
            if mine:
                seed = seed_of(micro.seed, "rank", self.rank)  # its rows are others
                shares.append(replace(micro, items=mine, seed=seed))
        return shares

    def leaders(self, work: Callable[[], float]) -> float:
        """A number that the leading process works out, so that all go by the same one."""
        if self.size == 1:
            return work()
        found = torch.zeros((), dtype=torch.float64, device=self._state.device)
        if self.leads:
            found += work()
        return float(reduce(found, "sum"))

    def check_same(self, rounds: int) -> None:
        """Whether all processes begin at the same round.

        Raises:
            OutputError: they do not: they have read different checkpoints.
        """
        if self.most(rounds) != rounds or -self.most(-rounds) != rounds:
            raise OutputError(
                f"process {self.rank} would go on after round {rounds}, and another one elsewhere",
                hint="all processes need the same file system; give the same command again",
            )

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return self.most(int(here)) > 0

    def most(self, here: int) -> int:
        """The largest of every process's number."""
        if self.size == 1:
            return here
        return int(reduce(torch.tensor(float(here), device=self._state.device), "max"))

    def add_up(self, learners: Sequence[Learner], losses: dict[int, float]) -> dict[int, float]:
        """Gradients, and each one's loss, over all processes."""
        if self.size == 1:
            return losses
        for learner in learners:
            learner.parameters.grad.copy_(reduce(learner.parameters.grad, "sum"))
        return self.sums({learner.number: losses.get(learner.number, 0.0) for learner in learners})

    def sums(self, values: Mapping[int, float]) -> dict[int, float]:
        """Adapter → the sum of every process's number; all have the same adapters."""
        if self.size == 1:
            return dict(values)
        here = torch.tensor(list(values.values()), dtype=torch.float32, device=self._state.device)
        return dict(zip(values, reduce(here, "sum").tolist(), strict=True))
