"""Rows as a model sees them, before anything is trained or mixed: only the tokenizer is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub_registry.api.bases import resolve_base
from lorahub_registry.errors import BaseModelError, DataError, UnknownRef, UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes import (
    AdapterPlan,
    FactoryFile,
    RecipeFile,
    RowsFile,
    load_any,
    read_file,
    read_splits,
)
from lorahub_registry.recipes.fields import did_you_mean
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    from lorahub_registry.evaluate.tokens import Encoded

SPLITS = ("train", "validation", "test")
_BEFORE = 8  # tokens that decide how the next one is written


def preview(
    path: str | Path,
    *,
    registry: Registry,
    adapter: str | None = None,
    split: str = "train",
    rows: int = 3,
    progress: Progress = silent,
) -> dict[str, Any]:
    """What becomes of a factory's or a recipe's rows: tokens, what is learned, what is left out.

    Args:
        path: a factory or a recipe.
        adapter: whose rows, of a factory; default: its first adapter's.
        split: ``train``, ``validation`` or ``test``.
        rows: how many to show; the counts are over all of them.

    Returns:
        Where the rows are from (``name source sha256 objective``), the rule (``template max_length
        eos``), counts (``read rows tokens output_tokens longest cut windowed``), ``dropped`` (place
        and why), ``batches`` (of ``train`` in a factory: padding or packing), ``notes``, and
        ``shown``: of each row its place, its texts, and its tokens with their ids, ``learned``
        where they count in the loss.

    Raises:
        RecipeError: the file is neither, or not valid.
        DataError: rows that cannot be used.
        LoraregError: the base is not found.
    """
    file = load_any(path)
    name, data, plan, read, text = _chosen(file, adapter, split, progress)
    written = file.factory.base if isinstance(file, FactoryFile) else file.recipe.base
    base = resolve_base(
        written, registry=registry, beside=file.folder, hashed=False, progress=progress
    )
    assert base.folder is not None
    config, tokenizer = _tokenizer(base.folder, base.facts.name or written)
    from lorahub_registry.evaluate.rows import check_length, tokenise
    from lorahub_registry.evaluate.tokens import check_vocabulary

    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    found = tokenise(
        read.rows, data, tokenizer, seq2seq=seq2seq, text=text, drop=plan is not None
    )  # fmt: skip
    positions = getattr(config, "max_position_embeddings", None)
    check_length(found.rows, positions, base.facts.name or written, seq2seq=seq2seq)
    check_vocabulary(found.rows, config.get_text_config().vocab_size, tokenizer)
    notes = found.notes(split)
    if getattr(_split_of(file, split), "select", "") == "diverse":
        notes.append("select: diverse is the base's choice; all rows are counted here")
    return {
        "kind": "recipe" if plan is None else "factory",
        "name": name,
        "split": split,
        "source": read.name,
        "sha256": read.sha256,
        "revision": read.revision,
        "objective": "lm" if text else "supervised",
        "base": base.facts.name,
        "template": None if text else data.template,
        "max_length": data.max_length,
        "eos": data.eos,
        "read": found.read,
        "rows": len(found.rows),
        "tokens": found.tokens,
        "output_tokens": found.output_tokens,
        "longest": max(len(row.prompt) + len(row.output) for row in found.rows),
        "cut": found.cut,
        "windowed": found.windowed,
        "dropped": list(found.dropped),
        "batches": _batches(found.rows, plan, seq2seq) if plan and split == "train" else None,
        "notes": notes,
        "shown": [_shown(row, tokenizer, seq2seq) for row in found.rows[:rows]],
    }


def _chosen(
    file: RecipeFile | FactoryFile, adapter: str | None, split: str, progress: Progress
) -> tuple[str, Any, AdapterPlan | None, RowsFile, bool]:
    """Name, rules, plan (of a factory), rows, and whether they are plain text."""
    if isinstance(file, RecipeFile):
        if adapter is not None:
            raise UsageError("--adapter is for factories; all of a recipe has the same rows")
        spec = _split_of(file, split)
        if spec is None:
            raise DataError(f"{file.path.name}: has no data.{split}")
        read = read_file(spec, seed=file.recipe.seed, beside=file.folder)
        return file.recipe.name, file.recipe.data, None, read, False
    plans = {plan.name: plan for plan in file.factory.adapters}
    if adapter is None:
        adapter = next(iter(plans))
        if len(plans) > 1:
            progress.say(f"{adapter}, the first of {len(plans)} adapters; --adapter takes another")
    if adapter not in plans:
        near = did_you_mean(adapter, plans) or f"; it has {', '.join(plans)}"
        raise UnknownRef(f"{file.path.name}: no adapter {adapter!r}{near}")
    plan = plans[adapter]
    spec = getattr(plan.data, split)
    if spec is None:
        raise DataError(f"{file.path.name}: {adapter} has no data.{split}")
    source = plan.data.train if isinstance(spec, float) else spec
    read = read_splits(plan, beside=file.folder)[split]
    return adapter, plan.data, plan, read, source.objective == "lm"


def _split_of(file: RecipeFile | FactoryFile, split: str) -> Any:
    return getattr(file.recipe.data, split, None) if isinstance(file, RecipeFile) else None


def _tokenizer(folder: Path, name: str) -> tuple[Any, Any]:
    """A base's config and tokenizer."""
    import transformers

    try:
        return (
            transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False),
            transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        )
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"{name}: no tokenizer there ({error})") from error


def _batches(rows: Sequence[Encoded], plan: AdapterPlan, seq2seq: bool) -> dict[str, Any]:
    """How full the first epoch's batches are, taken in the file's order."""
    options = plan.training
    sizes = [(len(r.prompt), len(r.output)) if seq2seq else (len(r.prompt) + len(r.output),)
             for r in rows]  # fmt: skip
    if options.packing and not seq2seq:
        from lorahub_registry.evaluate.packing import pack

        assert plan.data.max_length is not None
        packs = pack(rows, plan.data.max_length)
        sizes = [(sum(len(r.prompt) + len(r.output) for r in one),) for one in packs]
    elif options.group_by_length:
        sizes = sorted(sizes)
    whole = filled = 0
    for at in range(0, len(sizes), options.batch_size):
        for side in zip(*sizes[at : at + options.batch_size], strict=True):
            whole += max(side) * len(side)
            filled += sum(side)
    return {
        "batch_size": options.batch_size,
        "batches": -(-len(sizes) // options.batch_size),
        "packs": len(sizes) if options.packing and not seq2seq else None,
        "padding": 1 - filled / whole,
    }


def _shown(row: Encoded, tokenizer: Any, seq2seq: bool) -> dict[str, Any]:
    # The two sides of a seq2seq row are two texts; a causal row is one.
    before: list[int] = [] if seq2seq else row.prompt
    texts = _texts([], row.prompt, tokenizer) + _texts(before, row.output, tokenizer)
    prompt = _decoded(row.prompt, tokenizer)
    whole = _decoded([*row.prompt, *row.output], tokenizer)
    joined = not seq2seq and whole.startswith(prompt)
    return {
        "place": row.place,
        "prompt": prompt,
        "output": whole[len(prompt) :] if joined else _decoded(row.output, tokenizer),
        "prompt_tokens": len(row.prompt),
        "output_tokens": len(row.output),
        "cut": row.cut,
        "tokens": [
            {"id": id, "text": text, "learned": n >= len(row.prompt)}
            for n, (id, text) in enumerate(zip([*row.prompt, *row.output], texts, strict=True))
        ],
    }


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""


def _texts(before: Sequence[int], ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each of ``ids`` adds to the text; of a part of a letter the tokenizer's name for it."""
    whole, texts = [*before, *ids], []
    for n in range(len(before), len(whole)):
        start = max(0, n - _BEFORE)
        head = _decoded(whole[start:n], tokenizer)
        text = _decoded(whole[start : n + 1], tokenizer)
        added = text[len(head) :] if text.startswith(head) else ""
        if not added or added.endswith("\N{REPLACEMENT CHARACTER}"):
            added = str(tokenizer.convert_ids_to_tokens(whole[n]))
        texts.append(added)
    return texts
