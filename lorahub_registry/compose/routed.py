"""Mixtures that decide while they run: from members and rows to router, experts and plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from lorahub_registry.adapters import dynamic
from lorahub_registry.adapters.compat import Member
from lorahub_registry.adapters.dynamic import FOLDER, Router
from lorahub_registry.adapters.layer_order import layer_order
from lorahub_registry.compose.bench import Means
from lorahub_registry.compose.expert_facts import ExpertRouter
from lorahub_registry.compose.fit import Fitted
from lorahub_registry.compose.forms import Layout
from lorahub_registry.compose.gates import start, train_gates
from lorahub_registry.compose.rivals import rival_name, static_rivals
from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.hidden import middle_layer
from lorahub_registry.evaluate.nll import label_logits
from lorahub_registry.evaluate.stock import stock_peft
from lorahub_registry.evaluate.tokens import IGNORED, Batch, Encoded
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes.model import Recipe
from lorahub_registry.recipes.routed import (
    LEARN,
    UNIFORM,
    Arrow,
    LoraFlow,
    PromptRouter,
    RoutedMethod,
)
from lorahub_registry.runtime.mixture import Coefficients
from lorahub_registry.runtime.places import layer_of, place_of
from lorahub_registry.runtime.room import check_room
from lorahub_registry.weights.dynamic import Origin, save_dynamic
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import Deltas, LowRank, weighted_sum
from lorahub_registry.weights.prototypes import prototypes, without_general

_TOKENS = 10  # of the rows' outputs for each coefficient that gates start at, at the least


@dataclass(frozen=True)
class Routed:
    """A dynamic mixture, written.

    Attributes:
        members, adapters: all that the recipe names, in its order, and their deltas.
        experts: names of those that speak; general ones do not.
        mean: layer (``""`` for modules in none) → each expert's mean coefficient over those of
            the layer's modules that it sits on.
        coefficients: member → its mean coefficient in ``plain``, over the modules it sits on.
        plain: the sum with every module's mean coefficients.
        static: one learned static coefficient for each member; None without training rows.
        rivals: what learned static coefficients come to, by their names in the table.
        loss: (step, NLL) of the gates' training.
    """

    members: tuple[Member, ...]
    adapters: tuple[Deltas, ...]
    experts: tuple[str, ...]
    router: Router | ExpertRouter
    mean: dict[str, tuple[float, ...]]
    coefficients: dict[str, float]
    plain: Deltas
    static: dict[str, float] | None = None
    rivals: dict[str, Deltas] = field(default_factory=dict)
    loss: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = ()


def route(
    recipe: Recipe,
    members: Sequence[Member],
    base: LoadedBase,
    train: Sequence[Encoded],
    folder: Path,
    *,
    centroids: Mapping[str, torch.Tensor] | None = None,
    means: Means | None = None,
    progress: Progress = silent,
) -> Routed:
    """Make the mixture that ``recipe`` asks for, and write what decides into ``folder/dynamic``.

    Raises:
        RecipeError: fewer than two experts, or a name in the method that is no adapter's.
        IncompatibleAdapters: a module on which no expert of this mixture can sit.
        NotApplied: the gates' training diverged.
    """
    method, notes = recipe.method, list[str]()
    assert isinstance(method, RoutedMethod)
    method.check_names([m.name for m in members])
    router = _router(method, len(members), base)
    _check_places(router, members, base.model)
    size = sum(4 * (m.facts.parameters or 0) for m in members)
    check_room(size, base.device, f"the {len(members)} adapters")
    deltas: dict[str, Deltas] = {m.name: load_deltas(m.folder, m.facts) for m in members}
    rivals, untold = static_rivals(recipe, members, base, train, means=means, progress=progress)
    notes += untold
    per_model = rivals.get(rival_name(method.rivals[0]))
    static = per_model.mean() if per_model else None
    experts = _experts(method, deltas) if isinstance(method, Arrow) else deltas
    modules = sorted({name for each in experts.values() for name in each})
    if isinstance(router, dynamic.Arrow):
        found = prototypes(list(experts.values()))
        tensors = {f"{name}.lora_prototypes": value for name, value in found.items()}
    elif isinstance(method, LoraFlow):
        tokens = sum(len(row.output) for row in train)
        begin = _begin(method, list(experts), modules, rivals, tokens, notes)
        tensors = start(router, begin, base.model)
    else:
        [place] = {place_of(name, router, base.model) for name in modules}
        known = torch.stack([(centroids or {})[name] for name in experts])
        tensors = {f"{place}.mixture.lora_centroids": known}
    speakers = [m for m in members if m.name in experts]
    origins = [Origin(m.name, m.ref, m.revision or None, m.digest) for m in speakers]
    out = folder / FOLDER
    out.mkdir()

    def write(found: Mapping[str, torch.Tensor]) -> None:
        save_dynamic(
            out,
            list(experts.values()),
            origins,
            router,
            found,
            base=base.name,
            base_revision=base.revision,
            task_type=base.task_type,
            dtype=recipe.output.dtype,
            all_modules=[name for name, _ in base.model.named_modules()],
        )

    write(tensors)
    loss: tuple[tuple[int, float], ...] = ()
    if isinstance(method, LoraFlow):
        trained = train_gates(method, base, out, train, seed=recipe.seed, progress=progress)
        loss = trained.loss
        write(trained.tensors)
    if train:
        mean = mean_coefficients(base, out, train, len(experts))
    else:
        uniform = torch.full((len(experts),), 1 / len(experts), dtype=torch.float64)
        mean = dict.fromkeys(modules, uniform)
        notes.append("no data.train: the plain LoRA has the uniform average of the experts")
    return Routed(
        members=tuple(members),
        adapters=tuple(deltas.values()),
        experts=tuple(experts),
        router=router,
        mean=_by_layer(mean, list(experts.values()), base.model),
        coefficients=by_member(mean, deltas, list(experts)),
        plain=plain_sum(list(experts.values()), mean),
        static=static,
        rivals={name: one.mixture for name, one in rivals.items()},
        loss=loss,
        notes=tuple(notes),
    )


def _router(method: RoutedMethod, members: int, base: LoadedBase) -> Router:
    if isinstance(method, LoraFlow):
        return dynamic.LoraFlow(method.per, method.temperature)
    if isinstance(method, Arrow):
        experts = members - len(method.general)
        return dynamic.Arrow(min(method.top_k, experts), method.temperature)
    assert isinstance(method, PromptRouter)
    top_k = min(method.top_k, members)
    return dynamic.PromptRouter(top_k, method.temperature, middle_layer(base))


def _check_places(router: Router, members: Sequence[Member], model: Any) -> None:
    """Whether experts can sit, and be decided for, where the members do.

    Raises:
        IncompatibleAdapters: names the first module on which they cannot.
    """
    for member in members:
        for module in member.facts.modules:
            if module.kind == "embedding":
                raise IncompatibleAdapters(
                    f"{member.name}: {module.name} is an embedding, and experts of a dynamic "
                    "mixture sit on linear modules",
                    hint="leave it out, or mix with fixed coefficients (method: {type: learn})",
                )
            if router.site == "layer":
                try:
                    place_of(module.name, router, model)
                except IncompatibleAdapters as error:
                    raise IncompatibleAdapters(
                        f"{member.name}: {error}",
                        hint="leave the adapter out, or give each module a gate of its own "
                        "(method: {type: lora_flow, per: module})",
                    ) from None


def coefficients_of(
    choice: str, even: str, names: Sequence[str], static: Mapping[str, float] | None,
    notes: list[str], instead: str,
) -> list[float]:  # fmt: skip
    """One coefficient an adapter, as a recipe says it: learned, uniform, or one adapter alone.

    Args:
        choice: ``learn``, ``even``, or an adapter's name.
        even: the recipe's word for uniform.
        static: what was learned; None, where nothing was.
        notes: gets ``instead`` where what was to be learned is uniform.
    """
    if choice == LEARN and static is not None:
        return [static[name] for name in names]
    if choice == LEARN:
        notes.append(instead)
    if choice in {LEARN, even}:
        return [1 / len(names)] * len(names)
    return [float(name == choice) for name in names]


def _begin(
    method: LoraFlow, names: Sequence[str], modules: Sequence[str],
    rivals: Mapping[str, Fitted], tokens: int, notes: list[str],
) -> dict[str, list[float]]:  # fmt: skip
    """Module → what its gate says before it is trained, see :func:`~.gates.start`.

    Learned coefficients are those of the finest static mixture that was learned, of what a gate
    decides for apart, unless the rows' ``tokens`` are too few for so many: the gates begin as the
    rival that they have to beat, and not as one that knows the rows by heart.
    """
    for learn in reversed(method.rivals) if method.init == LEARN else ():
        fitted = rivals.get(rival_name(learn))
        if fitted and learn.per != "model" and tokens < _TOKENS * len(fitted.pairs):
            notes.append(
                f"the gates start with coarser coefficients than {rival_name(learn)}: "
                f"{len(fitted.pairs)} of them from {tokens} output tokens are too many"
            )
        elif fitted:
            layout, by_set = Layout(modules, learn.per, learn.layer_groups), fitted.by_set()
            own = {name: by_set[layout.names[layout(name)]] for name in modules}
            return {name: [c.get(each, math.nan) for each in names] for name, c in own.items()}
    same = coefficients_of(
        method.init, UNIFORM, names, None, notes, "the gates start with the uniform average"
    )
    return dict.fromkeys(modules, same)


def _experts(method: Arrow, deltas: Mapping[str, Deltas]) -> dict[str, Deltas]:
    names = [name for name in deltas if name not in method.general]
    own = [deltas[name] for name in names]
    if method.general:
        own = without_general(own, [deltas[name] for name in method.general])
    return dict(zip(names, own, strict=True))


@torch.inference_mode()
def mean_coefficients(
    base: LoadedBase, folder: Path, rows: Sequence[Encoded], experts: int
) -> dict[str, torch.Tensor]:
    """Module → [experts], what the mixture in ``folder`` says there on average over the rows.

    Over all tokens but padding, prompts and answers alike; float64. What was decided once a row
    counts as often as the row has tokens.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, float] = {}
    masks: list[torch.Tensor] = []

    def seen(_: str, module: str, c: Coefficients) -> None:
        dense = c.dense(experts).double().reshape(-1, experts)
        # By their number: some models give a module all tokens in one row.
        each = (mask.flatten() for mask in masks if mask.numel() == len(dense))
        weight = next(each, masks[0].sum(1))
        total = (dense * weight[:, None].to(dense)).sum(0).cpu()
        sums[module] = sums.get(module, torch.zeros_like(total)) + total
        counts[module] = counts.get(module, 0.0) + float(weight.sum())

    with stock_peft(base, folder) as model, model.watching(seen):
        for batch in map(_apart, base.batches(rows)) if base.seq2seq else base.batches(rows):
            masks[:] = [batch.inputs["attention_mask"]]
            if base.seq2seq:
                masks.append(batch.labels != IGNORED)
            label_logits(model, batch, sliced=False)  # an expert on the head sees every token, too
    return {name: total / counts[name] for name, total in sums.items()}


def _apart(batch: Batch) -> Batch:
    """A seq2seq batch with more or fewer tokens for the encoder than for the decoder.

    That tells a decoder's cross attention, which gets the encoder's, from what is beside it.
    """
    inputs = dict(batch.inputs)
    if inputs["input_ids"].shape == batch.labels.shape:
        inputs |= {name: pad(inputs[name], (0, 1)) for name in ("input_ids", "attention_mask")}
    return replace(batch, inputs=inputs)


def plain_sum(experts: Sequence[Deltas], mean: Mapping[str, torch.Tensor]) -> Deltas:
    """Every module's experts with their mean coefficients there: a static sum."""
    found: dict[str, LowRank] = {}
    for name, coefficients in sorted(mean.items()):
        own = [{name: each[name]} if name in each else {} for each in experts]
        found |= weighted_sum(own, coefficients.tolist())
    return found


def _by_layer(
    mean: Mapping[str, torch.Tensor], experts: Sequence[Deltas], model: Any
) -> dict[str, tuple[float, ...]]:
    layers: dict[str, list[str]] = {}
    for name in mean:
        layers.setdefault(layer_of(name, model) or "", []).append(name)
    return {
        layer: tuple(
            _mean(float(mean[name][i]) for name in layers[layer] if name in expert)
            for i, expert in enumerate(experts)
        )
        for layer in sorted(layers, key=layer_order)
    }


def by_member(
    mean: Mapping[str, torch.Tensor], deltas: Mapping[str, Deltas], experts: Sequence[str]
) -> dict[str, float]:
    """Each member's coefficient in the plain sum: a general one's is what the experts leave out."""
    general = len(deltas) - len(experts)
    return {
        member: _mean(
            float(c[experts.index(member)] if member in experts else -c.sum() / general)
            for name, c in mean.items()
            if name in own
        )
        for member, own in deltas.items()
    }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))
