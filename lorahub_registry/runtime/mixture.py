"""The operator with coefficients that differ from token to token, or that leave most experts out.

    y = W x + B_cat [(A_cat x) ⊙ expand(c)]

One function for every provider of ``c``. Where ``c`` names a few of many experts, each is computed
on the tokens at which it speaks. Ranks may differ between experts, and an expert may be absent from
a module (rank 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lorahub_registry.errors import UsageError
from lorahub_registry.runtime.operator import RowsMerged

# What the forms of the operator cost, see Experts._cheapest; one core of a CPU, ranks of 16.
# Reading an expert's factors; copying them; a token in a batch of small products; sorting tokens
# by expert; the calls for one expert; moving a token to its expert and back.
_READ, _COPY, _SMALL, _SORT, _CALL, _MOVE = 27, 60, 3, 1000, 130, 10


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
        if not values.is_floating_point() or not torch.isfinite(values).all():
            raise UsageError(f"coefficients of {values.dtype} that are no finite numbers")
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
        self._equal = len(set(self.ranks)) == 1
        # Made outside inference mode, so that gates can still be trained after an evaluation.
        with torch.inference_mode(False):
            self._owner = torch.arange(len(ranks), device=a.device).repeat_interleave(
                torch.tensor(ranks, device=a.device)
            )

    @property
    def device(self) -> torch.device:
        """Where its numbers of ranks lie; the factors may have been moved since."""
        return self._owner.device

    def add(self, y: torch.Tensor, x: torch.Tensor, c: Coefficients) -> torch.Tensor:
        """``y`` with what the experts give for ``x``, computed in the factors' dtype.

        Args:
            y: [..., fan_out], fresh from the base; overwritten where no gradient is recorded.
            x: [..., fan_in], of as many tokens.
            c: of rows and positions as ``x`` has them; one line a row is spread over the row's
                tokens, and over the beams that follow each other.

        Raises:
            RowsMerged: the module does not see rows and positions as ``c`` does.
        """
        if self._plainest(y, x, c):
            # What decoding does in every module: nothing but the products.
            low = functional.linear(x, self.a)
            low.view(*x.shape[:2], len(self.ranks), self.ranks[0]).mul_(c.values[..., None])
            y.flatten(0, 1).addmm_(low.flatten(0, 1), self.b.mT)
            return y
        tokens = x.reshape(-1, x.shape[-1]).to(self.a.dtype)
        lines = self._lines(c, x)
        # [lines, experts]: what shares its coefficients stands together, and in order.
        values = c.values.reshape(lines, -1).to(tokens)
        out = y.reshape(-1, y.shape[-1])
        if c.which is None:
            found = self._all(out, tokens, values)
        else:
            which = c.which.reshape(lines, -1).to(tokens.device)
            found = self._few(out, tokens, values, which)
        return found.to(y.dtype).view(y.shape)

    def _plainest(self, y: torch.Tensor, x: torch.Tensor, c: Coefficients) -> bool:
        """Whether tokens stand as their coefficients do, all is of one dtype, and none is kept."""
        values = c.values
        return (
            c.which is None
            and self._equal
            and values.device == x.device
            and values.dim() == x.dim() == 3
            and values.shape[:2] == x.shape[:2]
            and self.a.dtype == x.dtype == y.dtype == values.dtype
            and y.is_contiguous()
            and not torch.is_grad_enabled()
        )

    def _lines(self, c: Coefficients, x: torch.Tensor) -> int:
        """How many lines of coefficients the module's tokens have, one after the other."""
        if c.values.dim() == 1:
            return 1
        rows, positions = c.values.shape[:2]
        whole = math.prod(x.shape[:-1])
        lines = rows * positions
        # Some models give a module all tokens in one row; then their number alone can tell.
        merged = x.dim() < 3 or x.shape[0] == 1
        if positions == 1 and whole % rows == 0 and (merged or x.shape[0] % rows == 0):
            return rows
        if whole == lines and (merged or x.shape[1] in {1, positions}):
            return lines
        raise RowsMerged(
            f"{self.name} gets its tokens as {tuple(x.shape[:-1])} where {rows} rows of "
            f"{positions} have coefficients, so they cannot be told apart there",
            hint="leave this module out of the adapters' target_modules",
        )

    def _all(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        values: torch.Tensor,
        which: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Every expert on every token."""
        if which is not None:
            values = Coefficients(values, which).dense(len(self.ranks))
        low, times = functional.linear(x, self.a), len(x) // len(values)
        if self._equal:
            apart = low.view(len(values), times, len(self.ranks), self.ranks[0])
            scale = values.view(len(values), 1, -1, 1)
        else:
            apart = low.view(len(values), times, low.shape[-1])
            scale = values[:, None, self._owner]
        return _plus(out, _times(apart, scale).view(low.shape), self.b.T)

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
        rank, chosen = self.ranks[0], which.flatten()
        a = self.a.view(len(self.ranks), rank, self.a.shape[-1]).index_select(0, chosen)
        low = torch.bmm(x.view(lines, len(x) // lines, -1), a.view(lines, k * rank, a.shape[-1]).mT)
        low = _times(low.view(lines, low.shape[1], k, rank), values[:, None, :, None]).view_as(low)
        out = out.view(*low.shape[:2], -1)
        b = self.b.view(len(self.b), len(self.ranks), rank).index_select(1, chosen)
        b = b.view(len(self.b), lines, k * rank).permute(1, 2, 0)
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


def _plus(out: torch.Tensor, low: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if out.dtype != low.dtype:
        return out + low @ b
    return torch.addmm(out, low, b) if torch.is_grad_enabled() else out.addmm_(low, b)


def gate(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, temperature: float
) -> torch.Tensor:
    """LoRA-Flow's gate, ``softmax(W x / T) + b``, at least in float32: [..., E].

    The bias stands outside the softmax: weights need not sum to 1, and may be negative.

    Args:
        x: [..., width].
        weight, bias: [E, width] and [E].
    """
    if not x.dtype == weight.dtype == bias.dtype == torch.float32:
        wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        x, weight, bias = x.to(wide), weight.to(wide), bias.to(wide)
    logits = functional.linear(x, weight)
    if temperature != 1:
        logits = logits / temperature
    return logits.softmax(-1) + bias


def arrow(
    x: torch.Tensor, prototypes: torch.Tensor, top_k: int, temperature: float
) -> Coefficients:
    """Arrow's coefficients: softmax over the ``top_k`` largest ``|x · prototype|``.

    Args:
        x: [rows, positions, fan_in], or [tokens, fan_in].
        prototypes: [E, fan_in], unit vectors; zero where an expert does not sit on the module.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    near = functional.linear(x.to(wide), prototypes.to(wide)).abs()
    # Who is not there has nothing to say, and takes no share.
    near = near.masked_fill(~prototypes.any(-1), float("-inf"))
    found = largest(near / temperature, top_k)
    values = found.values.softmax(-1).nan_to_num(0.0)
    if values.dim() == 2:  # tokens without rows
        return Coefficients(values[:, None], None if found.which is None else found.which[:, None])
    return Coefficients(values, found.which)
