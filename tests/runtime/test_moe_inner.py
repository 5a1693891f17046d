"""What experts compute again in backward: the same numbers, and little is kept for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorahub_registry.adapters.mixlora import TopK
from lorahub_registry.runtime.mlp import Mlp
from lorahub_registry.runtime.moe import (
    ExpertFactors,
    MoeExperts,
    combined,
    logits_of,
    norms_of,
    route,
)

WIDTH, INNER, EXPERTS, RANK = 8, 16, 5, 4


class Block(nn.Module):
    """A feed-forward module, frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.requires_grad_(False)


def draw(tokens: int, *, dora: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    block = Block().to(dtype)
    made = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=made) * 0.5).to(dtype).requires_grad_()

    stacks = {}
    for name in ("gate", "up", "down"):
        fan_out, fan_in = getattr(block, name).weight.shape
        size = (normal(EXPERTS, fan_out),) if dora else ()
        stacks[name] = ExpertFactors(
            normal(EXPERTS, RANK, fan_in), normal(EXPERTS, RANK, fan_out), *size
        )
    experts = MoeExperts(normal(EXPERTS, WIDTH), stacks, 1.5, dropout=0.4)
    return Mlp(block, ("gate", "up"), "down", nn.SiLU(), True), experts, normal(tokens, WIDTH)


def of(dtype: torch.dtype, held: MoeExperts) -> MoeExperts:
    """The same in another dtype, without dropout."""
    stacks = {
        name: ExpertFactors(*(None if t is None else t.to(dtype) for t in (s.a, s.b, s.magnitude)))
        for name, s in held.stacks.items()
    }
    return MoeExperts(held.gate.to(dtype), stacks, held.scaling)


def run(mlp: Mlp, experts: MoeExperts, x: torch.Tensor, *, dropout: bool = False) -> torch.Tensor:
    chosen = route(logits_of(x, experts.gate), TopK(2))
    return combined(mlp, experts, x, chosen, dropout=dropout)


def leaves(experts: MoeExperts, x: torch.Tensor) -> list[torch.Tensor]:
    stacks = experts.stacks.values()
    factors = [t for s in stacks for t in (s.a, s.b, s.magnitude) if t is not None]
    return [x, experts.gate, *factors]


@pytest.mark.parametrize("dora", [False, True])
def test_many_tokens_are_the_sum_of_single_ones(dora: bool) -> None:
    """One token is one run of experts, and sixty are several."""
    mlp, experts, x = draw(60, dora=dora)
    every = leaves(experts, x)
    found = run(mlp, experts, x)
    alone = torch.cat([run(mlp, experts, x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)
    made = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    pairs = [torch.autograd.grad((y * made).sum(), every) for y in (found, alone)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(run(mlp, experts, x), found, rtol=1e-12, atol=1e-12)


def test_backward_drops_what_forward_dropped() -> None:
    mlp, experts, x = draw(24)

    def seeded(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        stacks = dict(experts.stacks) | {"up": ExpertFactors(experts.stacks["up"].a, b)}
        return run(mlp, MoeExperts(experts.gate, stacks, 1.5, dropout=0.4), x, dropout=True)

    b = experts.stacks["up"].b
    assert torch.autograd.gradcheck(seeded, (x, b), fast_mode=True)
    first, second = (run(mlp, experts, x, dropout=True) for _ in range(2))
    assert not torch.equal(first, second)


def test_nothing_of_the_pairs_is_kept() -> None:
    """Of the base's two products one copy each, whatever k is: not one of each pair's."""
    tokens = 50
    mlp, experts, x = draw(tokens)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1:] == (INNER,) and tensor.dim() == 2 and len(tensor) >= tokens:
            kept[tensor.untyped_storage().data_ptr()] = len(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(mlp, experts, x)
    assert sorted(kept.values()) == [tokens, tokens]


def test_autocast_trains() -> None:
    mlp, experts, x = draw(20, dtype=torch.float32)
    wanted = torch.autograd.grad(run(mlp, experts, x).square().sum(), leaves(experts, x))
    with torch.autocast("cpu", torch.bfloat16):
        found = run(mlp, experts, x)
    grads = torch.autograd.grad(found.float().square().sum(), leaves(experts, x))
    for one, other in zip(grads[2:], wanted[2:], strict=True):
        assert torch.dist(one, other) < 0.1 * other.norm()


def test_norms_are_kept_while_nothing_changes() -> None:
    mlp, experts, _ = draw(1, dora=True)
    module, stack = mlp.linear("up"), experts.stacks["up"]
    assert norms_of(module, stack, 1.5) is not norms_of(module, stack, 1.5)  # it trains
    for each in leaves(experts, stack.a):
        each.requires_grad_(False)

    def dense() -> torch.Tensor:
        return (module.weight + 1.5 * stack.b.mT @ stack.a).norm(dim=-1)

    first = norms_of(module, stack, 1.5)
    assert norms_of(module, stack, 1.5) is first
    torch.testing.assert_close(first, dense())
    assert not torch.allclose(norms_of(module, stack, 3.0), first)
    for change in (stack.a, stack.b, module.weight):
        change.mul_(2)
        torch.testing.assert_close(norms_of(module, stack, 1.5), dense())
    stack.b.data = stack.b * 2
    torch.testing.assert_close(norms_of(module, stack, 1.5), dense())
    module.weight = nn.Parameter(module.weight * 2, requires_grad=False)
    torch.testing.assert_close(norms_of(module, stack, 1.5), dense())


def test_norms_see_edits_that_no_tensor_counts() -> None:
    mlp, experts, _ = draw(1, dora=True)
    module, stack = mlp.linear("up"), experts.stacks["up"]
    for each in leaves(experts, stack.a):
        each.requires_grad_(False)
    before = norms_of(module, stack, 1.5)
    for change in (stack.a, stack.b, module.weight):
        change.data.mul_(2)
        after = norms_of(module, stack, 1.5)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, (module.weight + 1.5 * stack.b.mT @ stack.a).norm(dim=-1))
        before = after


@pytest.mark.parametrize("dora", [False, True])
def test_autocast_casts_the_bases_modules_alone(dora: bool) -> None:
    """As with a base whose outputs alone are rounded."""
    mlp, experts, x = draw(40, dora=dora, dtype=torch.float32)

    class Rounded(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias
            self.in_features, self.out_features = inner.in_features, inner.out_features

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    wanted = run(mlp, experts, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(mlp, experts, x)
    for name in mlp.names:
        setattr(mlp.module, name, Rounded(mlp.linear(name)))
    rounded = run(mlp, experts, x)
    torch.testing.assert_close(found, rounded, rtol=0, atol=0)
    assert not torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_a_wider_base_computes_wide(dora: bool) -> None:
    mlp, experts, x = draw(40, dora=dora)
    narrow = of(torch.float32, experts)
    wide = of(torch.float64, narrow)
    found = run(mlp, narrow, x)
    torch.testing.assert_close(found, run(mlp, wide, x), rtol=1e-12, atol=1e-12)
    found.sum().backward()
    assert all(each.grad is not None for each in leaves(experts, x))


@pytest.mark.parametrize("dora", [False, True])
def test_products_by_groups_are_those_by_expert(dora: bool) -> None:
    """Single precision takes grouped products, double does not; two experts see no token."""
    mlp, experts, x = draw(40, dora=dora)
    with torch.no_grad():
        x[:, 0] = 1
        experts.gate[2:4, 0] = -100
    wanted = run(mlp, experts, x)
    grads = torch.autograd.grad(wanted.sum(), leaves(experts, x))
    mlp.module.float()
    found = run(mlp, of(torch.float32, experts), x.float())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    again = torch.autograd.grad(found.sum(), leaves(experts, x))
    for one, other in zip(again, grads, strict=True):
        assert torch.dist(one, other) <= 1e-4 * other.norm()
    assert run(mlp, of(torch.float32, experts), x[:0].float()).shape == (0, WIDTH)
