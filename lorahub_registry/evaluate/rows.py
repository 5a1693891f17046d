"""Rows to tokens by the rules of a recipe or a factory, with an account of what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorahub_registry.errors import DataError
from lorahub_registry.evaluate.tokens import Encoded, NoRoom, TokenRule, encode_one, encode_text
from lorahub_registry.recipes.rows import Row
from lorahub_registry.recipes.template import render

_NAMED = 3


class Rules(Protocol):
    """What of a recipe's or an adapter's ``data`` decides about tokens."""

    @property
    def template(self) -> str: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def eos(self) -> bool: ...
    @property
    def chat(self) -> bool: ...


@dataclass(frozen=True)
class Tokenised:
    """Rows as tokens, and what became of the others.

    Attributes:
        rows: each with its place; of a text longer than ``max_length`` its windows.
        read: how many rows there were.
        dropped: of each row that was left out, its place and why.
        windowed: how many texts became several windows.
    """

    rows: list[Encoded]
    read: int
    dropped: tuple[str, ...] = ()
    windowed: int = 0

    @property
    def tokens(self) -> int:
        """Of prompts and outputs together."""
        return sum(len(row.prompt) + len(row.output) for row in self.rows)

    @property
    def output_tokens(self) -> int:
        """Those that count in the loss."""
        return sum(len(row.output) for row in self.rows)

    @property
    def cut(self) -> int:
        """How many prompts lost their beginning."""
        return sum(row.cut > 0 for row in self.rows)

    def notes(self, split: str) -> list[str]:
        """A sentence for each thing that changes a result."""
        told = []
        if self.dropped:
            named = "; ".join(self.dropped[:_NAMED])
            more = len(self.dropped) - _NAMED
            more_text = f"; and {more} more" if more > 0 else ""
            told.append(
                f"{len(self.dropped)} of {self.read} {split} rows are left out: {named}{more_text}"
            )
        if self.cut:
            told.append(
                f"{self.cut} of {self.read} {split} prompts lost their beginning (max_length)"
            )
        if self.windowed:
            told.append(
                f"{self.windowed} of {self.read} {split} texts are longer than max_length and "
                f"became several rows; there are {len(self.rows)} now"
            )
        return told


def tokenise(
    rows: Sequence[Row],
    rules: Rules,
    tokenizer: Any,
    *,
    seq2seq: bool,
    text: bool = False,
    drop: bool = True,
) -> Tokenised:
    """``rows`` as tokens.

    Args:
        text: they are plain text, all of which is learned; no template is applied.
        drop: leave out, and count, rows of which no answer is left; else they are an error.

    Raises:
        DataError: the template wants a column that a row lacks, a prompt has no tokens, plain text
            for a seq2seq model, no row is left; or what ``drop`` says.
    """
    if text and seq2seq:
        raise DataError(
            "plain text is for causal models, and this base is encoder–decoder",
            hint="give rows of input and output",
        )
    rule = TokenRule(rules.max_length, rules.eos, rules.chat)
    found: list[Encoded] = []
    dropped, windowed = [], 0
    for row in rows:
        try:
            if text:
                windows = encode_text(tokenizer, row.output, rule, place=row.place)
                windowed += len(windows) > 1
                found += windows
                continue
            prompt = row.input if rules.chat else render(rules.template, row)
            found.append(
                encode_one(tokenizer, prompt, row.output, rule, seq2seq=seq2seq, place=row.place)
            )
        except NoRoom as error:
            if not drop:
                raise
            dropped.append(str(error))
    if rows and not found:
        raise DataError(
            f"no row is left of {len(rows)}: {dropped[0]}",
            hint="raise max_length, or look at the rows: lorareg data preview FILE",
        )
    return Tokenised(found, len(rows), tuple(dropped), windowed)


def check_length(
    rows: Sequence[Encoded], positions: int | None, name: str, *, seq2seq: bool
) -> None:
    """Whether every row fits into the model.

    Args:
        positions: how many it takes (``max_position_embeddings``); None where any number.
        name: the base's, for the message.

    Raises:
        DataError: a row is longer; it names the row.
    """
    for number, row in enumerate(rows, 1):
        parts = len(row.prompt), len(row.output)
        length = max(parts) if seq2seq else sum(parts)
        if positions is not None and length > positions:
            place = row.place or f"row {number}"
            raise DataError(
                f"{place}: has {length} tokens, and {name} takes {positions}",
                hint=f"say max_length: {positions} under data",
            )
