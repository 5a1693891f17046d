"""How rows become tokens, everywhere the same.

Prompt and output are tokenised apart and joined. BOS stands where the tokenizer puts it, at the
prompt's start; EOS follows a causal output only on request; seq2seq labels are as the tokenizer
makes them. ``max_length`` takes from the prompt's left, never from the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorahub_registry.errors import DataError

IGNORED = -100
_CHAT_DATE = "26 Jul 2024"
"""Llama 3's templates write the date; one that stands still keeps prompts, and results, alike."""


@dataclass(frozen=True)
class Encoded:
    """One row: token ids of prompt and output, and how many the prompt lost to ``max_length``."""

    prompt: list[int]
    output: list[int]
    cut: int = 0


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
    if rule.chat and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "template: chat asks for the tokenizer's chat template, and this one has none",
            hint="write the prompt's template in the recipe, for example: template: '{{ input }} '",
        )
    return [
        _encode(tokenizer, number, prompt, output, rule, seq2seq)
        for number, (prompt, output) in enumerate(pairs, 1)
    ]


def _encode(
    tokenizer: Any, number: int, prompt: str, output: str, rule: TokenRule, seq2seq: bool
) -> Encoded:
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
        # Some tokenizers end every text with EOS; a causal prompt goes on.
        ending = tokenizer("")["input_ids"][-1:]
        if not seq2seq and ending == [tokenizer.eos_token_id] and head[-1:] == ending:
            head = head[:-1]
    if seq2seq:
        tail = tokenizer(text_target=output)["input_ids"]
    else:
        tail = tokenizer(output, add_special_tokens=False)["input_ids"]
        if rule.eos and tokenizer.eos_token_id is not None:
            tail = [*tail, tokenizer.eos_token_id]
    if not tail:
        raise DataError(f"row {number}: its output is empty once tokenised")
    if not head:
        raise DataError(
            f"row {number}: its prompt is empty once tokenised",
            hint="this tokenizer adds no BOS, so nothing stands before the answer's first token",
        )
    room = None
    if rule.max_length is not None:
        room = rule.max_length if seq2seq else rule.max_length - len(tail)
        if room < 1 or (seq2seq and len(tail) > rule.max_length):
            raise DataError(
                f"row {number}: its output alone has {len(tail)} tokens, max_length is "
                f"{rule.max_length}",
                hint="raise max_length, or leave this row out: answers are never cut",
            )
    cut = max(0, len(head) - room) if room is not None else 0
    if cut:
        bos = 1 if head[0] == tokenizer.bos_token_id and len(head) - cut > 1 else 0
        head = [*head[:bos], *head[cut + bos :]]
    return Encoded(list(head), list(tail), cut)


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
    make = _seq2seq_batch if seq2seq else _causal_batch
    return [make([rows[i] for i in group], group, pad, device) for group in groups]


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
