"""What calls that take texts and models, and no recipe, are given: checked, loaded, tokenised."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub_registry.api.bases import resolve_base
from lorahub_registry.errors import BaseModelError, DataError, LoraregError, UsageError
from lorahub_registry.progress import Progress
from lorahub_registry.refs import expand
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    from lorahub_registry.evaluate.base import LoadedBase
    from lorahub_registry.evaluate.tokens import Encoded

_MAX_SOURCE = 2048


def texts(given: Sequence[Any], name: str, error: type[LoraregError] = DataError) -> list[str]:
    """``given`` as a list of texts, not empty.

    Raises:
        LoraregError: an ``error``. A text in place of a list is a slip, which would count letters.
    """
    if isinstance(given, str) or not all(isinstance(item, str | Path) for item in given):
        raise error(f"{name} has to be a list of texts")
    if not given:
        raise error(f"{name} is empty: give at least one")
    return [str(item) for item in given]


def pairs_of(inputs: Sequence[str], outputs: Sequence[str]) -> list[tuple[str, str]]:
    """(input, output) of each example.

    Raises:
        DataError: there are none, or not as many of the one as of the other.
    """
    left, right = texts(inputs, "example_inputs"), texts(outputs, "example_outputs")
    if len(left) != len(right):
        raise DataError(
            f"{len(left)} example_inputs and {len(right)} example_outputs: each input needs its "
            "output"
        )
    return list(zip(left, right, strict=True))


def at_least_one(number: int, name: str) -> None:
    """Whether ``number`` counts something.

    Raises:
        UsageError: it does not.
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise UsageError(f"{name} has to be a whole number from 1 on, got {number!r}")


def encoded(base: LoadedBase, pairs: Sequence[tuple[str, str]], eos: bool) -> list[Encoded]:
    """``pairs`` as tokens; prompts lose what is over 2,048 tokens on their left, with a warning."""
    from lorahub_registry.evaluate.tokens import TokenRule, encode

    rule = TokenRule(max_length=_MAX_SOURCE, eos=eos)
    rows = encode(base.tokenizer, pairs, rule, seq2seq=base.seq2seq)
    if cut := sum(row.cut > 0 for row in rows):
        warnings.warn(
            f"{cut} of {len(rows)} inputs lost their beginning: they are longer than {_MAX_SOURCE} "
            "tokens",
            stacklevel=3,
        )
    return rows


def loaded_pair(
    model: Any, tokenizer: Any, device: str, registry: Registry | None, progress: Progress
) -> LoadedBase:
    """Model and tokenizer together; each may be named, by folder or as a base.

    Raises:
        BaseModelError: one of them cannot be loaded.
    """
    named = [isinstance(given, str | Path) for given in (model, tokenizer)]
    if any(named) and registry is None:
        with Registry(progress=progress) as opened:
            return loaded_pair(model, tokenizer, device, opened, progress)
    import transformers

    from lorahub_registry.evaluate.base import LoadedBase, load_base

    name = "model"
    if named[0]:
        name = str(model)
        model = load_base(_folder(name, registry, progress), name=name, device=device).model
    if named[1]:
        folder = _folder(str(tokenizer), registry, progress)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise BaseModelError(f"{tokenizer}: no tokenizer there ({error})") from error
    model.eval()
    return LoadedBase(model, tokenizer, name)


def _folder(name: str, registry: Registry | None, progress: Progress) -> Path:
    folder = expand(name)
    if not folder.is_dir():
        assert registry is not None
        found = resolve_base(name, registry=registry, progress=progress).folder
        assert found is not None
        folder = found
    return folder
