"""Dynamic mixtures of the tiny models' adapters, composed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from lorahub_registry.compose.encoder import Rows
from lorahub_registry.compose.results import results
from lorahub_registry.compose.run import Composition, compose
from tests import tiny
from tests.compose.making import member, recipe, rows

THREE = ("plain", "wide", "rslora")
IDS = torch.tensor([[1, 40, 41, 42, 43, 60, 61]])
SHORT = {"max_steps": 3, "batch_size": 4}
STILL = {"max_steps": 1}  # in warmup, so at a learning rate of 0


@dataclass
class Made:
    """A mixture, and how it was asked for."""

    wanted: Any
    made: Composition
    out: Path
    base: Any

    @property
    def table(self) -> dict[str, float]:
        assert self.made.proof is not None
        return {row.name: row.nll for row in self.made.proof.table}

    @property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(json.dumps(results(self.wanted, self.base, self.made)))
        return found


def mix(
    model: tiny.Tiny, out: Path, method: dict[str, Any], kinds: Sequence[str] = THREE,
    *, train: int = 6, test: int = 4, dtype: Any = None, **more: Any,
) -> Made:  # fmt: skip
    out.mkdir()
    wanted = recipe(method, [{"ref": f"./{kind}", "name": kind} for kind in kinds], **more)
    members = [member(model.adapter(kind)) for kind in kinds]
    base = model.base(dtype)
    held_out = rows(train + test)[train:]
    return Made(wanted, compose(wanted, members, base, Rows(rows(train), held_out), out), out, base)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def of_folder(model: tiny.Tiny, folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(model.model(), str(folder)).eval())
