"""Where candidates are measured: in this process or by workers, always through the journal."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorahub_registry.adapters.compat import Member
from lorahub_registry.compose.forms import Form, make_form
from lorahub_registry.compose.journal import Journal, rows_digest
from lorahub_registry.compose.objective import Coefficients, Losses, Measure
from lorahub_registry.compose.workers import Executor, Spec, Workers
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.quiet import one_thread
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.recipes.learned import GRADIENT, Learn, LoraHub
from lorahub_registry.recipes.model import Recipe
from lorahub_registry.weights.lowrank import Deltas, LowRank


@dataclass(frozen=True)
class Means:
    """How a search is carried out; none of it changes what is found.

    Attributes:
        journal: where evaluations are kept until the run has ended.
        jobs: worker processes of one thread each; None: this process, with torch's threads.
        place: the folder of the base, which workers load it from.
        start: makes the executor that workers run in; None: a pool of processes.
    """

    journal: Journal = field(default_factory=Journal)
    jobs: int | None = None
    place: Path | None = None
    start: Callable[[int], Executor] | None = None


@contextmanager
def singles(
    recipe: Recipe,
    base: LoadedBase,
    members: Sequence[Member],
    rows: Sequence[Encoded],
    means: Means,
) -> Iterator[Losses | None]:
    """What measures single members by workers; None where one worker would be all."""
    if means.jobs is None or means.jobs == 1:
        yield None
        return
    assert means.place is not None
    with Workers(means.jobs, means.start) as workers, tempfile.TemporaryDirectory() as scratch:
        spec = Spec(
            base=str(means.place), name=base.name, device=str(base.device), dtype=recipe.dtype,
            adapters=tuple(str(m.folder) for m in members), form="delta", per="model",
            layer_groups=1, slopes=False, population=1,
            rows=tuple((row.prompt, row.output) for row in rows),
        ).write(Path(scratch), "singles")  # fmt: skip
        yield workers.singles(spec)


class Bench:
    """The form over the members, measured on whatever rows are asked for; a context manager."""

    def __init__(
        self, recipe: Recipe, base: LoadedBase, members: Sequence[Member], means: Means
    ) -> None:
        method = recipe.method
        assert isinstance(method, Learn | LoraHub)
        self._recipe, self._base, self._members, self._means = recipe, base, members, means
        self._options: dict[str, Any] = {
            "form": method.form,
            "per": method.per,
            "layer_groups": getattr(method, "layer_groups", 1),
        }
        places = [(m.folder, m.facts) for m in members]
        self.form: Form = make_form(places, device=base.device, **self._options)
        self.how: dict[str, Any] = {}
        self._slopes = method.optimizer == GRADIENT
        self._population = method.num_workers
        self._workers: Workers | None = None
        self._within = ExitStack()

    def __enter__(self) -> Bench:
        jobs = self._means.jobs
        # One at a time, or one worker: this process does as well, with a worker's one thread.
        if jobs and (jobs == 1 or self._population == 1):
            self._within.enter_context(one_thread())
        elif jobs:
            self._workers = self._within.enter_context(Workers(jobs, self._means.start))
            self._scratch = Path(self._within.enter_context(tempfile.TemporaryDirectory()))
        return self

    def __exit__(self, *_: object) -> None:
        self._within.close()

    @property
    def parallel(self) -> bool:
        """Whether worker processes measure."""
        return self._workers is not None

    @contextmanager
    def losses(self, scope: str, rows: Sequence[Encoded]) -> Iterator[Losses]:
        """What measures candidates on ``rows``; ``scope`` names these rows in the journal."""
        base, journal = self._base, self._means.journal
        batches = base.batches(rows, gradients=self._slopes)
        measure = Measure(
            base.model, self.form, batches, slopes=self._slopes, population=self._population
        )
        self.how = {"how": measure.how, "copies": measure.copies}
        known = f"{scope} {rows_digest(rows)}"
        if self._workers is None:
            with measure:
                yield journal.through(known, measure, measure.copies)
            self.how = {"how": measure.how, "copies": measure.copies}
            return
        assert self._means.place is not None
        spec = Spec(
            base=str(self._means.place),
            name=base.name,
            device=str(base.device),
            dtype=self._recipe.dtype,
            adapters=tuple(str(m.folder) for m in self._members),
            slopes=self._slopes,
            population=self._population,
            rows=tuple((row.prompt, row.output) for row in rows),
            **self._options,
        ).write(self._scratch, scope.replace(" ", "-"))
        found = self._workers.losses(spec, measure.copies)
        yield journal.through(known, found, measure.copies)

    def mixture(self, coefficients: Coefficients) -> Deltas:
        """What will be written, on the CPU; an adapter with coefficient 0 leaves no trace."""
        found = {}
        stacks = self.form.stacks or {}
        for name, delta in self.form.at(coefficients).items():
            if name in stacks:
                there = torch.tensor(coefficients)[stacks[name].owner.cpu()] != 0
                delta = LowRank(delta.a.cpu()[there], delta.b.cpu()[:, there], delta.kind)
            if delta.rank:
                found[name] = delta.to("cpu")
        return found
