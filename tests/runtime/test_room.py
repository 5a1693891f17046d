"""Experts that memory does not hold are refused before they are loaded."""

from __future__ import annotations

import psutil
import pytest
import torch

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.runtime.room import check_room

CPU = torch.device("cpu")


def test_what_is_larger_than_free_memory_is_refused_with_both_sizes():
    free = psutil.virtual_memory().available
    with pytest.raises(IncompatibleAdapters, match="the 3 adapters take") as found:
        check_room(2 * free, CPU, "the 3 adapters")
    assert "are free" in str(found.value)
    assert "take fewer adapters" in (found.value.hint or "")


def test_what_fits_is_not():
    check_room(1_000_000, CPU, "the 3 adapters")
