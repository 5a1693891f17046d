"""What comes before the last product of experts: some of them at a time, on their own tokens.

The base's products are taken once for all tokens. What is low-rank is added, and the activation
passed, run by run: a few experts' pairs fit a CPU's cache. Backward computes all of it again from
the base's products, for kept it would be several times what the base itself keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from lorahub_registry.runtime.autocast import no_autocast
from lorahub_registry.runtime.linear import weight_of
from lorahub_registry.runtime.mlp import Mlp

if TYPE_CHECKING:
    from lorahub_registry.runtime.moe import Chosen


@dataclass(frozen=True)
class ExpertFactors:
    """One projection's low-rank parts of all experts.

    Attributes:
        a: [experts, rank, fan_in].
        b: [experts, rank, fan_out]: B of each, turned, so that all of them are one matrix.
        magnitude: [experts, fan_out], of DoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None = None


@dataclass(frozen=True)
class MoeExperts:
    """What one layer's experts compute with, in float32 on the layer's device.

    Attributes:
        gate: [experts, width], the router.
        stacks: name of a linear module → its parts; those that no expert adapts are absent.
        scaling: α/r, or what takes its place.
        dropout: share of the inputs that low-rank parts do not see while they train.
    """

    gate: torch.Tensor
    stacks: Mapping[str, ExpertFactors]
    scaling: float
    dropout: float = 0.0


@dataclass(frozen=True)
class _Run:
    """Some experts in a row that are computed together.

    Attributes:
        experts: which.
        pairs: theirs.
        token: int64, their tokens.
        counts: how many of the pairs each of them has.
    """

    experts: slice
    pairs: slice
    token: torch.Tensor
    counts: list[int]

    def products(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Each pair with its expert's matrix: [pairs, n] and [experts, n, m] → [pairs, m]."""
        if len(factors) == 1:
            return x @ factors[0]
        if _aligned(x, factors):
            ends = torch.tensor(self.counts, dtype=torch.int32, device=x.device).cumsum(0)
            return functional.grouped_mm(x, factors, offs=ends.to(torch.int32))
        each = zip(x.split(self.counts), factors, strict=True)
        found = [part @ factor for part, factor in each if len(part)]
        return torch.cat(found) if found else x @ factors[0]

    def each(self, values: torch.Tensor) -> torch.Tensor:
        """Every pair's of [experts, …]; of one expert, what is broadcast."""
        if len(values) == 1:
            return values
        counts = torch.tensor(self.counts, device=values.device)
        return values.repeat_interleave(counts, 0, output_size=len(self.token))


class Work:
    """One forward of :func:`~.moe.combined` but for its last product, some experts at a time.

    Attributes:
        summed: experts' results are added up before the last product.
        counts: how many pairs each expert has.
    """

    def __init__(
        self, mlp: Mlp, experts: MoeExperts, chosen: Chosen, wide: torch.dtype, dropout: bool,
        *, summed: bool,
    ) -> None:  # fmt: skip
        self._mlp, self._experts, self._wide, self.summed = mlp, experts, wide, summed
        self._token, self._weight = chosen.token, chosen.weight
        self._drop = experts.dropout if dropout else 0.0
        self._seed = int(torch.randint(2**62, ())) if self._drop else 0
        self.counts: list[int] = chosen.counts.tolist()

    def inner(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([tokens, ffn], what the last product gets of each token; [pairs, rank], its low-rank
        part's codes). Where experts' results are not summed, the first is [pairs, ffn]."""
        wholes = [self._mlp.linear(name)(x) for name in self._mlp.first]
        factors: list[torch.Tensor] = []
        for name in self._mlp.names:
            if (stack := self._experts.stacks.get(name)) is None:
                continue
            factors.append(stack.a.to(self._wide))
            if name != self._mlp.last:
                factors.append(stack.b.to(self._wide))
                if stack.magnitude is not None:
                    scale = scales(self._mlp.linear(name), stack, self._experts.scaling)
                    factors.append(scale.to(self._wide))
        found: tuple[torch.Tensor, torch.Tensor] = _Inner.apply(
            self, self._weight, x, *wholes, *factors
        )
        return found

    def runs(self) -> Iterator[_Run]:
        """All experts, those without pairs beside others; nothing where nobody has any."""
        # Rows that stay in a CPU's cache from step to step; on a GPU, launches are what costs.
        enough = 16 if self._token.device.type == "cpu" else 8192
        first = begin = end = 0
        for e, count in enumerate(self.counts, 1):
            end += count
            last = end == len(self._token)
            if end - begin >= enough or (last and end > begin):
                e = len(self.counts) if last else e
                here = slice(begin, end)
                yield _Run(slice(first, e), here, self._token[here], self.counts[first:e])
                if last:
                    return
                first, begin = e, end

    def whole(self) -> _Run:
        """All pairs at once."""
        every = slice(0, len(self.counts)), slice(0, len(self._token))
        return _Run(*every, self._token, self.counts)

    def taken(self, run: _Run, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What of ``tensors`` some experts see."""
        weight, rows, factors = self._kinds(tensors)
        seen = [rows_of.index_select(0, run.token) for rows_of in rows]
        return [weight[run.pairs], *seen, *(factor[run.experts] for factor in factors)]

    def of_tokens(self, i: int) -> bool:
        """Whether the ``i``-th of the tensors has a row for each token."""
        return 0 < i < 2 + len(self._mlp.first)

    def _kinds(self, tensors: Sequence[Any]) -> tuple[Any, Sequence[Any], Sequence[Any]]:
        """(of pairs, of tokens, of experts)."""
        rows = 2 + len(self._mlp.first)
        return tensors[0], tensors[1:rows], tensors[rows:]

    def generator(self) -> torch.Generator | None:
        """Of dropout: the same each time that this forward is computed."""
        if not self._drop:
            return None
        found = torch.Generator(self._token.device)
        found.manual_seed(self._seed)
        return found

    def compute(
        self, run: _Run, tensors: Sequence[torch.Tensor], drawn: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Some experts' part of :meth:`inner`, of what they have :meth:`taken`."""
        weight, (x, *wholes), factors = self._kinds(tensors)
        x, left, stacks = x.to(self._wide), iter(factors), self._experts.stacks
        in_place = not torch.is_grad_enabled()  # all that is taken is a copy
        parts = []
        for name, base in zip(self._mlp.first, wholes, strict=True):
            whole = base.to(self._wide)
            if name in stacks:
                low = run.products(self._kept(x, drawn), next(left).mT) * self._experts.scaling
                b = next(left)
                if stacks[name].magnitude is not None:
                    bias = getattr(self._mlp.linear(name), "bias", None)
                    whole = scaled(whole, run.products(low, b), run.each(next(left)), bias)
                elif len(b) == 1:
                    whole = whole.addmm_(low, b[0]) if in_place else whole.addmm(low, b[0])
                else:
                    delta = run.products(low, b)
                    whole = whole.add_(delta) if in_place else whole + delta
            parts.append(whole)
        inner = self._mlp.between(parts)
        codes = inner.new_empty(len(inner), 0)
        if self._mlp.last in stacks:
            codes = run.products(self._kept(inner, drawn), next(left).mT)
        if self.summed:
            weight = weight[:, None].to(self._wide)
            codes = codes * weight
            inner = inner.mul_(weight) if in_place else inner * weight
        return inner, codes

    def _kept(self, x: torch.Tensor, drawn: torch.Generator | None) -> torch.Tensor:
        """What dropout leaves."""
        if drawn is None:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self._drop, generator=drawn)
        return x * kept.div_((1 - self._drop) or 1)

    def room(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For what :meth:`inner` gives."""
        stack, pairs = self._experts.stacks.get(self._mlp.last), len(self._token)
        rank = 0 if stack is None else stack.a.shape[1]
        inner = x.new_zeros(len(x) if self.summed else pairs, self._mlp.width[1], dtype=self._wide)
        return inner, inner.new_empty(pairs, rank)


class _Inner(torch.autograd.Function):
    """:meth:`Work.inner`. Nothing [pairs, ffn] is kept for backward, which computes it again from
    what the base gives, [tokens, ffn]: a fifth of the memory."""

    @staticmethod
    def forward(ctx: Any, work: Work, *tensors: torch.Tensor) -> Any:
        ctx.work = work
        ctx.save_for_backward(*tensors)
        inner, codes = work.room(tensors[1])
        drawn = work.generator()
        with torch.autocast(inner.device.type, enabled=False):
            for run in work.runs():
                one, codes[run.pairs] = work.compute(run, work.taken(run, tensors), drawn)
                if work.summed:
                    inner.index_add_(0, run.token, one)
                else:
                    inner[run.pairs] = one
        return inner, codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_inner: torch.Tensor, g_codes: torch.Tensor) -> Any:
        work, tensors, wanted = ctx.work, ctx.saved_tensors, ctx.needs_input_grad[1:]
        grads: list[Any] = [
            torch.zeros_like(t) if w and work.of_tokens(i) else []
            for i, (t, w) in enumerate(zip(tensors, wanted, strict=True))
        ]
        drawn = work.generator()
        for run in work.runs():
            taken = [
                t.detach().requires_grad_(w)
                for t, w in zip(work.taken(run, tensors), wanted, strict=True)
            ]
            with torch.enable_grad(), torch.autocast(g_inner.device.type, enabled=False):
                out = work.compute(run, taken, drawn)
            back = g_inner.index_select(0, run.token) if work.summed else g_inner[run.pairs]
            through = [(o, g) for o, g in zip(out, (back, g_codes[run.pairs]), strict=True)
                       if o.requires_grad]  # fmt: skip
            asked = [i for i, w in enumerate(wanted) if w]
            found = torch.autograd.grad(
                [o for o, _ in through], [taken[i] for i in asked], [g for _, g in through],
                allow_unused=True,
            )  # fmt: skip
            for i, part in zip(asked, found, strict=True):
                if part is not None and work.of_tokens(i):
                    grads[i].index_add_(0, run.token, part)
                elif part is not None:
                    grads[i].append(part)
        for i, grad in enumerate(grads):
            if isinstance(grad, list):  # of pairs or of experts, which the runs go through in order
                grads[i] = torch.cat(grad) if len(grad) > 1 else grad[0] if grad else None
        return None, *grads


def scales(module: Any, stack: ExpertFactors, scaling: float) -> torch.Tensor:
    """What DoRA multiplies each expert's outputs by, [experts, fan_out]."""
    assert stack.magnitude is not None
    return stack.magnitude / norms_of(module, stack, scaling)


def scaled(
    whole: torch.Tensor, delta: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """DoRA's output; a base's bias is not scaled."""
    if bias is None:
        return (whole + delta) * scale
    return (whole - bias + delta) * scale + bias


_NORMS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@torch.no_grad()
def norms_of(module: nn.Module, stack: ExpertFactors, scaling: float) -> torch.Tensor:
    """‖W + sBA‖ of each expert's outputs, [experts, fan_out]; taken as constants, as in DoRA.

    Without the dense sums: ‖W‖² + 2s (W Aᵀ)·B + s² (B AAᵀ)·B, summed over each row. Kept beside A
    while nothing trains, for this costs as much as a forward of experts x rank tokens: of eight
    experts of rank 16, seven times the forward of one token. Sums of the factors and of some of the
    weight's entries tell edits of ``.data``, which no tensor counts. Of the weight's, those that
    leave all of these entries alone are not seen.
    """
    known: Any = module.weight
    held = (known, stack.a, stack.b)
    kept = not any(each.requires_grad or each.is_inference() for each in held)
    state: tuple[Any, ...] = ()
    if kept:
        some = known.detach().reshape(-1)
        some = some[:: len(some) // 1024 | 1].float()
        sums = torch.stack([each.detach().sum().float() for each in (stack.a, stack.b, some)])
        told = ((each.data_ptr(), each._version) for each in held)
        state = scaling, *sums.tolist(), *told
    before = _NORMS.get(stack.a) if kept else None
    if (
        before
        and before[0] == state
        and all(a() is b for a, b in zip(before[1], held, strict=True))
    ):
        return before[2]
    wide = torch.float64 if known.dtype == torch.float64 else stack.a.dtype
    weight, a, b = weight_of(module, wide), stack.a.to(wide), stack.b.to(wide)
    with no_autocast(a.device):
        cross = torch.matmul(a, weight.T)  # [experts, rank, fan_out]
        squares = weight.square().sum(1) + 2 * scaling * (cross * b).sum(1)
        squares += scaling**2 * ((a @ a.mT @ b) * b).sum(1)
    norms = squares.clamp_min_(0).sqrt_()
    if kept:
        _NORMS[stack.a] = state, tuple(map(weakref.ref, held)), norms
    return norms


def _aligned(x: torch.Tensor, factors: torch.Tensor) -> bool:
    """Whether ``grouped_mm`` takes them: single or half precision, rows of whole 16 bytes."""
    sizes = (x.shape[-1], *factors.shape[1:])
    # Older torch has none.
    there = hasattr(functional, "grouped_mm") and x.dtype != torch.float64
    return there and x.dtype == factors.dtype and all(size * x.itemsize % 16 == 0 for size in sizes)
