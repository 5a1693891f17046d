"""What MixLoRA's layers share while their model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from lorahub_registry.adapters.mixlora import MixLora
from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.flow import NO_BACKWARD, Flow
from lorahub_registry.runtime.moe import router_losses


@dataclass
class MoeFlow(Flow):
    """What the experts of one model share while it runs; in one thread at a time.

    Attributes:
        real: bool [rows, positions] of the tokens that layers get now, false at padding; None:
            all are.
        padded: the model was given a mask of another form than [rows, positions].
        logits: (adapter, layer) → the router's, of this forward, while they are collected.
        collects: whether they are.
        learning: (adapter, layer) whose router gets a gradient from ``logits``.
        seen: called with adapter, layer, logits [tokens, experts], which experts were chosen, and
            ``real`` of these tokens; None: nobody.
        room: (adapter, layer) → int64 [rows, experts]: how many tokens of each row have gone to
            each expert, earlier ones in the cache included (switch).
        rooms: cache → its length, and ``room`` of all that is in it.
        within: a forward of the whole model is on.
    """

    real: torch.Tensor | None = None
    padded: bool = False
    logits: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    collects: bool = False
    learning: set[tuple[str, int]] = field(default_factory=set)
    seen: Callable[..., None] | None = None
    room: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    rooms: WeakIdKeyDictionary = field(
        default_factory=lambda: WeakIdKeyDictionary(ref_type=WeakIdRef)
    )
    within: bool = False
    _began: dict[tuple[str, int], torch.Tensor] | None = field(default_factory=dict)
    # ``real`` of the tokens that ``logits`` are of.
    _noted: torch.Tensor | None = None
    # Number of the backward that is on, and ``real`` of the forwards that it has come to.
    _backward: tuple[int, list[torch.Tensor | None]] = (NO_BACKWARD, [])

    def __reduce__(self) -> tuple[type[MoeFlow], tuple[()]]:
        return MoeFlow, ()

    def begin(self, real: torch.Tensor | None, padded: bool, cache: Any, training: bool) -> None:
        """A forward of the whole model begins."""
        self.real = self._noted = real
        self.padded, self.collects, self.within = padded, training, True
        self.logits.clear()
        self.learning.clear()
        self.room = {}
        self._began = {}
        if cache is not None and cache.get_seq_length():
            length, room = self.rooms.get(cache, (None, None))
            self._began = room if length == cache.get_seq_length() else None  # it was cut since

    def end(self, cache: Any, given: Sequence[torch.Tensor]) -> None:
        """It has ended, with this cache.

        Args:
            given: what it gave and gradients may come from.
        """
        if cache is not None and self.room:
            self.rooms[cache] = cache.get_seq_length(), dict(self.room)
        for tensor in given if self.room else ():  # of a switch, whose layers ask again()
            if tensor.requires_grad:
                tensor.register_hook(partial(self._come, self.real))
        self.real, self.collects, self.within, self._began = None, False, False, {}

    def _come(self, real: torch.Tensor | None, _: torch.Tensor) -> None:
        """A backward has come to the forward of these tokens."""
        number = torch._C._current_graph_task_id()
        if self._backward[0] != number:
            self._backward = number, []
        if not any(real is each for each in self._backward[1]):
            self._backward[1].append(real)

    def taken(self, key: tuple[str, int], rows: int) -> torch.Tensor | None:
        """Room that earlier tokens have taken of one layer's experts, [rows, experts].

        Raises:
            IncompatibleAdapters: that is not known.
        """
        found = None if self._began is None else self._began.get(key)
        # None: not known at all; without this key: another adapter's cache.
        if found is None and self._began != {}:
            raise IncompatibleAdapters(
                "the cache was not begun with this adapter: how much room its tokens have taken "
                "at the experts is not known",
                hint="give the model the whole prompt, or the cache that it returned for it",
            )
        if found is not None and len(found) != rows:
            raise IncompatibleAdapters(
                f"the cache is of {len(found)} rows and the batch of {rows}: with switch routing "
                "rows cannot be taken out of a batch or repeated in it",
                hint="generate without beams",
            )
        return found

    def again(self) -> torch.Tensor | None:
        """``real`` of the forward that checkpointing computes again.

        Raises:
            IncompatibleAdapters: there are several that it may be.
        """
        number, known = self._backward
        if number != torch._C._current_graph_task_id() or len(known) != 1:
            raise IncompatibleAdapters(
                "a layer with switch routing is computed again by checkpointing, and of which "
                "batch is not known",
                hint="call backward on the loss or the logits of one forward at a time, or train "
                "without gradient checkpointing",
            )
        return known[0]

    def losses(self, adapter: str, mix: MixLora) -> dict[str, torch.Tensor]:
        """What this forward's router is held to, see :func:`.moe.router_losses`.

        Raises:
            IncompatibleAdapters: no gradient would get from it to the router.
        """
        own = [key for key in sorted(self.logits) if key[0] == adapter]
        logits = [self.logits[key] for key in own]
        if not logits or not mix.router_loss:
            return {}
        lost = [key for key in own if key in self.learning and not self.logits[key].requires_grad]
        if torch.is_grad_enabled() and lost:
            raise IncompatibleAdapters(
                "layers are computed twice by reentrant checkpointing, and no gradient of the "
                "balancing loss would get to the router",
                hint='gradient_checkpointing_kwargs={"use_reentrant": False}',
            )
        real = None if self._noted is None else self._noted.flatten()
        return router_losses(logits, mix, real if real is None or len(real) == len(logits[0])
                             else None)  # fmt: skip

    def forget(self, adapter: str) -> None:
        """Drop all that was said of an adapter."""
        super().forget(adapter)
        self.logits = {key: v for key, v in self.logits.items() if key[0] != adapter}
        self.learning = {key for key in self.learning if key[0] != adapter}
        # A cache that other adapters have room in, too, is not begun with this one any more.
        for _, room in self.rooms.values():
            for key in [key for key in room if key[0] == adapter]:
                del room[key]
        for cache in [cache for cache, (_, room) in self.rooms.items() if not room]:
            del self.rooms[cache]
