"""Load an adapter or mixture on its base, and talk to it beside others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub_registry.adapters.compat import Member, check_base, check_sum, check_weights
from lorahub_registry.adapters.dynamic import PEFT_TYPE, folder_to_run
from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.api.bases import ResolvedBase, base_of, load_found
from lorahub_registry.api.prepare import prepare, read_recipe
from lorahub_registry.api.written import check_dynamic
from lorahub_registry.api.xlora import check_xlora, is_xlora, load_xlora, xlora_on
from lorahub_registry.card import FACTORY_NAME, RECIPE_NAME, RESULTS_NAME, read_results
from lorahub_registry.errors import IncompatibleAdapters, UnknownRef, UsageError
from lorahub_registry.lock import LOCK_NAME
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import expand, looks_like_path
from lorahub_registry.registry.index import record_of_folder
from lorahub_registry.registry.records import AdapterRecord
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    from lorahub_registry.evaluate.base import LoadedBase

BASE = "base"


@dataclass
class Loaded:
    """An adapter on its base, ready to generate.

    Attributes:
        model: a PeftModel, loaded by PEFT; of a mixture that decides while it runs, that one.
        prompt: the template that its recipe made prompts with, else the project's default.
    """

    name: str
    model: Any
    tokenizer: Any
    prompt: str
    _base: LoadedBase

    def __repr__(self) -> str:
        kind = self.model.peft_config["adapter"].peft_type.value
        return f"<{kind} {self.name!r} on {self._base.name!r}, ready to generate>"

    def generate(
        self, text: str, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """What it answers to ``text``, put into the prompt's template; greedy at temperature 0.

        Raises:
            UsageError: ``text`` is no text.
        """
        return _answer(self._base, self.model, self.prompt, text, max_new_tokens, temperature, seed)


def load(
    ref: str | Path,
    *,
    base: str | tuple[Any, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    registry: Registry | None = None,
    progress: Progress = silent,
) -> Loaded:
    """A mixture or adapter on its base.

    Args:
        ref: a folder, a registered name, a Hub ref that was pulled, or a recipe (``.yaml``) that
            was composed.
        base: where its base is, if not where the registry knows; or (model, tokenizer).
        device, dtype: as in a recipe.

    Raises:
        UnknownRef: it is not on this machine, or the recipe was not composed.
        LockError: what was composed from the recipe is no longer what it names.
        IncompatibleAdapters: its weights are a pickle, or it was made for another base.
        BrokenAdapter: an X-LoRA without all of its tensors; a mixture that decides, without its
            own or with others than were composed.
        BaseModelError: its base is not known, or cannot be loaded.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return load(
                ref, base=base, device=device, dtype=dtype, registry=opened, progress=progress
            )
    from peft import PeftModel

    # With it PEFT learns our type, too.
    from lorahub_registry.runtime.room import check_room

    if str(ref).endswith((".yaml", ".yml")):
        ref = composed(Path(ref), registry, progress)
    folder, record = record_of(str(ref), registry)
    member = _member(folder, record)
    check_weights(member)
    check_dynamic(folder)
    if is_xlora(member):
        check_xlora(member)
    found: tuple[Any, Any] | ResolvedBase
    if isinstance(base, tuple):
        found = base
    else:
        found = base_of(record, base, registry=registry, progress=progress)
        for passed in check_base([member], found.facts, allow=base is not None):
            progress.warn(passed)
    loaded = _load_base(record, found, device, dtype, progress)
    if is_xlora(member):
        model = load_xlora(loaded.model, member, adapter="adapter")
        return Loaded(record.name, model, loaded.tokenizer, _template(folder), loaded)
    inner = folder_to_run(folder)
    facts = read_facts(inner)
    if facts.config.peft_type == PEFT_TYPE:
        check_room(4 * (facts.parameters or 0), loaded.device, f"the experts of {record.name}")
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that it is about to lose; nobody here can mend that.
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(loaded.model, str(inner), adapter_name="adapter")
    return Loaded(record.name, model.eval(), loaded.tokenizer, _template(folder), loaded)


def generate(
    ref: str,
    texts: Sequence[str],
    *,
    against: Sequence[str] = (),
    base: str | None = None,
    template: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    registry: Registry,
    progress: Progress = silent,
) -> list[dict[str, str]]:
    """Answers side by side: for each text, a mapping from name to answer, ``ref``'s own first.

    Args:
        against: other adapters of the same base, or ``base``.
        template: Jinja over ``input``; by default the mixture's own.

    Raises:
        UsageError: a name twice, or a prompt that is no text.
        IncompatibleAdapters: one of them was made for another base.
        BrokenAdapter: as in :func:`load`.
    """
    from lorahub_registry.evaluate.quiet import threads_for

    folder, record = record_of(ref, registry)
    names = [record.name]
    own = _members_of(folder, registry)
    members: list[Member | None] = [_member(folder, record)]
    for other in against:
        names.append(other)
        meant = own.get(other, other)
        members.append(None if other == BASE else _member(*record_of(meant, registry)))
    if len(set(names)) < len(names):
        raise UsageError(f"{max(names, key=names.count)!r} is named twice")
    present = [m for m in members if m is not None]
    for each in present:
        check_weights(each)
        check_dynamic(each.folder)
        if is_xlora(each):
            check_xlora(each)
    found = base_of(record, base, registry=registry, progress=progress)
    for passed in check_base(present, found.facts, allow=base is not None):
        progress.warn(passed)
    loaded = _load_base(record, found, device, dtype, progress)
    prompt = template or _template(folder)
    answers: list[dict[str, str]] = [{} for _ in texts]
    with (
        threads_for(loaded.model),
        progress.task("Generating", len(texts) * len(names), "answer") as task,
    ):
        for name, member in zip(names, members, strict=True):
            with _with(loaded, member) as model:
                for answer, text in zip(answers, texts, strict=True):
                    answer[name] = _answer(
                        loaded, model, prompt, text, max_new_tokens, temperature, seed
                    )
                    task.advance()
    return answers


@contextmanager
def _with(base: LoadedBase, member: Member | None) -> Iterator[Any]:
    """The base with one adapter; what is no delta (DoRA, whole modules) is PEFT's to apply."""
    from lorahub_registry.evaluate.stock import stock_peft
    from lorahub_registry.runtime.apply import applied
    from lorahub_registry.weights.files import load_deltas

    if member is None:
        yield base.model
        return
    if is_xlora(member):
        with xlora_on(base, member) as model:
            yield model
        return
    if (inner := folder_to_run(member.folder)) != member.folder:
        with stock_peft(base, inner) as model:
            yield model
        return
    try:
        check_sum([member])
    except IncompatibleAdapters:
        with stock_peft(base, member.folder) as model:
            yield model
        return
    with applied(base.model, load_deltas(member.folder, member.facts)):
        yield base.model


def _answer(
    base: LoadedBase,
    model: Any,
    template: str,
    text: str,
    limit: int,
    temperature: float,
    seed: int,
) -> str:
    from lorahub_registry.evaluate.generation import generate as run
    from lorahub_registry.evaluate.tokens import TokenRule, encode
    from lorahub_registry.recipes import render
    from lorahub_registry.recipes.rows import Row

    if not isinstance(text, str):
        raise UsageError(
            f"generate takes one prompt, a text, and was given {text!r:.60}",
            hint="call it once for each prompt",
        )
    chat = template == "chat"
    prompt = text if chat else render(template, Row(text, "-", {"input": text, "output": "-"}))
    # The output only has to be there: generation looks at the prompt alone.
    [row] = encode(base.tokenizer, [(prompt, "-")], TokenRule(chat=chat), seq2seq=base.seq2seq)
    [ids] = run(
        model,
        base.tokenizer,
        [row.prompt],
        max_new_tokens=limit,
        seq2seq=base.seq2seq,
        temperature=temperature,
        seed=seed,
    )
    return str(base.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def composed(recipe: Path, registry: Registry, progress: Progress) -> Path:
    """The folder that a recipe was composed into, if that is what the recipe says today."""
    file = read_recipe(recipe)
    folder = file.resolve(file.recipe.output.path)
    if not (folder / LOCK_NAME).is_file():
        raise UnknownRef(
            f"{recipe} was not composed yet: {folder} holds no mixture",
            hint=f"lorareg compose {recipe}",
        )
    prepare(file, registry=registry, force=True, lock=folder / LOCK_NAME, progress=progress)
    return folder


def record_of(ref: str, registry: Registry) -> tuple[Path, AdapterRecord]:
    """The folder that ``ref`` means, and what is known of it.

    Raises:
        UnknownRef: nothing has that name, or its files are not on this machine.
    """
    folder = expand(ref)
    if looks_like_path(ref) or (folder / "adapter_config.json").is_file():
        try:
            return folder, registry.get(str(folder)).record
        except UnknownRef:
            return folder, record_of_folder(folder)
    record = registry.get(ref).record
    if record.local_path is None:
        raise UnknownRef(f"{ref} is not on this machine", hint=f"lorareg pull {ref}")
    return Path(record.local_path), record


def _members_of(folder: Path, registry: Registry) -> dict[str, str]:
    """What a mixture calls its members → what the registry calls them."""
    try:
        mixture = registry.get(str(folder)).mixture
    except UnknownRef:
        return {}
    known = [(m.name, m.adapter_id) for m in mixture.members] if mixture else []
    return {name: registry.by_id(id_).ref for name, id_ in known if id_ is not None}


def _member(folder: Path, record: AdapterRecord) -> Member:
    return Member(
        name=record.name,
        key=str(folder),
        ref=record.name,
        folder=folder,
        facts=read_facts(folder),
        base=record.base.name,
        base_digest=record.base.digest,
    )


def _load_base(
    record: AdapterRecord,
    base: tuple[Any, Any] | ResolvedBase,
    device: str,
    dtype: str,
    progress: Progress,
) -> LoadedBase:
    from lorahub_registry.evaluate.base import adopt

    if isinstance(base, tuple):
        return adopt(*base, name=record.base.name or "base")
    return load_found(base, device, dtype, progress)


def _template(folder: Path) -> str:
    """The template that a mixture or a trained adapter was made with; the default for any other.

    A recipe without results beside it, or results alone, are some other tool's.
    """
    from lorahub_registry.recipes.template import DEFAULT

    made = any((folder / name).is_file() for name in (RECIPE_NAME, FACTORY_NAME))
    if not made or not (folder / RESULTS_NAME).is_file():
        return DEFAULT
    return str(read_results(folder)["tokens"]["template"])
