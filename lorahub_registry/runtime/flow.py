"""What the layers of one model share while a mixture runs in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.mixture import Coefficients

BASE = "__base__"
"""PEFT's name, in mixed batches, for rows that get no adapter."""


NO_BACKWARD = -1


def _backward() -> int:
    """Number of the backward that is running."""
    return torch._C._current_graph_task_id()


@dataclass(frozen=True, eq=False)
class _Made:
    """Mark of one decision: where, and in which backward."""

    key: tuple[str, str]
    backward: int


def _passed(made: _Made, waiting: WeakSet[_Made]) -> None:
    """A backward has come by; one that keeps its graph may come again."""
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        waiting.discard(made)


@dataclass
class Generation:
    """One run of ``generate``: whatever it calls answers the prompt that it was given.

    Attributes:
        length: of the prompt; None: unknown.
        decided: adapter → what the prompt was routed to.
    """

    length: int | None = None
    decided: dict[str, Coefficients] = field(default_factory=dict)


@dataclass
class Flow:
    """What the layers of one model share while it runs; in one thread at a time.

    Attributes:
        decided: (place, adapter) → coefficients; the place is a gate's, or ``prompt``.
        given: adapter → coefficients that the caller has set in place of the router's.
        names: of a mixed batch, the adapter of each row; None: the active ones, for all rows.
        watched: called with adapter, module and coefficients of whatever computes; None: nobody.
        silent: experts say nothing: the base alone is asked.
        prompts: 1 at the tokens that prompt routers read, where answers follow them; None: all.
        caches: key–value cache → adapter → what its prompt was routed to.
        generation: the run of ``generate`` that is on; None: plain calls.
        blind: what gates that train have decided while no gradient was recorded.
    """

    decided: dict[tuple[str, str], Coefficients] = field(default_factory=dict)
    given: dict[str, Coefficients] = field(default_factory=dict)
    names: Sequence[str] | None = None
    watched: Any = None
    silent: bool = False
    prompts: torch.Tensor | None = None
    caches: WeakIdKeyDictionary = field(
        default_factory=lambda: WeakIdKeyDictionary(ref_type=WeakIdRef)
    )
    generation: Generation | None = None
    blind: set[tuple[str, str]] = field(default_factory=set)
    _shared: tuple[int, list[tuple[str, torch.Tensor | None]]] | None = None
    _made: dict[tuple[str, str], _Made] = field(default_factory=dict)
    # Decisions that a backward has yet to come to; each lives as long as its graph.
    _waiting: WeakSet[_Made] = field(default_factory=WeakSet)

    def __reduce__(self) -> tuple[type[Flow], tuple[()]]:
        # What was decided belongs to a run of the model, and may hang on its graph.
        return Flow, ()

    def decide(self, place: str, adapter: str, c: Coefficients, *, trains: bool) -> None:
        """Keep what a gate says; ``trains``: gradients have to reach it."""
        self.decided[place, adapter] = c
        if trains and not torch.is_grad_enabled():
            self.blind.add((place, adapter))
        else:
            self.blind.discard((place, adapter))
        if torch.compiler.is_compiling():
            return
        made = self._made[place, adapter] = _Made((place, adapter), _backward())
        if torch.is_grad_enabled() and c.values.requires_grad:
            self._waiting.add(made)
            # The graph holds the hook, and the hook the mark, but nothing that holds the graph.
            c.values.register_hook(lambda _, made=made, of=self._waiting: _passed(made, of))

    def read(self, place: str, adapter: str, module: str) -> Coefficients:
        """What was decided at ``place`` for ``module``.

        Raises:
            IncompatibleAdapters: nothing was, gradients would not reach who decided it, or a
                checkpointed layer is computed again after something else was decided.
        """
        found = self.decided.get((place, adapter))
        if found is None:
            raise IncompatibleAdapters(
                f"{module} was called before {place!r}, which decides its coefficients",
                hint="call the whole model, not one of its parts",
            )
        if not torch.compiler.is_compiling() and _backward() != NO_BACKWARD:
            self._check_own(place, adapter, module)
        apart = found.values.requires_grad and not torch.is_grad_enabled()
        if apart or (torch.is_grad_enabled() and (place, adapter) in self.blind):
            raise IncompatibleAdapters(
                f"{module} is computed twice, apart from the gate of {place!r}, by reentrant "
                "checkpointing: the gate would not get its gradient",
                hint='gradient_checkpointing_kwargs={"use_reentrant": False}',
            )
        return found

    def _check_own(self, place: str, adapter: str, module: str) -> None:
        """Refuse what a checkpointed layer may read that was not decided for it.

        Its gate is not asked again (its hook stands outside the checkpoint), so what it reads is
        what was decided last: right only where no other forward still awaits its backward.
        """
        made = self._made.get((place, adapter))
        if made is not None and made.backward == _backward():
            return  # the gate was asked again, by a checkpoint that holds the hook, too
        others = {one for one in self._waiting if one.key == (place, adapter)} - {made}
        if made not in self._waiting or others:
            raise IncompatibleAdapters(
                f"{module} is computed again by checkpointing, and {place!r} has decided for "
                "another batch since, or trains nothing",
                hint="call backward after each forward, or train without gradient checkpointing",
            )

    def forget(self, adapter: str) -> None:
        """Drop all that was said of a mixture."""
        self.decided = {key: c for key, c in self.decided.items() if key[1] != adapter}
        self._made = {key: made for key, made in self._made.items() if key[1] != adapter}
        self.blind = {key for key in self.blind if key[1] != adapter}
        self.given.pop(adapter, None)
        for said in self.caches.values():
            said.pop(adapter, None)

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
def mixed(model: Any, names: Sequence[str] | None) -> Iterator[None]:
    """Each row of the batches in the block has the adapter of that name.

    Args:
        model: a PEFT model with a flow.

    Raises:
        ValueError: no adapter of the model is called so.
    """
    if names is not None and (unknown := sorted(set(names) - {*model.peft_config, BASE})):
        raise ValueError(f"adapter_names: no adapter is called {', '.join(unknown)}")
    flow: Flow = model._flow
    before, flow.names, flow._shared = flow.names, names, None
    try:
        yield
    finally:
        flow.names, flow._shared = before, None
