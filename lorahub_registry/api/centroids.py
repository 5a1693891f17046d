"""Learn what an adapter is for: where the prompts of its rows lie in its base's hidden space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from lorahub_registry.api.bases import base_of, load_found
from lorahub_registry.errors import UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes import Data, Split, read_file
from lorahub_registry.recipes.template import DEFAULT
from lorahub_registry.registry.records import CentroidRecord, StoredAdapter
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    from lorahub_registry.evaluate.base import LoadedBase
    from lorahub_registry.evaluate.tokens import Encoded


def learn_centroid(
    ref: str,
    rows: str | Path,
    *,
    base: str | None = None,
    input: str = "input",
    output: str = "output",
    template: str = DEFAULT,
    device: str = "auto",
    dtype: str = "auto",
    registry: Registry | None = None,
    progress: Progress = silent,
) -> tuple[StoredAdapter, CentroidRecord]:
    """Remember where the prompts of an adapter's rows lie, for :mod:`~lorahub_registry.api.route`.

    Args:
        ref: an adapter that the registry knows; its files need not be here.
        rows: a file of examples of what it is for, as a recipe takes them.
        base: where its base is, if not where the registry knows.
        input, output: the columns.
        template: what makes a row's prompt, as in a recipe; a prompt that is routed is put into it.
        device, dtype: as in a recipe.

    Raises:
        UnknownRef, AmbiguousRef: the registry has no such adapter, or several.
        DataError: rows that cannot be used.
        UsageError: columns or a template that a recipe would refuse.
        BaseModelError: its base is not known, is no model, or the rows need more than it has.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return learn_centroid(
                ref, rows, base=base, input=input, output=output, template=template,
                device=device, dtype=dtype, registry=opened, progress=progress,
            )  # fmt: skip
    stored = registry.get(ref)
    rules, split = _rules(template, str(rows), input, output)
    file = read_file(split, seed=0)
    found = base_of(stored.record, base, registry=registry, progress=progress)
    loaded = load_found(found, device, dtype, progress)
    from lorahub_registry.evaluate.quiet import threads_for
    from lorahub_registry.evaluate.rows import tokenise
    from lorahub_registry.evaluate.tokens import check_vocabulary

    rules = rules.model_copy(update={"max_length": positions(loaded)})
    tokens = tokenise(file.rows, rules, loaded.tokenizer, seq2seq=loaded.seq2seq)
    for note in tokens.notes("its"):
        progress.warn(note)
    vocabulary = loaded.model.config.get_text_config().vocab_size
    check_vocabulary(tokens.rows, vocabulary, loaded.tokenizer)
    with threads_for(loaded.model):
        record = centroid_of_rows(
            loaded, tokens.rows, template=template, rows_digest=file.sha256,
            base_digest=found.facts.digest or "", progress=progress,
        )  # fmt: skip
    return registry.put_centroid(stored.ref, record), record


def centroid_of_rows(
    base: LoadedBase,
    rows: Sequence[Encoded],
    *,
    template: str,
    rows_digest: str,
    base_digest: str,
    text: bool = False,
    progress: Progress = silent,
) -> CentroidRecord:
    """The centroid of rows that are tokens already, for ``Registry.put_centroid``.

    Args:
        template: what made their prompts.
        rows_digest: of the file that they are from.
        base_digest: of the base's tensors.
        text: they are plain text, which is all there is to go by; else their prompts count.
    """
    from lorahub_registry.evaluate.hidden import centroid, middle_layer

    layer = middle_layer(base)
    ids = [[*row.prompt, *row.output] if text else row.prompt for row in rows]
    vector = centroid(base, ids, layer, progress=progress)
    packed = vector.numpy().astype("<f4").tobytes()
    return CentroidRecord(base.name, base_digest, layer, template, len(rows), rows_digest, packed)


def positions(base: LoadedBase) -> int | None:
    """How many tokens it takes; None where any number."""
    return getattr(base.model.config.get_text_config(), "max_position_embeddings", None)


def _rules(template: str, path: str, input: str, output: str) -> tuple[Data, Split]:
    try:
        return Data(template=template), Split(path=path, input=input, output=output)
    except ValidationError as error:
        first = error.errors()[0]
        what = str(first["msg"]).removeprefix("Value error, ")
        raise UsageError(f"{first['loc'][0]}: {what}") from None
