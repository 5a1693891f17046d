"""Explain: which adapter of a dynamic mixture speaks at which token, and in which layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.dynamic import (
    PEFT_TYPE,
    Constant,
    Dynamic,
    folder_to_run,
    parse_dynamic,
)
from lorahub_registry.adapters.facts import read_config
from lorahub_registry.api.listen import listen
from lorahub_registry.api.talk import Loaded, composed, load, record_of
from lorahub_registry.api.voices import Voices
from lorahub_registry.card import RECIPE_NAME, RESULTS_NAME
from lorahub_registry.errors import DataError, IncompatibleAdapters, UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.registry.store import Registry


@dataclass(frozen=True)
class Explained:
    """What a mixture does with one prompt.

    Attributes:
        router: its type: ``lora_flow``, ``arrow`` or ``prompt_router``.
        answer: the greedy continuation.
        voices: of prompt and answer.
        prompt: of a router that decides once for the whole prompt, adapter → probability, the
            likeliest first; None for others.
    """

    name: str
    router: str
    answer: str
    voices: Voices
    prompt: dict[str, float] | None = None


def explain(
    ref: str | Path,
    text: str,
    *,
    max_new_tokens: int = 32,
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
        base: where its base is, if not where the registry knows; or (model, tokenizer).
        device, dtype: as in a recipe.

    Raises:
        UsageError: the prompt is empty.
        IncompatibleAdapters: ``ref`` has the same coefficients everywhere.
        DataError: the prompt is longer than the base takes, or its template does not fit.
        UnknownRef, LockError, BaseModelError: as in ``load``.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return explain(
                ref, text, max_new_tokens=max_new_tokens, base=base, device=device, dtype=dtype,
                registry=opened, progress=progress,
            )  # fmt: skip
    if not text.strip():
        raise UsageError("the prompt is empty", hint='lorareg explain REF "Once upon a time"')
    if str(ref).endswith((".yaml", ".yml")):
        ref = composed(Path(ref), registry, progress)
    # Told before the base is loaded, which may take minutes.
    mixture = _dynamic(str(ref), record_of(str(ref), registry)[0])
    from lorahub_registry.evaluate.quiet import threads_for

    loaded = load(ref, base=base, device=device, dtype=dtype, registry=registry, progress=progress)
    with threads_for(loaded.model), progress.task("Listening"):
        prompt, answer = _said(loaded, text, max_new_tokens, progress)
        found = listen(loaded.model, loaded.tokenizer, mixture, prompt, answer)
    spoken = loaded.tokenizer.decode(answer, skip_special_tokens=True)
    once = _for_prompt(found) if mixture.router.site == "prompt" else None
    return Explained(loaded.name, mixture.router.type, str(spoken).strip(), found, once)


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


def _dynamic(ref: str, folder: Path) -> Dynamic:
    """What the config of the mixture in ``folder`` says.

    Raises:
        IncompatibleAdapters: its coefficients are the same everywhere.
    """
    inner = folder_to_run(folder)
    config = read_config(inner)
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


def _for_prompt(voices: Voices) -> dict[str, float]:
    """Adapter → probability, the likeliest first."""
    line = next(line for lines in voices.layers.values() for line in lines if line is not None)
    found = {
        name: 0.0 if value is None else value
        for name, value in zip(voices.adapters, line, strict=True)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))
