"""What is computed as its inputs are, whatever ``torch.autocast`` the caller has on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocasts(device: torch.device) -> bool:
    """Whether products on ``device`` fall to half precision now."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which they do not."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
