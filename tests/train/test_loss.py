"""The loss that overwrites its logits, against torch's own."""

import pytest
import torch
from torch.nn import functional

from lorahub_registry.evaluate.tokens import IGNORED
from lorahub_registry.train.loss import losses_over


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_cross_entropy(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 5, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(31, 5, generator=generator).to(dtype) * 3
    labels = torch.randint(31, (3, 7), generator=generator)
    labels[0, :4] = labels[2, 6] = IGNORED
    weights = torch.rand(3, 1, generator=generator)
    found = []
    for ours in (True, False):
        logits = functional.linear(hidden, head)
        if ours:
            losses = losses_over(logits, labels)
        else:
            flat = functional.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), reduction="none"
            )
            losses = flat.view(3, 7)
        (losses * weights).sum().backward()
        found.append((losses.detach(), hidden.grad.clone()))
        hidden.grad = None
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not found[0][0][labels == IGNORED].any()


def test_a_row_that_is_not_finite_leaves_the_others_alone():
    hidden = torch.randn(2, 3, 5)
    hidden[0] = float("inf")
    hidden.requires_grad_()
    labels = torch.tensor([[1, 2, 3], [4, 5, IGNORED]])
    losses = losses_over(functional.linear(hidden, torch.randn(9, 5)), labels)
    losses.sum().backward()
    assert not torch.isfinite(losses[0]).any()
    assert torch.isfinite(losses[1]).all()
    assert torch.isfinite(hidden.grad[1]).all()


def test_what_somebody_else_needs_of_the_logits_is_not_silently_overwritten():
    hidden = torch.randn(1, 2, 5, requires_grad=True)
    logits = functional.linear(hidden, torch.randn(9, 5)).tanh()  # which keeps what it gave
    losses = losses_over(logits, torch.tensor([[1, 2]]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()
