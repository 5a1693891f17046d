"""What a recipe would take, without loading a model: memory, evaluations, time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorahub_registry.api.prepare import Prepared, prepare
from lorahub_registry.errors import BaseModelError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes import Recipe, RecipeFile, overlap, render
from lorahub_registry.recipes.learned import GRADIENT, Learn, LoraHub, Searched
from lorahub_registry.recipes.mixlora import MixLora
from lorahub_registry.recipes.routed import LoraFlow, RoutedMethod
from lorahub_registry.registry.store import Registry

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a number of each type that a base can compute in."""


def plan(
    recipe: str | Path | Mapping[str, Any] | RecipeFile,
    *,
    registry: Registry,
    lock: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Check a recipe to the end, and estimate what running it would take.

    Tokens are counted with the base's own tokenizer; the speed is measured, on this machine, by
    a matrix product of the base's width. Memory counts the base, every adapter in float32 with
    its stacked factors and their sum, and the kept copies of float32 weights; time, of a mixture
    that decides while it runs, what all its adapters compute, too. ``not_counted`` says what is
    left out. A base or adapter from the Hub that is not here yet is pulled.

    Raises:
        LoraregError: whatever would stop the run.
    """
    ready = prepare(recipe, registry=registry, force=True, lock=lock, progress=progress)
    if shared := overlap(ready.train, ready.test):
        progress.warn(f"{shared} of {len(ready.test)} test rows are also training rows")
    facts = _estimate(ready, progress)
    # One that does not agree has ended the plan by now.
    agrees = None if lock is None else {"path": str(lock), "agrees": True}
    return facts | {"lock": agrees}


def _estimate(ready: Prepared, progress: Progress) -> dict[str, Any]:
    from lorahub_registry.evaluate.base import pick_device

    recipe, shapes = ready.recipe, ready.base.facts.shapes
    device = pick_device(recipe.device)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    (train, answers), (test, _) = _tokens(ready)
    rows = len(ready.train)
    if (split := recipe.data.train) and split.limit and split.limit < rows:
        train, rows = train * split.limit // rows, split.limit  # the diverse of all that were read
    if isinstance(recipe.method, Searched):
        # Each answer may get an EOS, and which rows are taken is not known: no fewer than these.
        _check_rows(ready, rows, answers + len(ready.train), progress)
    evaluations, passes = _search(recipe, len(ready.members), rows)
    steps, taught = _training(recipe, rows)
    mixed = _kept(recipe, len(ready.members))
    # A mixture that decides is compared with its plain LoRA, too, and with static coefficients.
    more = recipe.method.dynamic + len(_rivals(recipe, rows))
    models = mixed + 4 + more if ready.test else 0
    width = max((shape[-1] for shape in shapes.values() if len(shape) == 2), default=1024)
    gflops = measured_gflops(device, min(width, 4096))
    forwards = (passes + taught) * train + models * test
    sizes = sorted((m.facts.parameters or 0 for m in ready.members), reverse=True)
    adapters = sum(sizes[: _together(recipe, len(sizes))]) * 4
    # One that decides has all of them beside the base in every forward.
    beside = sum(sizes) if recipe.method.dynamic else 0
    changed = {m.name: m.fan_in * m.fan_out for a in ready.members for m in a.facts.modules}
    # A number as it is stored, unless the recipe says otherwise; copies only of float32 weights.
    each = BYTES.get(recipe.dtype) or ready.base.facts.bytes / max(1, parameters)
    copies = sum(changed.values()) * 4 if each == 4 else 0
    return {
        "name": recipe.name,
        "base": ready.base.facts.name,
        "parameters": parameters,
        "adapters": [
            {"name": m.name, "ref": m.ref, "rank": m.facts.rank, "bytes": m.facts.bytes}
            for m in ready.members
        ],
        "method": recipe.method.type,
        "evaluations": evaluations,
        "steps": steps,
        "train_rows": rows,
        "train_tokens": train,
        "models": models,
        "test_rows": len(ready.test),
        "test_tokens": test,
        "memory_bytes": round(parameters * each) + 3 * adapters + copies,
        "device": device,
        "gflops": gflops,
        "seconds": 2 * (parameters + beside) * forwards / (gflops * 1e9),
        "not_counted": _not_counted(recipe, rows),
        "output": str(ready.out),
    }


def _not_counted(recipe: Recipe, rows: int) -> dict[str, str]:
    """What memory and time leave out, in words."""
    method = recipe.method
    memory, time_ = "activations", "loading, generation, attention's scores"
    if _rivals(recipe, rows) or getattr(method, "optimizer", None) == GRADIENT:
        memory += ", which are kept of a whole batch while gradients are computed"
        if isinstance(method, LoraFlow):
            memory += " (of gates' training, too), and gates with their moments"
        if isinstance(method, MixLora):
            memory += " (of routers' training, too), and what is trained with its moments"
        memory += ": of long rows they may be more than the weights"
    if method.dynamic:
        time_ += ", what gates and routers compute to decide"
    return {"memory": memory, "time": time_}


def _check_rows(ready: Prepared, rows: int, tokens: int, progress: Progress) -> None:
    from lorahub_registry.compose.enough import check_rows, least_size

    method = ready.recipe.method
    assert isinstance(method, Learn | LoraHub)
    for text in check_rows(method, least_size(method, ready.members), rows, tokens):
        progress.warn(text)


def _kept(recipe: Recipe, members: int) -> int:
    """How many adapters screening leaves."""
    screen = getattr(recipe.method, "screen", None)
    return min(members, screen.keep) if screen else members


def _together(recipe: Recipe, members: int) -> int:
    """How many adapters are in memory at once."""
    kept = _kept(recipe, members)
    return min(members, max(2 * kept, kept + 4))


def _training(recipe: Recipe, rows: int) -> tuple[int, float]:
    """(optimizer steps of gates or routers, what they cost in forwards over the training rows)."""
    method = recipe.method
    if not isinstance(method, LoraFlow | MixLora):
        return 0, 0
    run = method.training
    per_step = run.batch_size * run.gradient_accumulation_steps
    each = math.ceil(rows / per_step)
    steps = run.max_steps or each * run.num_train_epochs
    return steps, 3 * steps / max(1, each)


def _rivals(recipe: Recipe, rows: int) -> tuple[Learn, ...]:
    """The static coefficients that a mixture that decides is compared with."""
    method = recipe.method
    return method.rivals if isinstance(method, RoutedMethod) and rows else ()


def _search(recipe: Recipe, members: int, rows: int) -> tuple[int, float]:
    """(evaluations at most, what they cost in forwards over the training rows)."""
    method = recipe.method
    if rivals := _rivals(recipe, rows):
        # The static coefficients that it is compared with, and then its own means.
        budget = sum(one.budget for one in rivals)
        return budget, 3 * budget + 1
    if not isinstance(method, Searched):
        return 0, 0
    again: float = method.seeds - 1 if method.seeds else method.folds or 0
    share = (again - 1) / again if method.folds else 1
    # A backward pass costs two forwards.
    each = 3 if method.optimizer == GRADIENT else 1
    kept = _kept(recipe, members)
    # Alone, and then each of the short list at two strengths, until enough are kept.
    short = _together(recipe, members)
    joint = sum(2 * (short - taken) for taken in range(1, kept))
    screening = members + joint if kept < members else 0
    evaluations = method.budget * (1 + again) + screening
    return round(evaluations), each * method.budget * (1 + again * share) + screening


def _tokens(ready: Prepared) -> list[tuple[int, int]]:
    """Tokens of the train and of the test rows: of all, and of the answers alone."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            ready.base.folder, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"the base {ready.base.facts.name} has no tokenizer that can be loaded: {error}"
        ) from None

    def count(texts: list[str], **options: Any) -> int:
        return sum(map(len, tokenizer(texts, **options)["input_ids"])) if texts else 0

    template = ready.recipe.data.template
    counts = []
    for rows in (ready.train, ready.test):
        texts = [
            (row.input if ready.recipe.data.chat else render(template, row)) + row.output
            for row in rows
        ]
        answers = [row.output for row in rows]
        counts.append((count(texts), count(answers, add_special_tokens=False)))
    return counts


def measured_gflops(device: str, width: int) -> float:
    """What a product of [256, width] by [width, width] reaches, in GFLOP/s; takes a blink."""
    import torch

    a = torch.randn(256, width, device=device)
    b = torch.randn(width, width, device=device)
    a @ b
    taken, start = [], time.perf_counter()
    while time.perf_counter() - start < 0.2:
        began = time.perf_counter()
        float((a @ b)[0, 0])
        taken.append(time.perf_counter() - began)
    return 2 * 256 * width * width / statistics.median(taken) / 1e9
