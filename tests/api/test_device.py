"""Where streaming commands compute."""

from __future__ import annotations

import pytest
import torch

from lorahub_registry.api.device import streaming_device
from lorahub_registry.errors import BaseModelError, UsageError


@pytest.mark.parametrize("cuda", [True, False])
def test_auto_is_cuda_or_the_cpu_but_never_what_lacks_float64(
    cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert streaming_device("auto") == ("cuda" if cuda else "cpu")
    assert streaming_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="mps has no float64"):
        streaming_device("mps")
    if cuda:
        assert streaming_device("cuda:1") == "cuda:1"
        return
    for missing in ("cuda", "cuda:0", "tpu"):
        with pytest.raises(BaseModelError, match=f"device '{missing}' is not on this machine"):
            streaming_device(missing)
