"""MixLoRA made of adapters that are there: their feed-forward parts are experts (2404.15159).

Routers are trained where they will run, in the module that ``PeftModel`` makes of the written
folder, by the trainer of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorahub_registry.adapters.compat import Member
from lorahub_registry.adapters.dynamic import FOLDER
from lorahub_registry.adapters.mixlora_keys import GATE
from lorahub_registry.compose.bench import Means
from lorahub_registry.compose.expert_facts import DEAD, ExpertRouter, observed
from lorahub_registry.compose.expert_parts import Parts, experts_in, take_apart, tensors_of
from lorahub_registry.compose.gates import fit_parameters
from lorahub_registry.compose.rivals import rival_name, static_rivals
from lorahub_registry.compose.routed import Routed, by_member, coefficients_of, plain_sum
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.stock import stock_peft
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes.mixlora import AVERAGE, MixLora
from lorahub_registry.recipes.model import Recipe
from lorahub_registry.runtime.grouped import Share
from lorahub_registry.runtime.mixlora_names import to_native
from lorahub_registry.runtime.moe import router_losses
from lorahub_registry.runtime.moe_layer import layers_of
from lorahub_registry.runtime.room import check_room
from lorahub_registry.train.passes import Standing
from lorahub_registry.weights.files import DTYPES, load_deltas
from lorahub_registry.weights.lowrank import Deltas
from lorahub_registry.weights.mixlora import write_mixlora

_ADAPTER = "default"  # what PEFT calls the only one


def make_experts(
    recipe: Recipe,
    members: Sequence[Member],
    base: LoadedBase,
    rows: Sequence[Encoded],
    folder: Path,
    *,
    means: Means | None = None,
    progress: Progress = silent,
) -> Routed:
    """Make the MixLoRA that ``recipe`` asks for, and write it into ``folder/dynamic``.

    Args:
        rows: what routers are trained on.

    Raises:
        RecipeError: fewer than two adapters, or something in the method that does not fit them.
        IncompatibleAdapters: see :func:`~.expert_parts.take_apart`.
        NotApplied: the training diverged.
    """
    method, notes = recipe.method, list[str]()
    assert isinstance(method, MixLora)
    names = [m.name for m in members]
    method.check_names(names)
    size = sum(4 * (m.facts.parameters or 0) for m in members)
    check_room(size, base.device, f"the {len(members)} adapters")
    deltas: dict[str, Deltas] = {m.name: load_deltas(m.folder, m.facts) for m in members}

    def apart(coefficients: Sequence[float]) -> Parts:
        return take_apart(
            method, deltas, coefficients, base.model, base=base.name,
            base_revision=base.revision, task_type=base.task_type,
        )  # fmt: skip

    apart([1 / len(names)] * len(names))  # what cannot be is told before anything is learned
    rivals, untold = static_rivals(recipe, members, base, rows, means=means, progress=progress)
    notes += untold
    per_model = rivals.get(rival_name(method.rivals[0]))
    static = per_model.mean() if per_model else None
    attention = coefficients_of(
        method.attention, AVERAGE, names, static, notes,
        "the attention gets the uniform average of the adapters' parts",
    )  # fmt: skip
    parts = apart(attention)
    out = folder / FOLDER
    out.mkdir()
    tensors = tensors_of(
        parts, base.model, dtype=recipe.output.dtype, seed=recipe.seed, trains=method.train_experts
    )
    write_mixlora(out, parts.mix, tensors)
    tensors, loss = train_routers(method, base, out, rows, seed=recipe.seed, progress=progress)
    dtype = DTYPES[recipe.output.dtype]
    tensors = {k: v if k.endswith(GATE) else v.to(dtype) for k, v in tensors.items()}
    write_mixlora(out, parts.mix, tensors)
    seen = observed(base, out, rows, len(names))
    router = ExpertRouter.of(method, names, attention, parts, seen)
    if router.dead:
        notes.append(
            f"dead experts, chosen by fewer than {DEAD:.1%} of a layer's tokens: "
            f"{', '.join(router.dead)}"
        )
    experts = experts_in(parts, tensors)
    said = {site.layer: seen[site.layer].weight for site in parts.sites.values() if site.routed}
    mean = {
        module: said[site.layer] if site.routed else torch.tensor(attention, dtype=torch.float64)
        for module, site in parts.sites.items()
    }
    whole: dict[str, Deltas] = {
        name: {**own, **{n: d for n, d in each.items() if not parts.sites[n].routed}}
        for name, own, each in zip(names, experts, deltas.values(), strict=True)
    }
    mean = {module: c for module, c in mean.items() if any(module in d for d in whole.values())}
    return Routed(
        members=tuple(members),
        adapters=tuple(deltas.values()),
        experts=tuple(names),
        router=router,
        mean={parts.layer_name(i): tuple(weight.tolist()) for i, weight in sorted(said.items())},
        coefficients=by_member(mean, whole, names),
        plain=plain_sum(list(whole.values()), mean),
        static=static,
        rivals={name: one.mixture for name, one in rivals.items()},
        loss=loss,
        notes=tuple(notes),
    )


def train_routers(
    method: MixLora,
    base: LoadedBase,
    folder: Path,
    rows: Sequence[Encoded],
    *,
    seed: int,
    progress: Progress = silent,
) -> tuple[dict[str, torch.Tensor], tuple[tuple[int, float], ...]]:
    """Train the routers (and the experts) of the MixLoRA in ``folder``; nothing is written.

    Returns:
        All tensors by their native names, float32 on the CPU, and (step, NLL of the step's rows).

    Raises:
        NotApplied: the training diverged.
    """
    with stock_peft(base, folder, is_trainable=True) as model:
        for name, value in model.named_parameters():
            ours = f".lora_experts.{_ADAPTER}." in name
            value.requires_grad_(ours and (method.train_experts or name.endswith(".gate")))
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        loss = fit_parameters(
            "routers", method.training, base, named, rows, MoeStanding(model),
            seed=seed, progress=progress,
        )  # fmt: skip
        native = to_native(base.model, _ADAPTER, base.model.state_dict())
        tensors = {name: p.detach().float().cpu().clone() for name, p in native.items()}
    return tensors, loss


class MoeStanding(Standing):
    """The base with a MixLoRA on it, whose routers are held to equal loads.

    Args:
        model: the ``PeftModel``; it may be in evaluation mode.
    """

    def __init__(self, model: Any, adapter: str = _ADAPTER) -> None:
        self._model = model.get_base_model()
        self._flow = next(layer.flow for _, layer in layers_of(self._model))
        self._mix, self._adapter = model.peft_config[adapter].mix, adapter
        self._real: torch.Tensor | None = None
        self._shares: Sequence[Share] = ()

    def __enter__(self) -> MoeStanding:
        # A model in training collects its routers' logits of itself; this one is not.
        self._hook = self._model.register_forward_pre_hook(self._collect)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._flow.logits.clear()

    def _collect(self, *_: object) -> None:
        self._flow.collects = True

    def begin(self, shares: Sequence[Share], real: torch.Tensor | None) -> None:
        """See :meth:`~lorahub_registry.runtime.grouped.Grouped.begin`."""
        self._shares, self._real = shares, real

    def extra(self) -> dict[int, torch.Tensor]:
        """See :meth:`~lorahub_registry.runtime.grouped.Grouped.extra`."""
        if not self._mix.router_loss:
            return {}
        rows = max(share.stop for share in self._shares)
        noted = [
            logits.view(rows, -1, logits.shape[-1])
            for (name, _), logits in sorted(self._flow.logits.items())
            if name == self._adapter
        ]
        found = {}
        for number, share in enumerate(self._shares):
            own = slice(share.start, share.stop)
            real = None if self._real is None else self._real[own].flatten()
            logits = [each[own].flatten(0, 1) for each in noted]
            found[number] = torch.stack([*router_losses(logits, self._mix, real).values()]).sum()
        return found
