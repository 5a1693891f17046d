"""What a factory names, found, read and checked."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub_registry.api.bases import ResolvedBase, resolve_base
from lorahub_registry.api.output import REPORT_NAME, check_output
from lorahub_registry.errors import (
    AmbiguousRef,
    BaseModelError,
    DataError,
    OutputError,
    UnknownRef,
)
from lorahub_registry.lock import Pin
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes.factory import AdapterPlan, Factory
from lorahub_registry.recipes.factory_file import FactoryFile, factory_from_mapping, load_factory
from lorahub_registry.recipes.rows import overlap
from lorahub_registry.recipes.splits import read_splits
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    from lorahub_registry.evaluate.rows import Tokenised


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split of one adapter's data.

    Attributes:
        name: of the file or dataset that they are from.
        sha256: of its bytes, see :class:`~lorahub_registry.recipes.rows.RowsFile`.
        revision: of a dataset on the Hub.
    """

    name: str
    sha256: str
    revision: str | None
    tokens: Tokenised

    @property
    def facts(self) -> dict[str, Any]:
        """For ``results.json``."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "rows": self.tokens.read,
            "tokens": self.tokens.tokens,
            "output_tokens": self.tokens.output_tokens,
            "dropped": len(self.tokens.dropped),
            "cut": self.tokens.cut,
        }

    @property
    def pin(self) -> Pin:
        """For ``lorareg.lock``."""
        return Pin(self.name, self.revision, {self.name: self.sha256})


@dataclass(frozen=True)
class Order:
    """One adapter to make: its plan, and its rows as tokens.

    Attributes:
        splits: ``train``, and ``validation`` and ``test`` where it has them.
        notes: what was left out or cut.
    """

    plan: AdapterPlan
    splits: Mapping[str, SplitRows]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Ready:
    """Everything that a factory names.

    Attributes:
        out: the folder that the adapters' folders will be in.
        vocabulary: how many tokens the base knows.
    """

    file: FactoryFile
    base: ResolvedBase
    orders: tuple[Order, ...]
    out: Path
    seq2seq: bool
    vocabulary: int

    @property
    def factory(self) -> Factory:
        """As it was read."""
        return self.file.factory


def prepare_factory(
    factory: str | Path | Mapping[str, Any] | FactoryFile,
    *,
    registry: Registry,
    force: bool = False,
    progress: Progress = silent,
) -> Ready:
    """Find, read and check all that a factory names. No weights are loaded, nothing is written.

    Raises:
        LoraregError: whatever is wrong with it, before it costs time.
    """
    import transformers

    file = _file(factory)
    wanted = file.factory
    out = Path(os.path.realpath(file.resolve(wanted.output.path)))
    base = resolve_base(wanted.base, registry=registry, beside=file.folder, progress=progress)
    assert base.folder is not None
    names = [plan.name for plan in wanted.adapters]
    _check_entered(out, names, registry, force=force, progress=progress)
    check_output(out, force=force, made_of=[base.folder])
    for name in names:
        if _known(str(out / name), registry):
            progress.say(f"{name}: the registry has {out / name} already; it will be replaced")
        elif other := _known(name, registry):
            progress.say(f"{name}: the registry has another adapter of that name, {other}")
    try:
        config = transformers.AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"the base {base.facts.name} has no tokenizer that can be loaded: {error}"
        ) from None
    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    if wanted.quantization is not None:
        from lorahub_registry.evaluate.base import check_quantization

        check_quantization(wanted.quantization)
    text = config.get_text_config()
    orders = []
    with progress.task("Reading rows", len(wanted.adapters), "adapter") as task:
        for plan in wanted.adapters:
            orders.append(
                _order(plan, file.folder, tokenizer, text, base.facts.name, seq2seq, progress)
            )
            task.advance()
    from lorahub_registry.train.apart import check_apart

    each = {plan.name: plan.lora.target_modules for plan in wanted.adapters}
    check_apart(config, each, seq2seq=seq2seq)
    if unknown := [plan.name for plan in wanted.adapters if plan.license is None]:
        progress.warn(
            f"the licence of {', '.join(unknown)} is unknown, and the unknown is not pushed: say "
            "license: … in the factory"
        )
    return Ready(file, base, tuple(orders), out, seq2seq, text.vocab_size)


def _check_entered(
    out: Path, names: list[str], registry: Registry, *, force: bool, progress: Progress
) -> None:
    """Whether an earlier run of these adapters was killed before they were in the registry.

    Raises:
        OutputError: it was; with ``force`` that is only told.
    """
    left = [name for name in _finished(out) if not _known(str(out / name), registry)]
    if left and set(left) <= set(names):
        what = f"{out} is finished, and the registry lacks {', '.join(left)} of it"
        hint = f"lorareg add {shlex.quote(str(out))}"
        if not force:
            raise OutputError(what, hint=f"{hint} enters them; --force trains all of them again")
        progress.warn(f"{what}: {hint} enters them")


def _finished(out: Path) -> list[str]:
    """The adapters of a run that came to its end; none where no run has written ``out``."""
    try:
        report = json.loads((out / REPORT_NAME).read_text("utf-8"))
        return list(report["adapters"]) if report["command"] == "train" else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _known(ref: str, registry: Registry) -> str | None:
    """What the registry calls it; None where it knows nothing of that name or at that place."""
    try:
        return registry.get(ref).ref
    except UnknownRef:
        return None
    except AmbiguousRef as error:
        return str(error)


def _file(factory: str | Path | Mapping[str, Any] | FactoryFile) -> FactoryFile:
    if isinstance(factory, FactoryFile):
        return factory
    if isinstance(factory, Mapping):
        return FactoryFile(factory_from_mapping(factory), Path.cwd() / "factory.yaml", "")
    return load_factory(factory)


def _order(
    plan: AdapterPlan,
    beside: Path,
    tokenizer: Any,
    config: Any,
    base: str,
    seq2seq: bool,
    progress: Progress,
) -> Order:
    """The adapter's rows, all of them checked.

    Raises:
        DataError: it names the adapter, and the row.
    """
    from lorahub_registry.evaluate.rows import check_length, tokenise
    from lorahub_registry.evaluate.tokens import check_vocabulary

    most = getattr(config, "max_position_embeddings", None)
    splits, notes = {}, []
    try:
        files = read_splits(plan, beside=beside)
        window = getattr(config, "sliding_window", None)
        if plan.training.packing and window and window < (plan.data.max_length or 0):
            raise DataError(
                f"packing lays rows into {plan.data.max_length} tokens, and {base} attends to "
                f"{window} at a time, which its mask would lose",
                hint=f"max_length of at most {window}, or leave out packing",
            )
        if seq2seq and plan.training.packing:
            raise DataError(
                "packing is for causal models, and this base is encoder–decoder",
                hint="leave it out; group_by_length saves padding, too",
            )
        for name, file in files.items():
            split = getattr(plan.data, name)
            plain = plan.data.train if isinstance(split, float) else split
            tokens = tokenise(
                file.rows, plan.data, tokenizer, seq2seq=seq2seq, text=plain.text is not None
            )
            check_vocabulary(tokens.rows, config.vocab_size, tokenizer)
            check_length(tokens.rows, most, base, seq2seq=seq2seq)
            splits[name] = SplitRows(file.name, file.sha256, file.revision, tokens)
            notes += tokens.notes(name)
            if name != "train" and (shared := overlap(files["train"].rows, file.rows)):
                notes.append(f"{shared} of {len(file.rows)} {name} rows are also training rows")
    except DataError as error:
        raise DataError(f"{plan.name}: {error}", hint=error.hint) from None
    for note in notes:
        progress.warn(f"{plan.name}: {note}")
    return Order(plan, splits, tuple(notes))
