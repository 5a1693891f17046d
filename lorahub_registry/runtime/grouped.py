"""The operator grown to train: each row of a batch has its own adapter, and every adapter learns.

    y_j = W x_j + s_j B_j A_j x_j                 for the rows j of one adapter

The base's product is taken once for all rows; what is low-rank, row group by row group, on the
factors where they lie. Gradients are added straight into buffers that the caller owns, so a pass
over many adapters makes no more autograd nodes than a pass over one. No gradient goes from one
group of rows to another: each adapter learns what it would learn alone.

DoRA (arXiv:2402.09353) scales what comes out: ``y = m / ‖W + sBA‖ · (W + sBA) x + bias``, norms
over each output's row and taken as constants. The norms need no dense product:
‖W + sBA‖² = ‖W‖² + 2s (W Aᵀ)·B + s² (B AAᵀ)·B, summed over each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lorahub_registry.adapters.mixlora import MixLora
from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.grouped_experts import ExpertLayer, LayerExperts, losses_of
from lorahub_registry.runtime.linear import is_trainable, weight_of
from lorahub_registry.runtime.mixture import RowsMerged
from lorahub_registry.runtime.seeds import seed_of


@dataclass
class Factors:
    """One adapter on one module, and where its gradients go. All float32, on the module's device.

    Attributes:
        a, b: [rank, fan_in] and [fan_out, rank].
        grad_a, grad_b: of the same shapes; added to.
        scaling: α/r, or what takes its place.
        start: frozen (A, B) whose product is taken off: what PiSSA and OLoRA move out of the base.
        magnitude, grad_magnitude: [fan_out], of DoRA; None for plain LoRA.
        dropout: share of the inputs that the low-rank part does not see while it trains.
    """

    a: torch.Tensor
    b: torch.Tensor
    grad_a: torch.Tensor
    grad_b: torch.Tensor
    scaling: float
    start: tuple[torch.Tensor, torch.Tensor] | None = None
    magnitude: torch.Tensor | None = None
    grad_magnitude: torch.Tensor | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Share:
    """The rows of a batch that belong to one adapter.

    Attributes:
        adapter: its number.
        start, stop: which rows.
        seed: of this batch's dropout; None: none is dropped.
    """

    adapter: int
    start: int
    stop: int
    seed: int | None = None


class Grouped:
    """Many adapters on one model, whose modules compute with them meanwhile; a context manager.

    Args:
        model: the base, its weights frozen.
        adapters: for each, module → factors.
        experts: for each, feed-forward module → its experts there; None: none has any.

    Attributes:
        shares: who owns which rows of the next forward; rows of nobody get what the base gives.
        real: bool [rows, positions] of the next forward, false at padding; None: all are.
        noted: (number of a share, layer) → its router's logits in this forward.
        layers: what computes in each module's place.

    Raises:
        IncompatibleAdapters: a module is none that can be trained here.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[Mapping[str, Factors]],
        experts: Sequence[Mapping[str, LayerExperts]] | None = None,
    ) -> None:
        self.shares: Sequence[Share] = ()
        self.real: torch.Tensor | None = None
        self.noted: dict[tuple[int, int], tuple[torch.Tensor, MixLora]] = {}
        names = sorted({name for adapter in adapters for name in adapter})
        self.layers: list[_Layer | ExpertLayer] = [
            _Layer(name, model.get_submodule(name), [a.get(name) for a in adapters], self)
            for name in names
        ]
        for name in sorted({name for held in experts or () for name in held}):
            held = [each.get(name) for each in experts or ()]
            self.layers.append(ExpertLayer(name, model.get_submodule(name), held, self))
        self._before: list[Any] = []
        device = next(model.parameters()).device
        # What stands on a frozen base needs a gradient only because this does.
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def __enter__(self) -> Grouped:
        for layer in self.layers:
            # accelerate, too, gives modules a forward of their own.
            self._before.append(layer.module.__dict__.get("forward"))
            layer.module.forward = layer.forward
        return self

    def __exit__(self, *_: object) -> None:
        for layer, before in zip(self.layers, self._before, strict=True):
            del layer.module.forward
            if before is not None:
                layer.module.forward = before
        self._before.clear()
        self.begin((), None)

    def begin(self, shares: Sequence[Share], real: torch.Tensor | None) -> None:
        """The next forward is of these rows."""
        self.shares, self.real = shares, real
        self.noted.clear()

    def extra(self) -> dict[int, torch.Tensor]:
        """Number of a share of the last ``begin`` → a loss of its own, beside its tokens'."""
        return losses_of(self.noted)


class _Layer:
    """One module of the base with every adapter's factors."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        factors: Sequence[Factors | None],
        owner: Grouped,
    ) -> None:
        if not is_trainable(module):
            raise IncompatibleAdapters(
                f"{name} is a {type(module).__name__}: adapters are trained on linear modules",
                hint="name others in target_modules",
            )
        self.name, self.factors = name, factors
        self.module: Any = module
        self._owner, self._plainly = owner, module.forward
        # Others know better how to multiply by what they hold.
        self.dense = type(module) is nn.Linear
        self._norms: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> Any:
        """What the module gives, with each row's adapter added."""
        shares = [
            (s, factors)
            for s in self._owner.shares
            if (factors := self.factors[s.adapter]) is not None
        ]
        if not shares:
            return self._plainly(x)
        last = max(s.stop for s in self._owner.shares)
        if x.dim() != 3 or x.shape[0] < last:
            raise RowsMerged(
                f"{self.name} gets its rows as {tuple(x.shape[:-1])}, so they cannot have adapters "
                "of their own there",
                hint="leave this module out of target_modules",
            )
        norms = [None if f.magnitude is None else self._norm(f) for _, f in shares]
        out = None if self.dense else self._plainly(x)
        return _Add.apply(out, x, self._owner.anchor, self, shares, norms)

    def mask(self, share: Share, factors: Factors, x: torch.Tensor) -> torch.Tensor | None:
        """What dropout leaves of [rows, positions, fan_in], scaled up; None where it leaves all.

        Drawn position by position from the share's own seed, so that neither padding nor the other
        rows change it on a CPU.
        """
        if not factors.dropout or share.seed is None:
            return None
        generator = torch.Generator(x.device)
        generator.manual_seed(seed_of(share.seed, self.name))
        rows, positions, width = x.shape
        kept = torch.empty(positions, rows, width, device=x.device)
        kept.bernoulli_(1 - factors.dropout, generator=generator)
        return kept.div_(1 - factors.dropout).transpose(0, 1).reshape(-1, width)

    @torch.no_grad()
    def _norm(self, f: Factors) -> torch.Tensor:
        """‖W + sBA‖ of each output, [fan_out], float32."""
        if self._norms is None:
            self._norms = weight_of(self.module).square().sum(1)
        product = functional.linear(f.a, weight_of(self.module))  # (W Aᵀ)ᵀ
        squares = self._norms + 2 * f.scaling * (product.T * f.b).sum(1)
        squares += f.scaling**2 * ((f.b @ (f.a @ f.a.T)) * f.b).sum(1)
        return squares.clamp_min_(0).sqrt_()


class _Add(torch.autograd.Function):
    """[rows, positions, fan_out]: the base's product with every share's low-rank part added.

    The product is taken here where the module is dense, and comes as ``out`` where it is not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor | None,
        x: torch.Tensor,
        anchor: torch.Tensor,
        layer: _Layer,
        shares: list[tuple[Share, Factors]],
        norms: list[torch.Tensor | None],
    ) -> torch.Tensor:
        module: Any = layer.module
        kept: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        bias = getattr(module, "bias", None)
        y = functional.linear(x, module.weight, bias) if out is None else out.clone()
        for (share, f), norm in zip(shares, norms, strict=True):
            seen, mask = _seen(layer, share, f, x)
            low = seen @ f.a.T
            part = y[share.start : share.stop].view(-1, y.shape[-1])
            if part.dtype == torch.float32 and f.start is None and norm is None:
                part.addmm_(low, f.b.T, alpha=f.scaling)
                kept.append((low, None))
                continue
            delta = torch.mm(low, f.b.T).mul_(f.scaling)
            if f.start is not None:
                delta.addmm_(seen @ f.start[0].T, f.start[1].T, alpha=-f.scaling)
            if norm is None:
                part.add_(delta)
                kept.append((low, None))
                continue
            assert f.magnitude is not None
            # With dropout, only what is scaled anew sees the inputs that are left.
            whole = part if mask is None else functional.linear(seen, weight_of(module))
            if mask is None and bias is not None:
                whole = whole - bias
            delta += whole
            part.copy_(part - whole + f.magnitude / norm * delta)
            kept.append((low, delta))
        # Saved so that activation checkpointing finds all of them.
        ctx.save_for_backward(x, *(tensor for pair in kept for tensor in pair))
        ctx.layer, ctx.shares, ctx.norms = layer, shares, norms
        return y

    @staticmethod
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, *saved = ctx.saved_tensors
        kept = list(zip(saved[::2], saved[1::2], strict=True))
        layer: _Layer = ctx.layer
        need_x = ctx.needs_input_grad[1]
        through, extra = _scaled(ctx, [delta for _, delta in kept], gy)
        gx = None
        if need_x:
            gx = through @ layer.module.weight if layer.dense else torch.zeros_like(x)
        for (share, f), (low, _), more in zip(ctx.shares, kept, extra, strict=True):
            seen, mask = _seen(layer, share, f, x)
            g = through[share.start : share.stop].reshape(-1, gy.shape[-1]).float()
            g = g if more is None else more
            glow = torch.mm(g, f.b)
            f.grad_b.addmm_(g.T, low, alpha=f.scaling)
            f.grad_a.addmm_(glow.T, seen, alpha=f.scaling)
            if gx is None:
                continue
            part = gx[share.start : share.stop].view(-1, x.shape[-1])
            if mask is None and f.start is None and part.dtype == torch.float32:
                part.addmm_(glow, f.a, alpha=f.scaling)
                continue
            back = torch.mm(glow, f.a).mul_(f.scaling)
            if f.start is not None:
                back.addmm_(torch.mm(g, f.start[1]), f.start[0], alpha=-f.scaling)
            if more is not None:  # of m/‖·‖ − 1 times the product with what dropout left
                whole = gy[share.start : share.stop].reshape(-1, gy.shape[-1]).float()
                back += (more - whole) @ weight_of(layer.module)
            part.add_(back if mask is None else back.mul_(mask))
        return (None if layer.dense else through), gx, None, None, None, None


def _scaled(
    ctx: Any, deltas: Sequence[torch.Tensor | None], gy: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Adds up the magnitudes' gradients.

    Returns:
        The gradient of what the base's product is, in DoRA's rows scaled as what came out of it;
        and for each share with dropout and DoRA, whose product keeps its size, the scaled one.
    """
    through = gy
    extra: list[torch.Tensor | None] = []
    for (share, f), norm, scaled in zip(ctx.shares, ctx.norms, deltas, strict=True):
        if norm is None:
            extra.append(None)
            continue
        g = gy[share.start : share.stop].reshape(-1, gy.shape[-1]).float()
        assert scaled is not None
        f.grad_magnitude.add_((g * scaled).sum(0) / norm)
        g = g * (f.magnitude / norm)
        if f.dropout and share.seed is not None:
            extra.append(g)
            continue
        through = gy.clone() if through is gy else through
        through[share.start : share.stop] = g.view_as(gy[share.start : share.stop])
        extra.append(None)
    return through, extra


def _seen(
    layer: _Layer, share: Share, f: Factors, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A share's inputs as its low-rank part sees them, [tokens, fan_in] float32, and the mask."""
    part = x[share.start : share.stop]
    mask = layer.mask(share, f, part)
    flat = part.reshape(-1, x.shape[-1]).float()
    return (flat if mask is None else flat * mask), mask
