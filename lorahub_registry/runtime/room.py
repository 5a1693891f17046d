"""Whether memory holds what a mixture brings along, before it is loaded."""

from __future__ import annotations

import psutil
import torch

from lorahub_registry.errors import IncompatibleAdapters

_MIXTURE = (
    "take fewer adapters: `method: {type: learn, screen: {keep: 4}}` tells which are worth it, "
    "`lorareg route --top-k` which a prompt needs"
)


def check_room(needed: int, device: torch.device, what: str, hint: str = _MIXTURE) -> None:
    """Refuse what is larger than the memory that is free.

    Args:
        needed: bytes.
        what: whose they are, for the message.
        hint: what to do then.

    Raises:
        IncompatibleAdapters: it is; the message says both sizes.
    """
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    if needed <= free:
        return
    where = "on the GPU" if device.type == "cuda" else "of memory"
    raise IncompatibleAdapters(
        f"{what} take {needed / 1e9:.1f} GB in float32, and {free / 1e9:.1f} GB {where} are free",
        hint=hint,
    )
