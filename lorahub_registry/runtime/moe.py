"""Experts inside a feed-forward module: MixLoRA's mathematics (arXiv:2404.15159).

    y = Σ_e w_e FFN_e(h),    every projection of FFN_e being W + s B_e A_e

The base's gate and up are taken once for all tokens. Tokens are sorted by expert, and what is
low-rank is a product grouped by expert. Since the down projection is linear,
``Σ w_e (W a_e + s B_e A_e a_e) = W (Σ w_e a_e) + s Σ w_e B_e A_e a_e``: the base's down is taken
once, too. Where experts are DoRA (MixDoRA), each output is scaled by its own
``m / ‖W + sBA‖`` and down is taken for each expert's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from lorahub_registry.adapters.mixlora import MixLora, Routing, Switch, TopK, TopP
from lorahub_registry.runtime.autocast import no_autocast
from lorahub_registry.runtime.mlp import Mlp
from lorahub_registry.runtime.moe_inner import (
    ExpertFactors,
    MoeExperts,
    Work,
    norms_of,
    scaled,
    scales,
)

__all__ = [
    "Chosen", "ExpertFactors", "MoeExperts", "combined", "logits_of", "norms_of", "places", "route",
    "router_losses", "top_p",
]  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """Which expert sees which token, sorted by expert.

    Attributes:
        token: int64 [pairs], numbers of tokens.
        weight: float32 [pairs].
        counts: int64 [experts], how many of the pairs each has.
        total: float32 [tokens], sums of the weights; None: they are all one.
        through: float32 [tokens], what multiplies tokens that no expert has room for; or None.
    """

    token: torch.Tensor
    weight: torch.Tensor
    counts: torch.Tensor
    total: torch.Tensor | None = None
    through: torch.Tensor | None = None

    @property
    def expert(self) -> torch.Tensor:
        """int64 [pairs]."""
        numbers = torch.arange(len(self.counts), device=self.counts.device)
        return numbers.repeat_interleave(self.counts, output_size=len(self.token))

    def among(self, kept: torch.Tensor) -> Chosen:
        """Of the tokens that ``kept``, bool [tokens], is true at, counted anew."""
        here = kept[self.token]
        counts = self.expert[here].bincount(minlength=len(self.counts))
        total, through = (None if t is None else t[kept] for t in (self.total, self.through))
        token = (kept.cumsum(0) - 1)[self.token[here]]
        return Chosen(token, self.weight[here], counts, total, through)


def logits_of(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The router's, at least in float32, under autocast, too: [tokens, experts]."""
    wide = torch.promote_types(torch.promote_types(x.dtype, gate.dtype), torch.float32)
    with no_autocast(x.device):
        return functional.linear(x.to(wide), gate.to(wide))


def route(
    logits: torch.Tensor,
    routing: Routing,
    *,
    rows: int = 1,
    real: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> Chosen:
    """Which experts see which tokens.

    Args:
        logits: [tokens, experts].
        rows: how many sequences the tokens are of, one after the other (switch).
        real: bool [tokens], false at padding, which takes no room (switch).
        seen: int64 [rows, experts], room that earlier tokens of the sequences have taken (switch).
    """
    if isinstance(routing, TopK):
        values, which = logits.topk(min(routing.k, logits.shape[-1]), -1)
        return _pairs(values.softmax(-1), which, logits.shape[-1])
    probabilities = logits.softmax(-1)
    if isinstance(routing, TopP):
        values, which = top_p(probabilities, routing)
        return _pairs(values, which, logits.shape[-1], total=values.sum(-1))
    assert isinstance(routing, Switch)
    best, which = probabilities.max(-1)
    taken = places(which, logits.shape[-1], rows, real=real, seen=seen)
    fits = taken <= routing.capacity
    token = fits.nonzero()[:, 0]
    order = which[token].argsort(stable=True)
    token = token[order]
    counts = which[token].bincount(minlength=logits.shape[-1])
    return Chosen(
        token, best[token], counts, total=torch.where(fits, best, 0.0),
        through=torch.where(fits, 0.0, best),
    )  # fmt: skip


def top_p(probabilities: torch.Tensor, routing: TopP) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, expert numbers), [..., experts], largest first; 0 where an expert is cut.

    The one at which the running sum passes p is the last that stays; weights are not renormalised.
    A temperature divides the probabilities, as m-LoRA has it, and so the weights, too.
    """
    if routing.temperature > 0:
        probabilities = probabilities / routing.temperature
    values, which = probabilities.sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values
    return torch.where(before > routing.p, 0.0, values), which


def places(
    which: torch.Tensor,
    experts: int,
    rows: int,
    *,
    real: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """int64 [tokens]: the how-manyth of its sequence each token is at its expert, from 1."""
    hot = functional.one_hot(which, experts)
    if real is not None:
        hot = hot * real[:, None]
    order = hot.view(rows, -1, experts).cumsum(1)
    if seen is not None:
        order = order + seen[:, None]
    return order.view(-1, experts).gather(1, which[:, None])[:, 0]


def _pairs(
    values: torch.Tensor, which: torch.Tensor, experts: int, total: torch.Tensor | None = None
) -> Chosen:
    k, flat = which.shape[-1], which.flatten()
    order = flat.argsort(stable=True)
    if total is not None:  # some are cut
        order = order[values.flatten()[order] != 0]  # NaN stays
    counts = flat[order].bincount(minlength=experts)
    return Chosen(order // k, values.flatten()[order], counts, total)


def combined(
    mlp: Mlp, experts: MoeExperts, x: torch.Tensor, chosen: Chosen, *, dropout: bool = False
) -> torch.Tensor:
    """What the experts give together: [tokens, width], x's dtype.

    Under autocast the base's own modules are cast, and nothing else.

    Args:
        x: [tokens, width].
        dropout: low-rank parts see what dropout leaves.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    stack, last = experts.stacks.get(mlp.last), mlp.linear(mlp.last)
    dora = stack is not None and stack.magnitude is not None
    work = Work(mlp, experts, chosen, wide, dropout, summed=not dora)
    inner, codes = work.inner(x)
    bias = getattr(last, "bias", None)
    if dora:
        assert stack is not None
        each = last(inner.to(x.dtype)).to(wide)
        with no_autocast(x.device):
            delta = work.whole().products(codes, stack.b.to(wide))
        scale = scales(last, stack, experts.scaling).to(wide)[chosen.expert]
        each = scaled(each, delta * experts.scaling, scale, bias) * chosen.weight[:, None]
        found = each.new_zeros(len(x), each.shape[-1]).index_add(0, chosen.token, each)
    else:
        found = last(inner.to(x.dtype)).to(wide)
        if chosen.total is not None and bias is not None:
            found = found + (chosen.total - 1)[:, None] * bias
        if stack is not None:
            spread = codes.new_zeros(len(x), *stack.b.shape[:2])
            spread = spread.index_put((chosen.token, chosen.expert), codes)
            b = stack.b.flatten(0, 1).to(wide)
            with no_autocast(x.device):
                found = torch.addmm(found, spread.flatten(1), b, alpha=experts.scaling)
    if chosen.through is not None:
        found = found + chosen.through[:, None] * x
    return mlp.dropped(found.to(x.dtype))


def router_losses(
    logits: Sequence[torch.Tensor], mix: MixLora, real: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """What a router is held to beside the model's loss, each with its coefficient.

    Args:
        logits: of each layer, [tokens, experts].
        real: bool [tokens], false at padding, which does not count.

    Returns:
        ``aux``: how far experts are from equal loads. Uniform routing gives k times the
        coefficient (top-k), and 1 times (switch). ``z`` (switch): mean squared log of the
        partition function. All are float32 at least, and zero where no token is real.
    """
    kept = [each if real is None else each[real.to(each.device)] for each in logits]
    whole = torch.cat([each.to(kept[0].device) for each in kept])
    whole = whole.to(torch.promote_types(whole.dtype, torch.float32))
    if not len(whole):
        names = ("aux", "z") if isinstance(mix.routing, Switch) else ("aux",)
        return {name: whole.sum() for name in names}
    probabilities, experts = whole.softmax(-1), mix.num_experts
    if isinstance(mix.routing, TopK):
        which = whole.topk(mix.routing.k, -1).indices
        load = functional.one_hot(which, experts).sum(1).to(whole.dtype)
    elif isinstance(mix.routing, TopP):
        values, which = top_p(probabilities, mix.routing)
        load = torch.zeros_like(probabilities).scatter(-1, which, (values > 0).to(whole.dtype))
    else:
        load = functional.one_hot(probabilities.argmax(-1), experts).to(whole.dtype)
    balance = experts * (load.mean(0) * probabilities.mean(0)).sum()
    found = {"aux": mix.router_aux_loss_coef * balance}
    if isinstance(mix.routing, Switch):
        found["z"] = mix.router_z_loss_coef * whole.logsumexp(-1).square().mean()
    return found
