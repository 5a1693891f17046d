"""The loss of a training pass, in the memory that its logits lie in.

Softmax and gradient overwrite the logits, some rows at a time: of a large vocabulary's three
copies (logits, their softmax, their gradient) one is left, and it is touched while it is cached.
"""

from __future__ import annotations

from typing import Any

import torch

from lorahub_registry.evaluate.tokens import IGNORED

_ROWS = 8  # a chunk of 32,000 logits each stays in a core's cache


class _OverLogits(torch.autograd.Function):
    """−log p of each label; 0 where it is ``IGNORED``. The logits are overwritten."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        picked = labels.clamp_min(0)[:, None]
        losses = torch.empty(labels.shape, device=logits.device)
        for at in range(0, len(labels), _ROWS):
            rows, own = logits[at : at + _ROWS], losses[at : at + _ROWS]
            right = rows.gather(1, picked[at : at + _ROWS])
            most = rows.amax(1, keepdim=True)
            whole = rows.sub_(most).exp_().sum(1, keepdim=True)
            torch.sub(most + whole.log(), right, out=own[:, None])
            rows.div_(whole)
        ctx.save_for_backward(labels)
        ctx.softmax = logits.detach()
        return losses.masked_fill_(labels == IGNORED, 0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (labels,) = ctx.saved_tensors
        found: torch.Tensor = ctx.softmax
        ctx.softmax = None  # a second backward would take the gradient for the softmax
        gradient = gradient.masked_fill(labels == IGNORED, 0)[:, None]
        # Logits that are not finite have no gradient but where they are asked for.
        found.mul_(gradient).masked_fill_(gradient == 0, 0)
        found.scatter_add_(1, labels.clamp_min(0)[:, None], -gradient)
        return found, None


def losses_over(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log p of each label, [rows, positions]; 0 where it is ``IGNORED``.

    Args:
        logits: [rows, positions, vocabulary], fresh from the model; float32 ones are overwritten.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    if flat.dtype == torch.float32:
        return _OverLogits.apply(flat, labels.reshape(-1)).view(labels.shape)
    losses = torch.nn.functional.cross_entropy(
        flat.float(), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape)
