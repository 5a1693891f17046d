"""LoRA-Flow's gates, trained: adapters and base stay as they are (arXiv:2402.11455).

They are trained where they will run, in the module that ``PeftModel`` makes of the written folder,
by the trainer of adapters: its optimizer, schedule and order of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    router: Router, coefficients: Mapping[str, Sequence[float]], model: Any
) -> dict[str, torch.Tensor]:
    """Gates that give ``coefficients`` whatever they see: W = 0, b = c − 1/k.

    Args:
        coefficients: module → one an expert, NaN for those that do not sit there; a gate that
            decides for several modules starts at their mean.
    """
    found, decided = {}, dict[str, list[str]]()
    own = router.site == "module"
    for name in sorted(coefficients):
        place = name if own else f"{place_of(name, router, model)}.mixture"
        decided.setdefault(place, []).append(name)
    for place, modules in sorted(decided.items()):
        c = torch.tensor([coefficients[name] for name in modules]).nanmean(0).nan_to_num(0.0)
        width = fans(model.get_submodule(place))[0] if own else width_of(model)
        found[f"{place}.{WEIGHT}"] = torch.zeros(len(c), width)
        found[f"{place}.{BIAS}"] = c - 1 / len(c)
    return found


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
