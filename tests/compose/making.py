"""Members, rows and recipes on the tiny models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorahub_registry.adapters.compat import Member
from lorahub_registry.adapters.facts import digest_of, read_facts
from lorahub_registry.evaluate.tokens import Batch, Encoded, TokenRule, batches, encode
from lorahub_registry.progress import silent
from lorahub_registry.recipes import Recipe, from_mapping
from lorahub_registry.recipes.rows import Row
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import LowRank
from tests import tiny


def member(folder: Path, coefficient: float | None = None, **said: Any) -> Member:
    """The adapter in ``folder`` as one of a mixture."""
    return Member(
        name=said.pop("name", folder.name), key=str(folder), ref=f"./{folder.name}", folder=folder,
        facts=read_facts(folder), base="tiny", digest=digest_of(folder), coefficient=coefficient,
        **said,
    )  # fmt: skip


def deltas(model: tiny.Tiny, kind: str) -> dict[str, LowRank]:
    """One adapter's deltas."""
    folder = model.adapter(kind)
    return load_deltas(folder, read_facts(folder))


def tokens(base: Any, count: int = 8) -> list[Batch]:
    """Some rows, ready to be scored."""
    rows = encode(base.tokenizer, tiny.rows(count), TokenRule(), seq2seq=base.seq2seq)
    return batches(rows, pad=0, seq2seq=base.seq2seq, device="cpu")


def rows(count: int) -> list[Row]:
    """The same rows as a recipe has them."""
    return [Row(prompt.strip(), output) for prompt, output in tiny.rows(count)]


def recipe(method: dict[str, Any], adapters: Sequence[Any] = ("./a", "./b"), **more: Any) -> Recipe:
    """A recipe with this method; refs are only written down, nothing is looked up."""
    output = {"path": "out", **more.pop("output", {})}
    data = {
        split: {"path": f"{split}.jsonl"}
        for split in (("train", "test") if method["type"] != "linear" else ("test",))
    }
    return from_mapping(
        {
            "version": 1, "name": "mix", "base": "org/base", "adapters": list(adapters),
            "method": method, "output": output, "data": {**data, **more.pop("data", {})}, **more,
        }
    )  # fmt: skip


def encoded(base: Any, count: int, first: int = 0) -> list[Encoded]:
    """The same rows as tokens, ``count`` of them from ``first`` on."""
    found = encode(base.tokenizer, tiny.rows(first + count), TokenRule(), seq2seq=base.seq2seq)
    return found[first:]


class Watcher:
    """A progress that keeps what it is warned of."""

    def __init__(self) -> None:
        self.warned: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(silent, name)

    def warn(self, text: str) -> None:
        self.warned.append(text)
