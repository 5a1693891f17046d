"""The operator: several adapters' factors beside a module, each with its coefficient.

    y = W x + B_cat [(A_cat x) ⊙ expand(c)]

A_cat and B_cat are the adapters' factors one after the other, their scalings folded in; every rank
belongs to one adapter, and ``expand`` hands the adapter's coefficient out. It is exact for any
weighted sum of deltas: ranks may differ, and an adapter may be absent from a module (rank 0).

Whoever decides ``c`` (static ratios, a search's candidates, gates, a router, the caller) hands over
:class:`Coefficients`: one for all tokens, for each row, or for each token, and of all experts or of
a few. Where it names a few of many, each is computed on the tokens at which it speaks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lorahub_registry.errors import IncompatibleAdapters, UsageError
from lorahub_registry.runtime.autocast import autocasts, no_autocast

# What the forms of the operator cost, see Experts._cheapest; one core of a CPU, ranks of 16.
# Reading an expert's factors; copying them; a token in a batch of small products; sorting tokens
# by expert; the calls for one expert; moving a token to its expert and back.
_READ, _COPY, _SMALL, _SORT, _CALL, _MOVE = 27, 60, 3, 1000, 130, 10


class RowsMerged(IncompatibleAdapters):
    """A module does not see the rows of a batch apart (OPT's ``fc1``, the experts of mixtures)."""


@dataclass(frozen=True)
class Coefficients:
    """How loud each expert speaks.

    Attributes:
        values: floating point, [E] for all tokens, [rows, 1, E] or [rows, positions, E]; the last
            is K where ``which`` says of whom.
        which: int64, the shape of ``values``: numbers of the experts that speak, each once a
            token; None: all, in their order.
    """

    values: torch.Tensor
    which: torch.Tensor | None = None

    def check(self, experts: int) -> None:
        """See that a caller's are for so many experts.

        Raises:
            UsageError: they are of another shape or kind, not finite, or name others.
        """
        values, which, shape = self.values, self.which, tuple(self.values.shape)
        if values.dim() not in {1, 3} or (which is None and shape[-1] != experts):
            raise UsageError(
                f"coefficients of shape {list(shape)} for {experts} experts",
                hint=f"give [{experts}], or [rows, 1, {experts}] with a line for each row",
            )
        if not values.is_floating_point():
            raise UsageError(
                f"coefficients must be floating point, and these are {values.dtype}",
                hint="torch.tensor([1.0, 0.0]), or .float() of what you have",
            )
        if not torch.isfinite(values).all():
            raise UsageError("coefficients that are no finite numbers")
        if which is None:
            return
        if values.dim() != 3 or which.shape != values.shape or which.dtype != torch.int64:
            raise UsageError(
                f"which says {list(which.shape)} {which.dtype} of coefficients {list(shape)}",
                hint="give int64 numbers of experts, [rows, 1, K] as the coefficients",
            )
        if which.numel() and not 0 <= int(which.min()) <= int(which.max()) < experts:
            raise UsageError(f"which names experts that are not among 0 to {experts - 1}")

    def dense(self, experts: int) -> torch.Tensor:
        """[..., E], zero for those that do not speak."""
        if self.which is None:
            return self.values
        shape = (*self.values.shape[:-1], experts)
        return self.values.new_zeros(shape).scatter(-1, self.which, self.values)

    def rows(self, rows: torch.Tensor, of: int) -> Coefficients:
        """Of some of a batch's ``of`` rows; of all tokens, where they are the same for all.

        Beams repeat each row, and where a module gets tokens without rows each is one.
        """
        if self.values.dim() == 1:
            return self
        found, times = self, of // max(len(self.values), 1)
        if times > 1 and times == self.values.shape[1]:
            found = self._each(lambda t: t.flatten(0, 1)[:, None])
        elif times > 1:
            found = self._each(lambda t: t.repeat_interleave(times, 0))
        return found._each(lambda t: t[rows.to(t.device)])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Coefficients:
        return Coefficients(change(self.values), None if self.which is None else change(self.which))


def turned(factor: torch.Tensor) -> torch.Tensor:
    """The same matrix with its columns in order in memory: how products of few tokens want both."""
    return factor.mT.contiguous().mT


def largest(values: torch.Tensor, top_k: int) -> Coefficients:
    """The ``top_k`` largest of [..., E], or all where that is no fewer."""
    if top_k >= values.shape[-1]:
        return Coefficients(values)
    return Coefficients(*values.topk(top_k, dim=-1))


class Experts:
    """Several adapters' factors on one module.

    Args:
        a: [ranks, fan_in], one expert's after the other's; ``ranks`` is their sum.
        b: [fan_out, ranks], the scalings folded in.
        ranks: of each expert; 0 where it does not sit on the module.
        name: the module's, for messages.
    """

    def __init__(
        self, a: torch.Tensor, b: torch.Tensor, ranks: Sequence[int], name: str = ""
    ) -> None:
        self.a, self.b, self.ranks, self.name = a, b, tuple(ranks), name
        self._equal = len(set(self.ranks)) == 1 and self.ranks[0] > 0
        self._owner: torch.Tensor | None = None
        self._transposed: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def owner(self) -> torch.Tensor:
        """[ranks], int64: the expert of each rank, on the device where the factors lie now."""
        kept, where = self._owner, self.a.device
        if kept is None or kept.device != where:
            numbers = [i for i, rank in enumerate(self.ranks) for _ in range(rank)]
            if torch.compiler.is_compiling():  # a constant of the graph, which goes on
                return torch.tensor(numbers, dtype=torch.int64, device=where)
            # Made outside inference mode, so that gates can still be trained after an evaluation.
            with torch.inference_mode(False):
                kept = self._owner = torch.tensor(numbers, dtype=torch.int64, device=where)
        return kept

    def add(self, y: torch.Tensor, x: torch.Tensor, c: Coefficients | None = None) -> torch.Tensor:
        """``y`` with what the experts give for ``x``, computed in the factors' dtype.

        Args:
            y: [..., fan_out], fresh from the base; overwritten where no gradient is recorded.
            x: [..., fan_in], of as many tokens.
            c: of rows and positions as ``x`` has them; one line a row is spread over the row's
                tokens, and over the beams that follow each other. None: all experts, as they are.

        Raises:
            RowsMerged: the module does not see rows and positions as ``c`` does.
        """
        if c is not None and self._plainest(y, x, c):
            # What decoding does in every module, where each call counts: just the products.
            kept = self._transposed
            if (
                kept is None
                or kept[0].data_ptr() != self.a.data_ptr()
                or kept[1].data_ptr() != self.b.data_ptr()
            ):
                kept = self._transposed = self.a.mT, self.b.mT  # moved, or put in anew
            a, b = kept
            low, experts = x.view(-1, x.shape[-1]).mm(a), len(self.ranks)
            low.view(-1, experts, self.ranks[0]).mul_(c.values.view(-1, experts, 1))
            y.view(-1, y.shape[-1]).addmm_(low, b)
            return y
        tokens = x.reshape(-1, x.shape[-1])
        if tokens.dtype != self.a.dtype:
            tokens = tokens.to(self.a.dtype)
        with no_autocast(x.device):
            if c is None or c.which is None:
                return self._plus(y, functional.linear(tokens, self.a), c, x.shape[:-1])
            lines = self._lines(c.values, x.shape[:-1])
            values = c.values.reshape(lines, -1).to(tokens)
            which = c.which.reshape(lines, -1).to(tokens.device)
            found = self._few(y.reshape(-1, y.shape[-1]), tokens, values, which)
            return found.to(y.dtype).view(y.shape)

    def add_embedded(
        self, y: torch.Tensor, ids: torch.Tensor, c: Coefficients | None, scale: float
    ) -> torch.Tensor:
        """The same on an embedding, which multiplies by ``scale`` what it looks up at ``ids``."""
        low = functional.embedding(ids.flatten(), self.a.T) * scale
        with no_autocast(y.device):
            return self._plus(y, low, c, ids.shape)

    def _plainest(self, y: torch.Tensor, x: torch.Tensor, c: Coefficients) -> bool:
        """Whether tokens stand as their coefficients do, all is of one kind, and none is kept."""
        values = c.values
        return (
            c.which is None
            and self._equal
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not autocasts(x.device)
            and (values.dim() == 1 or values.shape[:-1] == x.shape[:-1])
            and self.a.dtype == x.dtype == y.dtype == values.dtype
            and values.device == x.device
            and x.is_contiguous()
            and y.is_contiguous()
            and values.is_contiguous()
        )

    def _lines(self, values: torch.Tensor, tokens: Sequence[int]) -> int:
        """How many lines of coefficients the module's tokens have, one after the other."""
        if values.dim() == 1:
            return 1
        rows, positions = values.shape[:2]
        whole, lines = math.prod(tokens), rows * positions
        # Some models give a module all tokens in one row; then their number alone can tell.
        merged = len(tokens) < 2 or tokens[0] == 1
        if positions == 1 and whole % rows == 0 and (merged or tokens[0] % rows == 0):
            return rows
        if whole == lines and (merged or tokens[1] in {1, positions}):
            return lines
        raise RowsMerged(
            f"{self.name} gets its tokens as {tuple(tokens)} where {rows} rows of "
            f"{positions} have coefficients, so they cannot be told apart there",
            hint="leave this module out of the adapters' target_modules",
        )

    def _plus(
        self, y: torch.Tensor, low: torch.Tensor, c: Coefficients | None, tokens: Sequence[int]
    ) -> torch.Tensor:
        """``y`` with every expert's part of ``low``, A·x of all ``tokens`` in one row."""
        if c is not None:
            lines = self._lines(c.values, tokens)
            low = self._scaled(low, c.values.reshape(lines, -1).to(low))
        return _added(y.reshape(-1, y.shape[-1]), low, self.b.mT).to(y.dtype).view(y.shape)

    def _scaled(self, low: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[tokens, ranks] times [lines, experts]."""
        (lines, experts), times = values.shape, len(low) // len(values)
        if self._equal:
            apart = low.view(lines, times, experts, self.ranks[0])
            scale = values.view(lines, 1, experts, 1)
        else:
            apart = low.view(lines, times, low.shape[-1])
            scale = values[:, None, self.owner]
        return _times(apart, scale).view(low.shape)

    def _all(
        self, out: torch.Tensor, x: torch.Tensor, values: torch.Tensor, which: torch.Tensor
    ) -> torch.Tensor:
        """Every expert on every token."""
        values = Coefficients(values, which).dense(len(self.ranks))
        return _added(out, self._scaled(functional.linear(x, self.a), values), self.b.mT)

    # How many tokens come to an expert is not known while torch.compile makes a graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _few(
        self, out: torch.Tensor, x: torch.Tensor, values: torch.Tensor, which: torch.Tensor
    ) -> torch.Tensor:
        """The experts that speak, in the form that costs least."""
        found: torch.Tensor = self._cheapest(which, len(x) // len(which))(out, x, values, which)
        return found

    def _cheapest(self, which: torch.Tensor, times: int) -> Any:
        """The form that costs least, in products of one token with one expert's factors."""
        (lines, k), experts = which.shape, len(self.ranks)
        tokens = lines * times
        costs: dict[Any, int] = {self._all: experts * (_READ + tokens)}
        calls = min(experts, lines * k)
        costs[self._by_expert] = _SORT + _CALL * calls + _MOVE * tokens * k
        if self._equal:
            costs[self._gathered] = _COPY * lines * k + _SMALL * tokens * k
        return min(costs, key=lambda form: costs[form])

    def _gathered(
        self, out: torch.Tensor, x: torch.Tensor, values: torch.Tensor, which: torch.Tensor
    ) -> torch.Tensor:
        """Every line with a copy of its own experts' factors."""
        lines, k = which.shape
        rank, chosen, experts = self.ranks[0], which.flatten(), len(self.ranks)
        a = self.a.mT.view(self.a.shape[-1], experts, rank).index_select(1, chosen)
        a = a.view(len(a), lines, k * rank).transpose(0, 1)
        low = torch.bmm(x.view(lines, len(x) // lines, -1), a)
        low = _times(low.view(lines, low.shape[1], k, rank), values[:, None, :, None]).view_as(low)
        out = out.view(*low.shape[:2], -1)
        b = self.b.mT.view(experts, rank, len(self.b)).index_select(0, chosen)
        b = b.view(lines, k * rank, len(self.b))
        if out.dtype != low.dtype:
            return out + torch.bmm(low, b)
        return torch.baddbmm(out, low, b) if torch.is_grad_enabled() else out.baddbmm_(low, b)

    def _by_expert(
        self, out: torch.Tensor, x: torch.Tensor, values: torch.Tensor, which: torch.Tensor
    ) -> torch.Tensor:
        """Each expert on the tokens that it speaks at."""
        k, times, found = which.shape[-1], len(x) // len(which), out.to(x.dtype)
        if torch.is_grad_enabled():
            found = found.clone()
        if times > 1:  # one line for several tokens
            values, which = values.repeat_interleave(times, 0), which.repeat_interleave(times, 0)
        order = which.flatten().argsort(stable=True)
        counts = which.flatten().bincount(minlength=len(self.ranks)).tolist()
        place, scale = order // k, values.flatten()[order, None]
        at = start = 0
        for rank, count in zip(self.ranks, counts, strict=True):
            if count and rank:
                here = place[at : at + count]
                low = functional.linear(x[here], self.a[start : start + rank])
                low = _times(low, scale[at : at + count])
                found.index_add_(0, here, functional.linear(low, self.b[:, start : start + rank]))
            at, start = at + count, start + rank
        return found


def _times(low: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return low * scale if torch.is_grad_enabled() else low.mul_(scale)


def _added(out: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if out.dtype != low.dtype:
        return out + low @ b
    return torch.addmm(out, low, b) if torch.is_grad_enabled() else out.addmm_(low, b)
