"""A recipe's rows to tokens, by its rule, with an account of what was cut and chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorahub_registry.compose.select import diverse
from lorahub_registry.errors import DataError
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.tokens import Encoded, TokenRule, encode
from lorahub_registry.progress import Progress
from lorahub_registry.recipes.model import Recipe
from lorahub_registry.recipes.rows import Row
from lorahub_registry.recipes.template import render


@dataclass(frozen=True)
class Rows:
    """The recipe's rows, read; empty where the recipe brings none.

    Attributes:
        examples: adapter → rows of its own, for a router of prompts.
        known: adapter → where its rows lie, stored before: [width] at the base's middle layer.
    """

    train: Sequence[Row] = ()
    test: Sequence[Row] = ()
    examples: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    known: Mapping[str, Sequence[float]] = field(default_factory=dict)


class Encoder:
    """Rows to tokens by the recipe's rule; keeps account of what it did."""

    def __init__(self, recipe: Recipe, base: LoadedBase, progress: Progress) -> None:
        self._data, self._base, self._progress = recipe.data, base, progress
        self._seed = recipe.seed
        self._rule = TokenRule(recipe.data.max_length, recipe.data.eos, recipe.data.chat)
        self._facts: dict[str, Any] = {}
        self.notes: list[str] = []

    def __call__(self, rows: Sequence[Row], split: str) -> list[Encoded]:
        if self._data.chat:
            pairs = [(row.input, row.output) for row in rows]
        else:
            pairs = [(render(self._data.template, row), row.output) for row in rows]
        encoded = encode(self._base.tokenizer, pairs, self._rule, seq2seq=self._base.seq2seq)
        self._check_length(encoded, split)
        if rows:
            self._account(split, encoded)
            if cut := self._facts[split]["prompts_cut"]:
                self.note(f"{cut} of {len(rows)} {split} prompts lost their beginning (max_length)")
        return encoded

    def train(self, rows: Rows) -> tuple[Rows, list[Encoded]]:
        """The training rows that the recipe's ``select`` takes, as they are and as tokens."""
        split = self._data.train
        encoded = self(rows.train, "train")
        if split is None or split.select != "diverse" or split.limit is None or not encoded:
            return rows, encoded
        chosen = diverse(self._base, encoded, split.limit, seed=self._seed, progress=self._progress)
        self._account("train", [encoded[i] for i in chosen])
        self._facts["train"]["chosen"] = chosen
        return replace(rows, train=[rows.train[i] for i in chosen]), [encoded[i] for i in chosen]

    def _account(self, split: str, rows: Sequence[Encoded]) -> None:
        self._facts[split] = {
            "rows": len(rows),
            "output_tokens": sum(len(row.output) for row in rows),
            "prompts_cut": sum(row.cut > 0 for row in rows),
        }

    def _check_length(self, rows: Sequence[Encoded], split: str) -> None:
        most = getattr(self._base.model.config, "max_position_embeddings", None)
        for number, row in enumerate(rows, 1):
            parts = len(row.prompt), len(row.output)
            length = max(parts) if self._base.seq2seq else sum(parts)
            if most is not None and length > most:
                raise DataError(
                    f"{split} row {number} has {length} tokens, and {self._base.name} takes {most}",
                    hint=f"say max_length: {most} under data, which cuts prompts on their left",
                )

    def note(self, text: str) -> None:
        """Something that changes a result: for the card, and for whoever watches."""
        self.notes.append(text)
        self._progress.warn(text)

    def facts(self) -> dict[str, Any]:
        """The rule, and for each split its rows, output tokens and prompts cut."""
        return {
            "template": self._data.template,
            "max_length": self._data.max_length,
            "eos": self._data.eos,
            **self._facts,
        }
