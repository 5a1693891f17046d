"""X-LoRA (arXiv:2402.07148) as PEFT saves it: a classifier, and its experts in folders 0, 1, ….

PEFT looks for the experts where the trainer had them, and takes what a file lacks as it was drawn
at random, without a word. What it saves of an expert holds tensors of the base, of the classifier
and of other experts, too, and reading that back it never ends. From 0.20 on such files lack some:
of every adapter PEFT drops the tensors that have another adapter's name between dots, and X-LoRA's
adapters are called like layers. So experts are read apart, and what is missing is looked for.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lorahub_registry.adapters.compat import Member, check_weights
from lorahub_registry.adapters.config import CONFIG_NAME, AdapterConfig
from lorahub_registry.adapters.facts import PREFIX, AdapterFacts, read_config
from lorahub_registry.adapters.tensors import PICKLE_NAME, WEIGHTS_NAME, read_header
from lorahub_registry.errors import BrokenAdapter, IncompatibleAdapters, NotApplied

if TYPE_CHECKING:
    from lorahub_registry.evaluate.base import LoadedBase

_CLASSIFIER = "base_model.internal_xlora_classifier.layers"
_INSIDE = "base_model.lora_model.model."
_FACTOR = re.compile(r"\.lora_([AB]\.weight|embedding_[AB])\Z")
# PEFT cuts parts off the front of a name until it begins so; of another name, for ever.
_PLACED = re.compile(r"(?:\A|\.)model\.(?!model\.)")
_DROPPED = (
    "PEFT 0.20 and later leave out of each adapter what has another adapter's number in its name"
)


def is_xlora(member: Member) -> bool:
    """Whether PEFT calls it XLORA."""
    return member.facts.config.peft_type == "XLORA"


def check_xlora(member: Member) -> None:
    """Whether an X-LoRA's files are whole, as far as they tell without its base.

    Raises:
        BrokenAdapter: tensors of its classifier, or experts, are missing; the message names them.
        IncompatibleAdapters: an expert's weights are a pickle or none, or PEFT's X-LoRA does not
            run it.
    """
    experts = _experts(member)
    for name, folder in experts.items():
        config = read_config(folder)
        saved = {kind for kind in (WEIGHTS_NAME, PICKLE_NAME) if (folder / kind).is_file()}
        weights = "safetensors" if WEIGHTS_NAME in saved else "pickle" if saved else "none"
        said = f"{member.name}/{name}"
        check_weights(Member(said, str(folder), said, folder, AdapterFacts(config, weights), None))
        if config.peft_type != "LORA" or config.use_dora:
            kind = "DoRA" if config.peft_type == "LORA" else config.peft_type
            raise IncompatibleAdapters(f"{said}: it is {kind}, and PEFT's X-LoRA runs only LoRA")
        _check_names(said, folder, config)
    there = read_header(member.folder / WEIGHTS_NAME).tensors
    if missing := [name for name in _classifier(member) if name not in there]:
        raise BrokenAdapter(
            f"{member.folder / WEIGHTS_NAME}: the classifier of this X-LoRA is not whole, and "
            f"would be random: it lacks {_some(missing)}",
            hint=f"{_DROPPED}: write the missing tensors into the files from the model that was "
            "trained (of the experts, too), or save that with PEFT 0.19",
        )


def load_xlora(model: Any, member: Member, *, adapter: str = "default") -> Any:
    """An X-LoRA on its base, by PEFT, with the experts in its own folders.

    Args:
        model: the base; its ``use_cache`` goes off, because X-LoRA runs every token twice.
        member: checked by :func:`check_xlora`.

    Returns:
        A PeftModel, in evaluation mode.

    Raises:
        NotApplied: PEFT cannot load it.
        BrokenAdapter: an expert has no tensors for a module that its config adapts.
    """
    from peft import PeftModel, XLoraConfig

    experts = _experts(member)
    model.config.use_cache = False
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that it is about to lose; nobody here can mend that.
        warnings.simplefilter("ignore", FutureWarning)
        with TemporaryDirectory() as scratch, _said(member):
            # With `adapters=` PEFT would still take the paths or repos that the file names.
            config = XLoraConfig.from_pretrained(str(member.folder))
            config.adapters = {
                name: str(_alone(folder, Path(scratch) / name)) for name, folder in experts.items()
            }
            loaded = PeftModel.from_pretrained(
                model, str(member.folder), adapter_name=adapter, config=config
            )
    for name, folder in experts.items():
        _check_expert(loaded, name, folder)
    return loaded.eval()


@contextmanager
def _said(member: Member) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())[:200]
        raise NotApplied(f"{member.folder}: PEFT cannot load this X-LoRA: {said}") from error


@contextmanager
def xlora_on(base: LoadedBase, member: Member) -> Iterator[Any]:
    """The base with an X-LoRA on it; afterwards it is what it was.

    Raises:
        NotApplied, BrokenAdapter: see :func:`load_xlora`.
    """
    from lorahub_registry.evaluate.stock import unload

    use_cache = base.model.config.use_cache
    try:
        yield load_xlora(base.model, member)
    finally:
        unload(base.model)
        base.model.config.use_cache = use_cache


def _experts(member: Member) -> dict[str, Path]:
    """Name → folder, in the order of the classifier's outputs: PEFT calls them 0, 1, … itself."""
    named = member.facts.config.raw.get("adapters")
    if not isinstance(named, dict) or not named:
        raise BrokenAdapter(f"{member.folder / CONFIG_NAME}: an X-LoRA that names no adapters")
    experts = {str(n): member.folder / str(n) for n in range(len(named))}
    if missing := [n for n, folder in experts.items() if not (folder / CONFIG_NAME).is_file()]:
        raise BrokenAdapter(
            f"{member.folder}: an X-LoRA of {len(named)} adapters, and there is none in its "
            f"{'folder' if len(missing) == 1 else 'folders'} {', '.join(missing)}",
            hint="put them there, numbered in the order that it was trained with; of a repo, pull "
            "the whole",
        )
    return experts


def _classifier(member: Member) -> list[str]:
    """The tensors that the classifier has: its linear layers, between which others have none."""
    raw = member.facts.config.raw
    depth, dropout = raw.get("xlora_depth", 1), raw.get("xlora_dropout_p", 0.2)
    if type(depth) is not int or not 1 <= depth <= 1000 or not isinstance(dropout, int | float):
        raise BrokenAdapter(
            f"{member.folder / CONFIG_NAME}: xlora_depth is {depth!r}, xlora_dropout_p {dropout!r}"
        )
    step = 3 if dropout > 0 else 2
    return [f"{_CLASSIFIER}.{n * step}.{part}" for n in range(depth) for part in ("weight", "bias")]


def _check_expert(model: Any, name: str, folder: Path) -> None:
    """Whether an expert's file has tensors for each of its places in the model."""
    keys = _keys(folder)
    missing = []
    for path, module in model.named_modules():
        inside = path.removeprefix(_INSIDE)
        for kind, ending in (("lora_A", ".weight"), ("lora_B", ".weight"),
                             ("lora_embedding_A", ""), ("lora_embedding_B", "")):  # fmt: skip
            if name in getattr(module, kind, {}):
                wanted = f".{inside}.{kind}{ending}"
                if not any(key.endswith(wanted) for key in keys):
                    missing.append(wanted[1:])
    if missing:
        raise BrokenAdapter(
            f"{folder / WEIGHTS_NAME}: this expert of an X-LoRA is not whole, and would be silent "
            f"where it lacks {_some(missing)}",
            hint=f"{_DROPPED}: put the adapter that X-LoRA was trained with into {folder.name}/, "
            "or, where it was trained on (use_trainable_adapters), save the model with PEFT 0.19",
        )


def _check_names(said: str, folder: Path, config: AdapterConfig) -> None:
    """Whether PEFT places all tensors of an expert, or :func:`_alone` may leave out the others."""
    keys = _keys(folder)
    if any(key.startswith(_INSIDE) for key in keys):
        if config.unsupported:
            raise IncompatibleAdapters(
                f"{said}: PEFT saved it inside an X-LoRA, where it leaves parts of "
                f"{config.unsupported[0]} out",
                hint=f"put the adapter that X-LoRA was trained with into {folder.name}/",
            )
    elif lost := [key for key in keys if not _PLACED.search(key)]:
        raise IncompatibleAdapters(f"{said}: PEFT's X-LoRA finds no place for its {_some(lost)}")


def _alone(folder: Path, scratch: Path) -> Path:
    """An expert's own tensors: its folder, or a copy of what PEFT saved inside an X-LoRA."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    keys = [key for key in _keys(folder) if key.startswith(_INSIDE)]
    if not keys:
        return folder
    scratch.mkdir()
    shutil.copy(folder / CONFIG_NAME, scratch)
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        own = {PREFIX + k.removeprefix(_INSIDE): k for k in keys if _FACTOR.search(k)}
        save_file({name: file.get_tensor(k) for name, k in own.items()}, scratch / WEIGHTS_NAME)
    return scratch


def _keys(folder: Path) -> list[str]:
    return list(read_header(folder / WEIGHTS_NAME).tensors)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more}"
