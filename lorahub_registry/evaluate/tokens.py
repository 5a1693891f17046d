"""How rows become tokens, everywhere the same.

Prompt and output are tokenised apart and joined. BOS stands where the tokenizer puts it, at the
prompt's start; EOS follows a causal output only on request; seq2seq labels are as the tokenizer
makes them. ``max_length`` takes from the prompt's left, never from the answer. Plain text has its
first token for a prompt and the rest for an output; one longer than ``max_length`` is cut into
windows, each beginning with the token that the one before it ends with, so that every token but the
first is predicted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorahub_registry.errors import DataError

IGNORED = -100
_CHAT_DATE = "26 Jul 2024"
"""Llama 3's templates write the date; one that stands still keeps prompts, and results, alike."""


@dataclass(frozen=True)
class Encoded:
    """One row: token ids of prompt and output.

    Attributes:
        cut: how many tokens the prompt lost to ``max_length``.
        place: file and line, for messages; it makes no row another one.
    """

    prompt: list[int]
    output: list[int]
    cut: int = 0
    place: str = field(default="", compare=False)


class NoRoom(DataError):
    """A row of which no answer is left: it has no tokens, or more than ``max_length`` allows."""


@dataclass(frozen=True)
class TokenRule:
    """What of a recipe decides about tokens."""

    max_length: int | None = None
    eos: bool = False
    chat: bool = False


def encode(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], rule: TokenRule, *, seq2seq: bool
) -> list[Encoded]:
    """Tokenise (prompt, output) pairs.

    Raises:
        DataError: an output without tokens, or one longer than ``max_length`` leaves room for.
    """
    return [
        encode_one(tokenizer, prompt, output, rule, seq2seq=seq2seq, place=f"row {number}")
        for number, (prompt, output) in enumerate(pairs, 1)
    ]


def encode_one(
    tokenizer: Any, prompt: str, output: str, rule: TokenRule, *, seq2seq: bool, place: str
) -> Encoded:
    """Tokenise one row; ``place`` is what messages call it.

    Raises:
        NoRoom: its output has no tokens, or is longer than ``max_length`` leaves room for.
        DataError: its prompt has no tokens, or the tokenizer no chat template.
    """
    if rule.chat and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "template: chat asks for the tokenizer's chat template, and this one has none",
            hint="write the prompt's template in the recipe, for example: template: '{{ input }} '",
        )
    if rule.chat:
        head = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            date_string=_CHAT_DATE,
        )
    else:
        head = tokenizer(prompt)["input_ids"]
        if not seq2seq:
            head = _open(tokenizer, head)
    if seq2seq:
        tail = tokenizer(text_target=output)["input_ids"]
    else:
        tail = tokenizer(output, add_special_tokens=False)["input_ids"]
        if rule.eos and tokenizer.eos_token_id is not None:
            tail = [*tail, tokenizer.eos_token_id]
    if not tail:
        raise NoRoom(f"{place}: its output is empty once tokenised")
    if not head:
        raise DataError(
            f"{place}: its prompt is empty once tokenised",
            hint="this tokenizer adds no BOS, so nothing stands before the answer's first token",
        )
    room = None
    if rule.max_length is not None:
        room = rule.max_length if seq2seq else rule.max_length - len(tail)
        if room < 1 or (seq2seq and len(tail) > rule.max_length):
            raise NoRoom(
                f"{place}: its output alone has {len(tail)} tokens, max_length is "
                f"{rule.max_length}",
                hint="raise max_length, or leave this row out: answers are never cut",
            )
    cut = max(0, len(head) - room) if room is not None else 0
    if cut:
        bos = 1 if head[0] == tokenizer.bos_token_id and len(head) - cut > 1 else 0
        head = [*head[:bos], *head[cut + bos :]]
    return Encoded(list(head), list(tail), cut, place)


def encode_text(tokenizer: Any, text: str, rule: TokenRule, *, place: str) -> list[Encoded]:
    """Tokenise plain text for a causal model: one row, or its windows of ``max_length``.

    Raises:
        NoRoom: fewer than two tokens, of which none is left to predict.
    """
    ids = list(_open(tokenizer, tokenizer(text)["input_ids"]))
    if rule.eos and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if len(ids) < 2:
        raise NoRoom(f"{place}: its text has {len(ids)} tokens, and the first is not predicted")
    step = (rule.max_length or len(ids)) - 1
    windows = [ids[at : at + step + 1] for at in range(0, len(ids) - 1, step)]
    name = f"{place}, window {{}} of {len(windows)}" if len(windows) > 1 else place
    return [Encoded(w[:1], w[1:], 0, name.format(n)) for n, w in enumerate(windows, 1)]


def _open(tokenizer: Any, ids: list[int]) -> list[int]:
    """``ids`` without the EOS that some tokenizers end every text with: a causal text goes on."""
    ending = tokenizer("")["input_ids"][-1:]
    closed = ending == [tokenizer.eos_token_id] and ids[-1:] == ending
    return ids[:-1] if closed else ids


def check_vocabulary(rows: Sequence[Encoded], vocabulary: int, tokenizer: Any = None) -> None:
    """Whether the model has an embedding, and a logit, for every token.

    Args:
        vocabulary: how many tokens the model knows: its embedding's rows.
        tokenizer: to show the token that it does not know.

    Raises:
        DataError: a token's id is ``vocabulary`` or more; it names the row and the token.
    """
    for number, row in enumerate(rows, 1):
        most = max(max(row.prompt), max(row.output))
        if most >= vocabulary:
            shown = f" ({tokenizer.convert_ids_to_tokens(most)!r})" if tokenizer else ""
            part = "output" if most in row.output else "prompt"
            raise DataError(
                f"{row.place or f'row {number}'}: token {most}{shown} of its {part} is none of the "
                f"model's {vocabulary}",
                hint="the tokenizer is larger than the model: its added tokens were never learned; "
                "keep them out of the rows, or take a base whose embedding has them",
            )


@dataclass(frozen=True)
class Batch:
    """Rows padded together, on the device.

    Attributes:
        inputs: what the model takes, without labels for causal ones.
        labels: [rows, positions]; the token each logit has to predict, or ``IGNORED``.
        keep: causal only: the first input position whose logits are needed.
        rows: which rows of the data these are.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    keep: int
    rows: list[int]


def batches(
    rows: Sequence[Encoded],
    *,
    pad: int,
    seq2seq: bool,
    device: torch.device | str,
    vocabulary: int = 0,
    tokens: int | None = None,
) -> list[Batch]:
    """Rows sorted by length and padded to at most about ``tokens`` tokens a batch.

    By default as many as :func:`tokens_that_fit`.
    """
    tokens = tokens or tokens_that_fit(torch.device(device).type, vocabulary)
    order = sorted(range(len(rows)), key=lambda i: (_length(rows[i]), i))
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * _length(rows[i]) <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [
        one_batch([rows[i] for i in group], group, pad, device, seq2seq=seq2seq) for group in groups
    ]


def one_batch(
    rows: Sequence[Encoded],
    which: Sequence[int],
    pad: int,
    device: torch.device | str,
    *,
    seq2seq: bool,
) -> Batch:
    """These rows padded together, in this order; ``which`` says which rows of the data they are."""
    make = _seq2seq_batch if seq2seq else _causal_batch
    return make(list(rows), list(which), pad, device)


def tokens_that_fit(device: str, vocabulary: int = 0) -> int:
    """How many tokens one forward takes: 2,048 on a CPU, where more leave its caches.

    Elsewhere 16,384, or fewer where their logits would take more than 4 GB: in half and full
    precision and with their softmax, ten bytes each.
    """
    if device == "cpu":
        return 2048
    return min(16384, max(256, (4 << 30) // (10 * vocabulary))) if vocabulary else 16384


def repeated(batch: Batch, copies: int) -> Batch:
    """``batch`` so many times, one after the other along the batch axis."""
    inputs = {name: tensor.repeat(copies, 1) for name, tensor in batch.inputs.items()}
    return Batch(inputs, batch.labels.repeat(copies, 1), batch.keep, batch.rows * copies)


def _length(row: Encoded) -> int:
    return len(row.prompt) + len(row.output)


def _causal_batch(rows: list[Encoded], which: list[int], pad: int, device: Any) -> Batch:
    ids = [[*r.prompt, *r.output] for r in rows]
    first = min(len(r.prompt) for r in rows) - 1
    width = max(map(len, ids))
    # The logit at position p predicts the token at p + 1.
    labels = torch.full((len(rows), width - 1 - first), IGNORED)
    for n, row in enumerate(rows):
        start = len(row.prompt) - 1 - first
        labels[n, start : start + len(row.output)] = torch.tensor(row.output)
    inputs = {
        "input_ids": _padded(ids, pad),
        "attention_mask": _padded([[1] * len(i) for i in ids], 0),
    }
    return Batch({k: v.to(device) for k, v in inputs.items()}, labels.to(device), first, which)


def _seq2seq_batch(rows: list[Encoded], which: list[int], pad: int, device: Any) -> Batch:
    labels = _padded([r.output for r in rows], IGNORED)
    inputs = {
        "input_ids": _padded([r.prompt for r in rows], pad),
        "attention_mask": _padded([[1] * len(r.prompt) for r in rows], 0),
        "labels": labels,
    }
    return Batch({k: v.to(device) for k, v in inputs.items()}, labels.to(device), 0, which)


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
