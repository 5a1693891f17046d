"""What the layers of one model share while a mixture runs in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.mixture import Coefficients

BASE = "__base__"
"""PEFT's name, in mixed batches, for rows that get no adapter."""


@dataclass
class Flow:
    """What the layers of one model share while it runs.

    Attributes:
        decided: (place, adapter) → coefficients; the place is a gate's, or ``prompt``.
        given: adapter → coefficients that the caller has set in place of the router's.
        names: of a mixed batch, the adapter of each row; None: the active ones, for all rows.
        watched: called with adapter, module and coefficients of whatever computes; None: nobody.
        silent: experts say nothing: the base alone is asked.
        prompts: 1 at the tokens that prompt routers read, where answers follow them; None: all.
        prompt: the ids that were routed by last, and how many positions there are by now.
        blind: what gates that train have decided while no gradient was recorded.
    """

    decided: dict[tuple[str, str], Coefficients] = field(default_factory=dict)
    given: dict[str, Coefficients] = field(default_factory=dict)
    names: Sequence[str] | None = None
    watched: Any = None
    silent: bool = False
    prompts: torch.Tensor | None = None
    prompt: tuple[torch.Tensor, int] | None = None
    blind: set[tuple[str, str]] = field(default_factory=set)
    _shared: tuple[int, list[tuple[str, torch.Tensor | None]]] | None = None

    def __deepcopy__(self, _: dict[int, Any]) -> Flow:
        # What was decided belongs to a run of the model, and may hang on its graph.
        return Flow()

    def decide(self, place: str, adapter: str, c: Coefficients, *, trains: bool) -> None:
        """Keep what a gate says; ``trains``: gradients have to reach it."""
        self.decided[place, adapter] = c
        if trains and not torch.is_grad_enabled():
            self.blind.add((place, adapter))
        else:
            self.blind.discard((place, adapter))

    def read(self, place: str, adapter: str, module: str) -> Coefficients:
        """What was decided at ``place`` for ``module``.

        Raises:
            IncompatibleAdapters: nothing was, or gradients would not reach who decided it.
        """
        found = self.decided.get((place, adapter))
        if found is None:
            raise IncompatibleAdapters(
                f"{module} was called before {place!r}, which decides its coefficients",
                hint="call the whole model, not one of its parts",
            )
        apart = found.values.requires_grad and not torch.is_grad_enabled()
        if apart or (torch.is_grad_enabled() and (place, adapter) in self.blind):
            raise IncompatibleAdapters(
                f"{module} is computed twice, apart from the gate of {place!r}, by reentrant "
                "checkpointing: the gate would not get its gradient",
                hint='gradient_checkpointing_kwargs={"use_reentrant": False}',
            )
        return found

    def continues(self, ids: torch.Tensor) -> bool:
        """Whether this is the prompt that was routed by last, one token longer than before.

        So a generation without a cache asks at every step; its beams may have changed places.
        """
        if self.prompt is None:
            return False
        prompt, length = self.prompt
        if len(ids) != len(prompt) or ids.shape[1] != length + 1:
            return False
        if not torch.equal(ids[:, : prompt.shape[1]], prompt):
            return False
        self.prompt = prompt, length + 1
        return True

    def forget(self, adapter: str) -> None:
        """Drop all that was said of a mixture."""
        self.decided = {key: c for key, c in self.decided.items() if key[1] != adapter}
        self.blind = {key for key in self.blind if key[1] != adapter}
        self.given.pop(adapter, None)

    def shares(self, rows: int, active: Sequence[str]) -> list[tuple[str, torch.Tensor | None]]:
        """(adapter, its rows) for a batch; None: all of them.

        Beam search repeats each row of a prompt, and so the names.
        """
        if self.names is None:
            return [(name, None) for name in active]
        if rows % len(self.names):
            raise IncompatibleAdapters(
                f"adapter_names has {len(self.names)} names for a batch of {rows} rows",
                hint="give one name a row",
            )
        # Every module asks; the answer changes with beams, and with the block of mixed().
        if self._shared is None or self._shared[0] != rows:
            times = rows // len(self.names)
            found: dict[str, list[int]] = {}
            for i, name in enumerate(self.names):
                found.setdefault(name, []).extend(range(i * times, (i + 1) * times))
            self._shared = rows, [(n, torch.tensor(x)) for n, x in found.items() if n != BASE]
        return self._shared[1]


@contextmanager
def mixed(flow: Flow, names: Sequence[str] | None) -> Iterator[None]:
    """Each row of the batches in the block has the adapter of that name."""
    before, flow.names, flow._shared = flow.names, names, None
    try:
        yield
    finally:
        flow.names, flow._shared = before, None
