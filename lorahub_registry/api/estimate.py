"""What training a factory would take, without loading the base: steps, memory, time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorahub_registry.api.factory import Order, Ready, prepare_factory
from lorahub_registry.api.plan import BYTES, measured_gflops
from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes.factory_file import FactoryFile
from lorahub_registry.registry.store import Registry

_KEPT = 4 * 4  # bytes a parameter: value, gradient and the optimizer's two moments, all float32
_LOGITS = 4  # bytes each: their softmax and gradient lie where they lay
_BESIDE = 1.6  # attention, norms and activations over the linear modules' own; as measured


def plan_factory(
    factory: str | Path | Mapping[str, Any] | FactoryFile,
    *,
    registry: Registry,
    max_together: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Check a factory to the end, and estimate what running it would take: see :func:`estimate`.

    Raises:
        LoraregError: whatever would stop the run.
    """
    ready = prepare_factory(factory, registry=registry, force=True, progress=progress)
    if ready.out.is_dir() and any(ready.out.iterdir()):
        progress.warn(f"{ready.out} exists: the run will need --force, which replaces it")
    return estimate(ready, max_together=max_together)


def estimate(ready: Ready, *, max_together: int | None = None) -> dict[str, Any]:
    """What a run takes: steps, tokens, memory, time.

    A training token costs four operations a weight, for nothing but the adapters learns; the speed
    is measured, on this machine, by a product of the base's width. Memory counts the base, the
    adapters with their gradients and moments, and what the fullest pass keeps for its backward:
    what enters and leaves each linear module, and the logits.
    """
    from lorahub_registry.evaluate.base import pick_device
    from lorahub_registry.runtime.linear import fans
    from lorahub_registry.train.parameters import targets
    from lorahub_registry.train.passes import pass_tokens

    factory, shapes = ready.factory, ready.base.facts.shapes
    model, device = _skeleton(ready), pick_device(factory.device)
    adapters = [_of(order, model) for order in ready.orders]
    parameters = sum(math.prod(shape) for shape in shapes.values())
    each = BYTES.get(factory.dtype) or ready.base.facts.bytes / max(1, parameters)
    if factory.quantization is not None:
        each = {"8bit": 1.0, "4bit": 0.5}[factory.quantization]
    batches = sorted((adapter["batch_tokens"] for adapter in adapters), reverse=True)
    fullest = min(
        sum(batches[: max_together or factory.max_together]),
        max(pass_tokens(device, ready.vocabulary), batches[0]),
    )
    linear = sum(sum(fans(model.get_submodule(name))) for name in targets(model, "all-linear"))
    kept = _BESIDE * 4 * linear
    if factory.gradient_checkpointing:  # one layer, and what enters each
        text = model.config.get_text_config()
        kept = kept / text.num_hidden_layers + 4 * text.hidden_size * text.num_hidden_layers
    trained = sum(adapter["parameters"] for adapter in adapters)
    tokens = sum(adapter["tokens"] for adapter in adapters)
    width = max((shape[-1] for shape in shapes.values() if len(shape) == 2), default=1024)
    gflops = measured_gflops(device, min(width, 4096))
    return {
        "name": factory.name,
        "base": ready.base.facts.name,
        "parameters": parameters,
        "adapters": adapters,
        "tokens": tokens,
        "memory_bytes": round(parameters * each)
        + _KEPT * trained
        + round(fullest * (kept + _LOGITS * ready.vocabulary)),
        "device": device,
        "gflops": gflops,
        "seconds": 4 * parameters * tokens / (gflops * 1e9),
        "output": str(ready.out),
    }


def in_words(facts: Mapping[str, Any]) -> str:
    """One line of an estimate."""
    steps = sum(adapter["steps"] for adapter in facts["adapters"])
    number = len(facts["adapters"])
    tokens = f"{facts['tokens']:,} tokens"
    return (
        f"{number} adapter{'s' if number > 1 else ''}, {steps:,} steps, {tokens}: about "
        f"{max(1, facts['seconds']):,.0f} s on {facts['device']} and "
        f"{facts['memory_bytes'] / 1e9:.1f} GB, loading and scoring not counted"
    )


def _skeleton(ready: Ready) -> Any:
    """The base without its weights."""
    import torch
    import transformers

    kind = (
        transformers.AutoModelForSeq2SeqLM if ready.seq2seq else transformers.AutoModelForCausalLM
    )
    config = transformers.AutoConfig.from_pretrained(ready.base.folder, trust_remote_code=False)
    with torch.device("meta"):
        return kind.from_config(config)


def _of(order: Order, model: Any) -> dict[str, Any]:
    from lorahub_registry.runtime.linear import fans
    from lorahub_registry.runtime.mixlora_plan import expert_sizes, plan_of
    from lorahub_registry.train.experts import mix_of
    from lorahub_registry.train.learner import items_of, length, steps_of
    from lorahub_registry.train.parameters import check_start, targets

    plan, train = order.plan, order.splits["train"].tokens
    more, layers, experts = 0, 0, None
    try:
        if plan.method is None:
            names = targets(model, plan.lora.target_modules)
        else:
            mix = mix_of(plan, model)
            where = plan_of(model, mix)
            names, more = sorted(where.plain), sum(expert_sizes(mix, where).values())
            layers = len(where.experts)
            experts = {
                "routing_strategy": mix.strategy,
                "num_experts": mix.num_experts,
                "rank": mix.experts.r,
                "layers": layers,
            }
        check_start(model, names, plan.lora)
    except IncompatibleAdapters as error:
        raise IncompatibleAdapters(f"{plan.name}: {error}", hint=error.hint) from None
    shapes = [fans(model.get_submodule(name)) for name in names]
    items = items_of(train.rows, plan)
    per_epoch, steps = steps_of(len(items), plan.training)
    longest = plan.training.batch_size * max(length(item) for item in items)
    return {
        "name": plan.name,
        "rank": plan.lora.r,
        "modules": len(names) + layers,
        "experts": experts,
        "parameters": sum(plan.lora.r * (i + o) + plan.lora.use_dora * o for i, o in shapes) + more,
        "rows": len(train.rows),
        "dropped": len(train.dropped),
        "steps": steps,
        "tokens": round(train.tokens * steps / per_epoch),
        "batch_tokens": longest,
    }
