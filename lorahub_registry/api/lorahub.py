"""LoraHub's two functions (arXiv:2307.13269), for those who call them already.

    from lorahub_registry import lorahub_inference, lorahub_learning

Same names, arguments and search as the published ones; what differs is what was wrong there.
Adapters are read from their files, never through one model that all of them change. Adapters of
another base, and ones whose ranks, scalings or modules differ, are refused by name. Causal models
are taken as well as encoder–decoders. :func:`~lorahub_registry.api.mix.compose` with ``method:
{type: lorahub}`` is the same search with proof, card and an adapter as its result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorahub_registry.adapters.compat import check_base, check_factors, check_sum
from lorahub_registry.api.bases import base_of
from lorahub_registry.api.examples import at_least_one, encoded, loaded_pair, pairs_of, texts
from lorahub_registry.api.resolve import resolve_refs
from lorahub_registry.errors import DataError, UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.registry.store import Registry

_MAX_NEW = 256
_L1 = 0.05

GetLoss = Callable[[Any, Any, int | None], Any]
GetRegular = Callable[[Any], Any]


def default_get_loss(example_dataset: Any, model: Any, batch_size: int | None) -> float:
    """The published loss: mean cross-entropy of each batch, summed, over the number of examples.

    Args:
        example_dataset: see :class:`~lorahub_registry.compose.published.Examples`.
        model: a causal or encoder–decoder model of transformers.
        batch_size: None: all examples at once.
    """
    import torch

    n, total = len(example_dataset), 0.0
    size = min(n, batch_size or n)
    device = next(model.parameters()).device
    with torch.inference_mode():
        for first in range(0, n, size):
            part = example_dataset[first : first + size]
            inputs = {
                name: torch.tensor(part[name], device=device)
                for name in ("input_ids", "attention_mask", "labels")
            }
            total += float(model(**inputs).loss)
    return total / n


def default_l1_regularization(weights: Sequence[float]) -> float:
    """0.05 times mean |w|."""
    return _L1 * sum(abs(float(w)) for w in weights) / len(weights)


def lorahub_learning(
    lora_module_list: Sequence[str],
    example_inputs: Sequence[str],
    example_outputs: Sequence[str],
    max_inference_step: int,
    model_name_or_path: str | Path | None = None,
    batch_size: int | None = None,
    get_loss: GetLoss = default_get_loss,
    get_regular: GetRegular = default_l1_regularization,
    seed: int = 42,
    *,
    eos: bool = False,
    allow_base: bool = False,
    device: str = "auto",
    registry: Registry | None = None,
    progress: Progress = silent,
) -> tuple[list[float], Any, Any]:
    """Learn one weight a module from a few examples, without gradients, and merge the mixture.

    Args:
        lora_module_list: folders, registered names, or Hub refs, which are pulled. Nothing else
            enters the registry.
        example_inputs: prompts, as they are: a causal model's end with the space that is wanted
            before the answer.
        example_outputs: the answers to them.
        max_inference_step: how many candidates are tried.
        model_name_or_path: the base; None: the one that the first module's config names.
        batch_size: examples in a batch; None: all. It is part of the objective, in which the
            batches' means are summed.
        get_loss: called with the examples, the model with a candidate in its weights, and
            ``batch_size``; the model is a plain transformers model, not a PeftModel.
        get_regular: called with the weights, [modules].
        eos: a causal model's answers end with EOS, as an encoder–decoder's always do.
        allow_base: modules may name another base than this one; their shapes have to fit.
        device: ``auto`` or a device's name.

    Returns:
        (one weight a module within ± 1.5, the base in float32 with
        ``s (Σ wᵢBᵢ)(Σ wᵢAᵢ)`` merged in, its tokenizer).

    Raises:
        UsageError: no modules, or a number that is none.
        DataError: no examples, as many inputs as there are not outputs, or examples that tell no
            two candidates apart.
        IncompatibleAdapters: modules of other bases, ranks, scalings or targets; names both.
        UnknownRef, HubError, BaseModelError: a module or the base is not to be had.
    """
    refs = texts(lora_module_list, "lora_module_list", UsageError)
    pairs = pairs_of(example_inputs, example_outputs)
    at_least_one(max_inference_step, "max_inference_step")
    if batch_size is not None:
        at_least_one(batch_size, "batch_size")
    if registry is None:
        with Registry(progress=progress) as opened:
            return lorahub_learning(
                refs, example_inputs, example_outputs, max_inference_step, model_name_or_path,
                batch_size, get_loss, get_regular, seed, eos=eos, allow_base=allow_base,
                device=device, registry=opened, progress=progress,
            )  # fmt: skip
    resolved = resolve_refs(refs, beside=Path.cwd(), registry=registry, progress=progress)
    members = resolved.members
    check_sum(members)
    check_factors(members)
    named = None if model_name_or_path is None else str(model_name_or_path)
    first = resolved.records[members[0].name]
    found = base_of(first, named, registry=registry, progress=progress)
    for passed in check_base(members, found.facts, allow=allow_base):
        warnings.warn(passed, stacklevel=2)

    from lorahub_registry.compose.published import Examples, search
    from lorahub_registry.evaluate.base import load_base
    from lorahub_registry.evaluate.quiet import threads_for

    assert found.folder is not None
    with progress.task(f"Loading {found.facts.name}"):
        base = load_base(
            found.folder, name=found.facts.name, revision=found.facts.revision, device=device,
            dtype="float32",
        )  # fmt: skip
    rows = encoded(base, pairs, eos)
    examples = Examples(pairs, rows, pad=base.tokenizer.pad_token_id or 0, seq2seq=base.seq2seq)
    own_loss = None if get_loss is default_get_loss else get_loss
    with threads_for(base.model):
        weights = search(
            base,
            members,
            rows,
            steps=max_inference_step,
            batch_size=batch_size,
            seed=seed,
            get_loss=(lambda: own_loss(examples, base.model, batch_size)) if own_loss else None,
            get_regular=None if get_regular is default_l1_regularization else get_regular,
            progress=progress,
        )
    if not any(weights):
        warnings.warn("every weight is 0: the model is the base itself", stacklevel=2)
    return weights, base.model, base.tokenizer


def lorahub_inference(
    example_inputs: Sequence[str],
    model_or_name_path: Any,
    tokenizer_or_tokenizer_path: Any,
    batch_size: int,
    example_outputs: Sequence[str] | None = None,
    *,
    eos: bool = False,
    device: str = "auto",
    registry: Registry | None = None,
    progress: Progress = silent,
) -> tuple[list[str], float | None]:
    """Greedy answers of at most 256 tokens, and how many of them are right.

    Args:
        example_inputs: prompts, as in :func:`lorahub_learning`.
        model_or_name_path: what :func:`lorahub_learning` gave, any other model of transformers or
            PEFT, or a base's folder or name.
        tokenizer_or_tokenizer_path: likewise.
        batch_size: prompts in a batch.
        example_outputs: the right answers. A causal model's answer is then cut at the right one's
            number of tokens, unless ``eos``.
        eos: a causal model's answers end with EOS.
        device: where a model that is loaded here goes.

    Returns:
        (one prediction an input, per cent of them equal to the right answer; None without
        ``example_outputs``). Equal means after strip, lower case, and without any ".".

    Raises:
        UsageError: ``batch_size`` is no number of rows.
        DataError: no inputs, or as many as there are not outputs.
        BaseModelError: model or tokenizer cannot be loaded.
    """
    at_least_one(batch_size, "batch_size")
    prompts = texts(example_inputs, "example_inputs", DataError)
    pairs = pairs_of(prompts, ["-"] * len(prompts) if example_outputs is None else example_outputs)
    from lorahub_registry.evaluate.generation import generate
    from lorahub_registry.evaluate.quiet import threads_for

    base = loaded_pair(model_or_name_path, tokenizer_or_tokenizer_path, device, registry, progress)
    rows = encoded(base, pairs, eos)
    whole = base.seq2seq or eos or example_outputs is None
    predictions: list[str] = []
    with threads_for(base.model), progress.task("Generating", len(rows), "row") as task:
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            longest = _MAX_NEW if whole else min(_MAX_NEW, max(len(r.output) for r in part))
            answers = generate(
                base.model, base.tokenizer, [r.prompt for r in part], max_new_tokens=longest,
                seq2seq=base.seq2seq,
            )  # fmt: skip
            for answer, row in zip(answers, part, strict=True):
                ids = answer if whole else answer[: len(row.output)]
                predictions.append(base.tokenizer.decode(ids, skip_special_tokens=True))
            task.advance(len(part))
    if example_outputs is None:
        return predictions, None
    right = sum(
        _plain(said) == _plain(wanted)
        for said, wanted in zip(predictions, example_outputs, strict=True)
    )
    return predictions, 100 * right / len(predictions)


def _plain(text: str) -> str:
    return text.strip().lower().replace(".", "")
