"""Explain: which adapter of a dynamic mixture speaks at which token, and in which layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorahub_registry.adapters.base_files import BaseFacts
from lorahub_registry.adapters.compat import Member, check_base
from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.dynamic import (
    FOLDER,
    PEFT_TYPE,
    Constant,
    Dynamic,
    folder_to_run,
    parse_dynamic,
)
from lorahub_registry.adapters.facts import PREFIX, ModuleFacts, read_config, read_facts
from lorahub_registry.adapters.layer_order import layer_order
from lorahub_registry.adapters.mixlora import parse_mixlora
from lorahub_registry.adapters.tensors import WEIGHTS_NAME, read_header
from lorahub_registry.api.bases import base_of
from lorahub_registry.api.listen import listen
from lorahub_registry.api.listen_experts import listen_experts
from lorahub_registry.api.talk import Loaded, composed, load, record_of
from lorahub_registry.api.voices import Voices
from lorahub_registry.card import RECIPE_NAME, RESULTS_NAME, read_results
from lorahub_registry.errors import DataError, IncompatibleAdapters, UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.registry.records import AdapterRecord
from lorahub_registry.registry.store import Registry

_A = ".lora_A.weight"


@dataclass(frozen=True)
class Explained:
    """What a mixture does with one prompt.

    Attributes:
        router: its type: ``lora_flow``, ``arrow``, ``prompt_router`` or ``mixlora``.
        answer: the greedy continuation.
        voices: of prompt and answer.
        prompt: of a router that decides once for the whole prompt, adapter → probability, the
            likeliest first; None for others.
        of: whose voices they are: adapters', or those of experts that have numbers alone.
    """

    name: str
    router: str
    answer: str
    voices: Voices
    prompt: dict[str, float] | None = None
    of: Literal["adapter", "expert"] = "adapter"


def explain(
    ref: str | Path,
    text: str,
    *,
    max_new_tokens: int = 32,
    layer: str | None = None,
    base: str | tuple[Any, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    registry: Registry | None = None,
    progress: Progress = silent,
) -> Explained:
    """Run a prompt and its greedy continuation through a dynamic mixture, and listen.

    Args:
        ref: as in :func:`~lorahub_registry.api.talk.load`.
        text: the prompt; it is put into the mixture's template, as ``generate`` does.
        max_new_tokens: the longest continuation; 0 for the prompt alone.
        layer: the number or name of a layer that is going to be asked for, so that a wrong one is
            told before the base is loaded.
        base: where its base is, if not where the registry knows; or (model, tokenizer).
        device, dtype: as in a recipe.

    Raises:
        UsageError: the prompt is empty, or there is no such layer.
        IncompatibleAdapters: ``ref`` has the same coefficients everywhere, or does not fit the
            base.
        DataError: the prompt is longer than the base takes, or its template does not fit.
        UnknownRef, LockError, BaseModelError: as in ``load``.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return explain(
                ref, text, max_new_tokens=max_new_tokens, layer=layer, base=base, device=device,
                dtype=dtype, registry=opened, progress=progress,
            )  # fmt: skip
    if not text.strip():
        raise UsageError("the prompt is empty", hint='lorareg explain REF "Once upon a time"')
    if str(ref).endswith((".yaml", ".yml")):
        ref = composed(Path(ref), registry, progress)
    # Told before the base is loaded, which may take minutes.
    folder, record = record_of(str(ref), registry)
    experts = _experts(folder_to_run(folder))
    mixture = None if experts else _dynamic(str(ref), folder)
    modules = () if experts else _modules(folder_to_run(folder))
    if layer is not None and mixture is not None:
        _check_layer(layer, record.name, mixture, modules)
    if not isinstance(base, tuple) and mixture is not None:
        found_base = base_of(record, base, registry=registry, progress=progress)
        _check_shapes(folder_to_run(folder), record, modules, found_base.facts)
    from lorahub_registry.evaluate.quiet import threads_for

    loaded = load(ref, base=base, device=device, dtype=dtype, registry=registry, progress=progress)
    with threads_for(loaded.model), progress.task("Listening"):
        prompt, answer = _said(loaded, text, max_new_tokens, progress)
        if mixture is None:
            found = listen_experts(loaded.model, loaded.tokenizer, experts, prompt, answer)
        else:
            found = listen(loaded.model, loaded.tokenizer, mixture, prompt, answer)
    spoken = loaded.tokenizer.decode(answer, skip_special_tokens=True)
    once = _for_prompt(found) if mixture and mixture.router.site == "prompt" else None
    router = mixture.router.type if mixture else "mixlora"
    of: Literal["adapter", "expert"] = (
        "expert" if experts and experts == _numbered(len(experts)) else "adapter"
    )
    return Explained(loaded.name, router, str(spoken).strip(), found, once, of)


def _said(loaded: Loaded, text: str, limit: int, progress: Progress) -> tuple[list[int], list[int]]:
    """(The prompt's token ids, those of its greedy continuation)."""
    from lorahub_registry.evaluate.generation import generate
    from lorahub_registry.evaluate.tokens import TokenRule, encode
    from lorahub_registry.recipes import render
    from lorahub_registry.recipes.rows import Row

    model, chat = loaded.model, loaded.prompt == "chat"
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    row = Row(text, "-", {"input": text, "output": "-"})
    prompt = text if chat else render(loaded.prompt, row)
    [encoded] = encode(loaded.tokenizer, [(prompt, "-")], TokenRule(chat=chat), seq2seq=seq2seq)
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and len(encoded.prompt) > most:
        raise DataError(
            f"the prompt has {len(encoded.prompt)} tokens, and the base takes {most}",
            hint="take a shorter one",
        )
    if most is not None and not seq2seq and len(encoded.prompt) + limit > most:
        limit = most - len(encoded.prompt)
        progress.warn(f"the base takes {most} tokens, so at most {limit} are added to the prompt")
    if not limit:
        return encoded.prompt, []
    [answer] = generate(
        model, loaded.tokenizer, [encoded.prompt], max_new_tokens=limit, seq2seq=seq2seq
    )
    return encoded.prompt, answer


def _experts(folder: Path) -> tuple[str, ...]:
    """Names of the experts of the MixLoRA in ``folder``; empty where it is none.

    They stand in the results of the mixture that it is a part of; those of any other have numbers.
    """
    config = read_config(folder)
    if config.peft_type != "MIXLORA":
        return ()
    count = parse_mixlora(config.raw, str(folder / CONFIG_NAME)).num_experts
    if folder.name == FOLDER and (folder.parent / RESULTS_NAME).is_file():
        names = tuple(member["name"] for member in read_results(folder.parent)["members"])
        if len(names) == count:
            return names
    return _numbered(count)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"expert {number}" for number in range(count))


def _dynamic(ref: str, folder: Path) -> Dynamic:
    """What the config of the mixture in ``folder`` says.

    Raises:
        IncompatibleAdapters: its coefficients are the same everywhere, or it is a LoRAMoE or MoLA.
    """
    inner = folder_to_run(folder)
    config = read_config(inner)
    if kind := {"LORAMOE": "LoRAMoE", "MOLA": "MoLA"}.get(config.peft_type):
        raise IncompatibleAdapters(
            f"{ref} is {kind}: its experts, chosen among in each module, are not shown here; of "
            "mixtures of experts MixLoRA alone is",
            hint=f"lorareg show {ref} tells its experts and their router",
        )
    if config.peft_type != PEFT_TYPE:
        if (folder / RESULTS_NAME).is_file() and (folder / RECIPE_NAME).is_file():
            raise IncompatibleAdapters(
                f"{ref} is a static mixture: its coefficients are the same at every token",
                hint=f"they stand in {folder / RESULTS_NAME} under members, and in its README.md",
            )
        raise IncompatibleAdapters(
            f"{ref} is one adapter, no dynamic mixture: it speaks as loud at every token",
            hint=f"its scaling stands in {inner / CONFIG_NAME}: lora_alpha / r; mix several with "
            "method lora_flow or arrow to have them chosen token by token",
        )
    found = parse_dynamic(config.raw.get("mixture"), where=str(inner / CONFIG_NAME))
    if isinstance(found.router, Constant):
        raise IncompatibleAdapters(
            f"{ref} is a static mixture: its coefficients are the same at every token",
            hint=f"they stand in {inner / CONFIG_NAME} under mixture, router, coefficients",
        )
    return found


def _modules(folder: Path) -> tuple[ModuleFacts, ...]:
    """Where the experts of the mixture in ``folder`` sit, by their file's header alone."""
    file, found = folder / WEIGHTS_NAME, []
    tensors = read_header(file).tensors if file.is_file() else {}
    for key, a in tensors.items():
        b = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if key.endswith(_A) and b is not None and len(a.shape) == len(b.shape) == 2:
            name = key.removeprefix(PREFIX).removesuffix(_A)
            found.append(
                ModuleFacts(name, "linear", a.shape[0], a.shape[1], b.shape[0], 1.0, key, b.name)
            )
    return tuple(found)


def _check_layer(wanted: str, name: str, mixture: Dynamic, modules: Sequence[ModuleFacts]) -> None:
    """Whether any module may be in a layer that is called so; the base alone tells which are.

    Raises:
        UsageError: none is.
    """
    if mixture.router.site == "prompt":
        raise UsageError(
            f"--layer {wanted}: {name} decides once for the whole prompt, the same in every layer",
            hint="leave --layer out",
        )
    layers: dict[str, None] = {}
    for module in modules:
        parts = module.name.split(".")
        layers |= dict.fromkeys(
            ".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()
        )
    if not layers or wanted in layers or any(one.endswith(f".{wanted}") for one in layers):
        return
    # The outermost numbers are the layers, but for a base that has lists in lists.
    depth = min(one.count(".") for one in layers)
    names = sorted((one for one in layers if one.count(".") == depth), key=layer_order)
    raise UsageError(
        f"--layer {wanted}: no layer with adapters is called so",
        hint=f"mean, or a number or name of {names[0]} … {names[-1]}",
    )


def _check_shapes(
    folder: Path, record: AdapterRecord, modules: tuple[ModuleFacts, ...], base: BaseFacts
) -> None:
    """Whether the experts fit the base; whether it is theirs by name, ``load`` tells.

    Raises:
        IncompatibleAdapters: they do not.
    """
    member = Member(
        name=record.name,
        key=str(folder),
        ref=record.name,
        folder=folder,
        facts=replace(read_facts(folder), modules=modules),
        base=record.base.name,
    )
    check_base([member], base, allow=True)


def _for_prompt(voices: Voices) -> dict[str, float]:
    """Adapter → probability, the likeliest first."""
    line = next(line for lines in voices.layers.values() for line in lines if line is not None)
    found = {
        name: 0.0 if value is None else value
        for name, value in zip(voices.adapters, line, strict=True)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))
