"""LoRA-Flow's gates, trained: adapters and base stay as they are (arXiv:2402.11455).

They are trained where they will run, in the module that ``PeftModel`` makes of the written folder,
by the trainer of adapters: its optimizer, schedule and order of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorahub_registry.adapters.dynamic import Router
from lorahub_registry.errors import NotApplied
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.stock import stock_peft
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes.factory import AdapterData, AdapterPlan, TrainSplit
from lorahub_registry.recipes.routed import LoraFlow
from lorahub_registry.recipes.training import RunOptions, TrainingOptions
from lorahub_registry.runtime.linear import fans
from lorahub_registry.runtime.places import place_of, width_of
from lorahub_registry.train.learner import Learner, items_of
from lorahub_registry.train.passes import Standing
from lorahub_registry.train.run import train

WEIGHT, BIAS = "lora_gate", "lora_gate_bias"


@dataclass(frozen=True)
class Trained:
    """Gates, and how they were found.

    Attributes:
        tensors: by their names in the base, float32 on the CPU.
        loss: (step, NLL of the step's rows in nats a token).
    """

    tensors: dict[str, torch.Tensor]
    loss: tuple[tuple[int, float], ...]


def start(
    router: Router, modules: Iterable[str], model: Any, coefficients: Sequence[float]
) -> dict[str, torch.Tensor]:
    """Gates that give ``coefficients`` whatever they see: W = 0, b = c − 1/k.

    Args:
        modules: that experts sit on; every one has a place for its gate.
    """
    k = len(coefficients)
    bias = torch.tensor(coefficients) - 1 / k
    found = {}
    for place, width in _places(router, modules, model).items():
        found[f"{place}.{WEIGHT}"] = torch.zeros(k, width)
        found[f"{place}.{BIAS}"] = bias.clone()
    return found


def _places(router: Router, modules: Iterable[str], model: Any) -> dict[str, int]:
    """Where a gate has its tensors → the width of what it sees, sorted."""
    if router.site == "module":
        return {name: fans(model.get_submodule(name))[0] for name in sorted(modules)}
    places = sorted({place_of(name, router, model) for name in modules})
    return {f"{place}.mixture": width_of(model) for place in places}


class GateParameters:
    """The gates of a loaded mixture in one buffer, as a learner takes an adapter's.

    Attributes:
        flat, grad: float32, [parameters]; the modules' parameters are views of them.
        parts: (optimizer's name → slice of ``flat``).
    """

    def __init__(self, named: Mapping[str, torch.nn.Parameter]) -> None:
        values = list(named.values())
        self.flat = torch.cat([value.detach().float().flatten() for value in values])
        self.grad = torch.zeros_like(self.flat)
        self.parts = {"gate": slice(0, len(self.flat))}
        self.factors: dict[str, Any] = {}
        self.experts: dict[str, Any] = {}
        at = 0
        for value in values:
            where = slice(at, at + value.numel())
            value.data = self.flat[where].view(value.shape)
            value.grad = self.grad[where].view(value.shape)
            at += value.numel()


def fit_parameters(
    what: str,
    training: RunOptions,
    base: LoadedBase,
    named: Mapping[str, torch.nn.Parameter],
    rows: Sequence[Encoded],
    standing: Standing,
    *,
    seed: int,
    progress: Progress = silent,
) -> tuple[tuple[int, float], ...]:
    """Train parameters of a loaded mixture where they stand.

    Args:
        what: what they are called.
        named: those that are trained.

    Returns:
        (step, NLL of the step's rows in nats a token).

    Raises:
        NotApplied: the training diverged.
    """
    options = TrainingOptions(**training.model_dump())
    # The learner asks for its options alone; the rows are here.
    data = AdapterData(train=TrainSplit(path="rows.jsonl"))
    plan = AdapterPlan(name=what, training=options, data=data)
    learner = Learner(
        0, plan, base.model, items_of(rows, plan), (), seed=seed,
        vocabulary=len(base.tokenizer), half=base.model.dtype == torch.float16,
        parameters=GateParameters(named),
    )  # fmt: skip
    train(base, [learner], standing=standing, progress=progress)
    if learner.at.state != "done":
        raise NotApplied(
            f"the {what}' training diverged: {learner.at.why}",
            hint="lower training: learning_rate of the method",
        )
    return tuple(learner.at.loss)


def train_gates(
    method: LoraFlow,
    base: LoadedBase,
    folder: Path,
    rows: Sequence[Encoded],
    *,
    seed: int,
    progress: Progress = silent,
) -> Trained:
    """Train the gates of the mixture in ``folder``; nothing is written.

    Raises:
        NotApplied: the training diverged.
    """
    with stock_peft(base, folder, is_trainable=True) as model:
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        loss = fit_parameters(
            "gates", method.training, base, named, rows, Standing(), seed=seed, progress=progress
        )
        tensors = {_plain(name): p.detach().float().cpu().clone() for name, p in named.items()}
    return Trained(tensors, loss)


def _plain(name: str) -> str:
    """A parameter's name in the base: without PEFT's prefix and the adapter's name."""
    return name.removeprefix("base_model.model.").rpartition(".")[0]
