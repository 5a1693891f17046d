"""Greedy generation: exact match, and text to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.progress import Progress, silent

NORMALISATION = (
    "greedy decoding; special tokens dropped, runs of white space made one space, ends stripped; "
    "case and punctuation count; where outputs end without EOS, the answer is cut at the "
    "reference's number of tokens"
)


def normalise(text: str) -> str:
    """What two answers are compared by: see ``NORMALISATION``."""
    return " ".join(text.split())


def exact_match(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Encoded],
    *,
    seq2seq: bool,
    ends: bool,
    max_new_tokens: int,
    progress: Progress = silent,
) -> torch.Tensor:
    """1.0 or 0.0 for each row, float64 [rows]: whether the greedy answer is the reference.

    Args:
        ends: causal outputs end with EOS, so a longer answer is a wrong one.
    """
    hits = torch.zeros(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt), i))
    with progress.task("Generating", len(rows), "row") as task:
        for start in range(0, len(order), 32):
            part = order[start : start + 32]
            limit = min(max_new_tokens, max(len(rows[i].output) for i in part) + 1)
            answers = generate(
                model, tokenizer, [rows[i].prompt for i in part], max_new_tokens=limit,
                seq2seq=seq2seq,
            )  # fmt: skip
            for i, answer in zip(part, answers, strict=True):
                if not seq2seq and not ends:
                    answer = answer[: len(rows[i].output)]
                said, wanted = (
                    normalise(tokenizer.decode(ids, skip_special_tokens=True))
                    for ids in (answer, rows[i].output)
                )
                hits[i] = float(said == wanted and len(rows[i].output) <= limit)
            task.advance(len(part))
    return hits


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    seq2seq: bool,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """New token ids for each prompt, padding and what follows EOS cut off."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id or 0
    # Decoders go on from the right end, so they are padded on the left.
    side = [[pad] * (width - len(p)) for p in prompts]
    ids = [[*p, *s] if seq2seq else [*s, *p] for p, s in zip(prompts, side, strict=True)]
    mask = [
        [1] * len(p) + [0] * len(s) if seq2seq else [0] * len(s) + [1] * len(p)
        for p, s in zip(prompts, side, strict=True)
    ]
    device = next(model.parameters()).device
    sampling: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        # A model's own generation_config may ask for more than the likeliest token.
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
    }
    if temperature > 0:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature}
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            **sampling,
        )
    new = (out[:, 1:] if seq2seq else out[:, width:]).tolist()
    return [_until_end(row, tokenizer.eos_token_id) for row in new]


def _until_end(ids: list[int], eos: int | None) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids
