"""Dynamic mixtures on the tiny models, written as folders and loaded by PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lorahub_registry.adapters.dynamic import Arrow, Constant, LoraFlow, PromptRouter, Router
from lorahub_registry.runtime.places import place_of
from lorahub_registry.weights.dynamic import Origin, save_dynamic
from lorahub_registry.weights.lowrank import LowRank
from lorahub_registry.weights.prototypes import prototypes
from tests import tiny
from tests.compose.making import deltas

ROUTERS: dict[str, Router] = {
    "constant": Constant((0.75, -0.5, 0.3)),
    "layer": LoraFlow("layer", 1.1),
    "module": LoraFlow("module"),
    "model": LoraFlow("model"),
    "arrow": Arrow(2, 0.7),
    "prompt": PromptRouter(2, 0.5),
    "prompt deeper": PromptRouter(2, 0.5, layer=1),
}


@dataclass
class Mixture:
    """A written mixture, and what it was written from."""

    base: tiny.Tiny
    folder: Path
    router: Router
    experts: list[dict[str, LowRank]]
    tensors: dict[str, torch.Tensor]

    def load(self, model: Any = None, **options: Any) -> Any:
        """As PEFT loads it."""
        from peft import PeftModel

        base = self.base.model() if model is None else model
        found = PeftModel.from_pretrained(base, str(self.folder), **options)
        return found if options.get("is_trainable") else found.eval()


def experts_on(base: tiny.Tiny) -> list[dict[str, LowRank]]:
    """Three adapters of unequal ranks and targets; of a decoder's cross-attention, none."""
    if base.kind == "llama":
        return [deltas(base, kind) for kind in ("plain", "wide", "patterns")]
    one = {n: d for n, d in deltas(base, base.kind).items() if "EncDec" not in n}
    made = torch.Generator().manual_seed(3)

    def other(rank: int, names: list[str]) -> dict[str, LowRank]:
        found = {}
        for name in names:
            fan_out, fan_in = one[name].shape
            a, b = torch.randn(rank, fan_in, generator=made), torch.randn(fan_out, rank)
            found[name] = LowRank(a * 0.2, torch.randn(b.shape, generator=made) * 0.2)
        return found

    return [one, other(3, list(one)[::2]), other(4, list(one))]


def tensors_for(
    router: Router, experts: list[dict[str, LowRank]], model: Any, seed: int = 5
) -> dict[str, torch.Tensor]:
    """A router's own tensors, by their names in the base, far from their start."""
    made = torch.Generator().manual_seed(seed)
    modules = sorted({name for each in experts for name in each})
    k = len(experts)
    if isinstance(router, Constant):
        return {}
    if isinstance(router, Arrow):
        return {f"{n}.lora_prototypes": v for n, v in prototypes(experts).items()}
    found = {}
    if isinstance(router, LoraFlow) and router.per == "module":
        for name in modules:
            width = next(each[name].shape[1] for each in experts if name in each)
            found[f"{name}.lora_gate"] = torch.randn(k, width, generator=made) * 0.3
            found[f"{name}.lora_gate_bias"] = torch.randn(k, generator=made)
        return found
    for place in sorted({place_of(name, router, model) for name in modules}):
        if isinstance(router, PromptRouter):
            found[f"{place}.mixture.lora_centroids"] = torch.randn(k, 32, generator=made)
        else:
            found[f"{place}.mixture.lora_gate"] = torch.randn(k, 32, generator=made) * 0.3
            found[f"{place}.mixture.lora_gate_bias"] = torch.randn(k, generator=made)
    return found


@pytest.fixture
def mixture(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Mixture]:
    """Writes a mixture: ``mixture(kind of router, kind of base)``."""

    def write(kind: str, base: str = "llama", **more: Any) -> Mixture:
        model: tiny.Tiny = request.getfixturevalue(f"tiny_{base}")
        router, experts = ROUTERS[kind], experts_on(model)
        loaded = model.model()
        tensors = tensors_for(router, experts, loaded, more.pop("seed", 5))
        folder = tmp_path / f"{kind}-{base}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        save_dynamic(
            folder,
            experts,
            [Origin(f"expert{i}") for i in range(len(experts))],
            router,
            tensors,
            base=str(model.folder),
            base_revision=None,
            task_type="SEQ_2_SEQ_LM" if base == "t5" else "CAUSAL_LM",
            all_modules=[name for name, _ in loaded.named_modules()],
            **more,
        )
        return Mixture(model, folder, router, experts, tensors)

    return write
