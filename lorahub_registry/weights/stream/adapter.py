"""An adapter's file, read one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from lorahub_registry.adapters.facts import AdapterFacts
from lorahub_registry.adapters.tensors import WEIGHTS_NAME, read_header
from lorahub_registry.errors import BrokenAdapter
from lorahub_registry.weights.lowrank import LowRank
from lorahub_registry.weights.stream.checkpoint import BLOCK, TORCH


class AdapterFile:
    """An adapter's tensors, read one at a time: a large adapter is larger than a large tensor.

    Attributes:
        modules: by name.
        coefficient: of the whole adapter.
    """

    def __init__(
        self, name: str, folder: Path, facts: AdapterFacts, coefficient: float = 1.0
    ) -> None:
        self.name, self.facts, self.coefficient = name, facts, coefficient
        self.path = folder / WEIGHTS_NAME
        self.modules = {m.name: m for m in facts.modules}
        self._header = read_header(self.path)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._header.tensors[key].shape

    def rows(self, key: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows of a tensor in float32.

        Raises:
            BrokenAdapter: its type is no number's, or the file became shorter.
        """
        info = self._header.tensors[key]
        dtype = self.dtype(key)
        rows = info.shape[0] if info.shape else 1
        end = rows if end is None else end
        shape = (end - begin, *info.shape[1:]) if info.shape else ()
        each = (info.end - info.begin) // max(1, rows)
        data = bytearray(each * (end - begin))
        if not data:
            return torch.empty(shape)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._header.data_start + info.begin + each * begin)
            rest = memoryview(data)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise BrokenAdapter(f"{self.path}: became shorter while it was read")
                rest = rest[count:]
        return torch.frombuffer(data, dtype=dtype).view(shape).float()

    def dtype(self, key: str) -> torch.dtype:
        """Of a tensor, as stored.

        Raises:
            BrokenAdapter: it is no number's.
        """
        info = self._header.tensors[key]
        dtype = TORCH.get(info.dtype)
        if dtype is None or not dtype.is_floating_point:
            raise BrokenAdapter(f"{self.path}: {key} is {info.dtype}, no floating-point type")
        return dtype

    def delta(self, module: str) -> LowRank:
        """ΔW of a module, the scaling folded into B, the coefficient not."""
        facts = self.modules[module]
        b = self.rows(facts.key_b).mul_(facts.scaling)
        return LowRank(self.rows(facts.key_a), b, self.kind(module))

    def kind(self, module: str) -> Literal["linear", "embedding"]:
        """Where a module's delta goes; convolutions are refused before."""
        return "embedding" if self.modules[module].kind == "embedding" else "linear"

    def check(self) -> bool:
        """Whether any module's delta may be other than zero; every number is looked at.

        Raises:
            BrokenAdapter: a tensor holds NaN or infinity.
        """
        empty = set()
        for key, info in self._header.tensors.items():
            rows = info.shape[0] if info.shape else 1
            step = max(1, BLOCK * rows // max(1, info.elements))
            some = False
            for begin in range(0, rows, step):
                part = self.rows(key, begin, min(begin + step, rows))
                total = part.abs().sum()
                if not torch.isfinite(total) and not torch.isfinite(part).all():
                    raise BrokenAdapter(
                        f"{self.path}: {key} holds NaN or infinity",
                        hint="leave this adapter out; its training diverged or the file is damaged",
                    )
                some = some or bool(total > 0)
            if not some:
                empty.add(key)
        return any(m.scaling != 0 and not {m.key_a, m.key_b} & empty for m in self.modules.values())
