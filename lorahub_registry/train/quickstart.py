"""What the quickstart stands on, made from nothing: a tiny base, and rows for it and its adapters.

The base learns to repeat a sentence in which words change language. It is trained in full, which
only a base this small is here; adapters are trained by :func:`lorahub_registry.api.train.train`
from the rows that :func:`make_rows` writes (see :mod:`~lorahub_registry.train.codeswitch`).

The same seed gives the same weights on the same machine. Give both functions the same one: it also
decides which sentences are kept for testing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lorahub_registry.evaluate.quiet import one_thread, without_bars
from lorahub_registry.evaluate.tokens import TokenRule, encode
from lorahub_registry.progress import Progress, silent
from lorahub_registry.train import codeswitch
from lorahub_registry.train.codeswitch import SKILLS, UNSEEN, Row
from lorahub_registry.train.tiny import make_model, make_tokenizer

BATCH = 32
SKILL_ROWS, TEST_ROWS = 640, 100


@dataclass(frozen=True)
class BaseMade:
    """The base as written; ``exact_match``: share (0 to 1) of held-out sentences it repeats."""

    folder: Path
    parameters: int
    seconds: float
    exact_match: float


@one_thread()
def make_base(
    folder: Path, *, seed: int, progress: Progress = silent, steps: int = 200
) -> BaseMade:
    """Train a tokenizer and a two-layer Llama that repeats what it is told; write both.

    The folder holds float32 safetensors, and loads through transformers' Auto classes.
    """
    start = time.monotonic()
    sentences = codeswitch.split(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    rows = codeswitch.echo_rows(sentences.train, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    # A tenth of the steps to get to the learning rate, the second half to go down again.
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1.0, max(0.05, 2 * (1 - step / steps)))
    )
    with progress.task("Training the base", total=steps, unit="step") as task:
        for _ in range(steps):
            losses, _ = answers(model, *tokens(tokenizer, islice(rows, BATCH)))
            optimizer.zero_grad()
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            task.advance()
    held_out = islice(codeswitch.echo_rows(sentences.test, seed), TEST_ROWS)
    with torch.inference_mode():
        # Greedy decoding says a row whose every token is the likeliest after the ones before.
        _, right = answers(model, *tokens(tokenizer, held_out))
    with without_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    exact = float(right.all(1).float().mean())
    return BaseMade(folder, model.num_parameters(), time.monotonic() - start, exact)


def make_rows(folder: Path, *, seed: int) -> Path:
    """Write ``train.jsonl`` and ``test.jsonl`` for each skill, and for the task of two of them.

    A skill has ``folder/<skill>`` with 640 and 100 rows, the unseen task a folder of its own with
    64 and 100; columns: input, output. No sentence to test on, and none of the unseen task, is one
    that the base or an adapter learns from.

    Returns:
        The unseen task's folder.
    """
    sentences = codeswitch.split(seed)
    test = sentences.test[:TEST_ROWS]
    for name in SKILLS:
        learned = codeswitch.skill_rows(name, sentences.train, seed)
        _write(folder / name, islice(learned, SKILL_ROWS), codeswitch.task_rows([name], test))
    unseen = folder / "-".join(UNSEEN)
    learned_from = codeswitch.task_rows(UNSEEN, sentences.learn)
    _write(unseen, learned_from, codeswitch.task_rows(UNSEEN, test))
    return unseen


def tokens(tokenizer: Any, rows: Iterable[Row]) -> tuple[torch.Tensor, int]:
    """Token ids [rows, positions], and how many of the last positions are the output.

    Every sentence has seven words of one piece each, so nothing is padded.
    """
    pairs = [(f"{row['input']} ", row["output"]) for row in rows]
    encoded = encode(tokenizer, pairs, TokenRule(), seq2seq=False)
    return torch.tensor([[*e.prompt, *e.output] for e in encoded]), len(encoded[0].output)


def answers(model: Any, ids: torch.Tensor, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """−log p of each output token and whether it is the likeliest, both [rows, outputs]."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=outputs + 1).logits[:, :-1]
    wanted = ids[:, -outputs:]
    losses = functional.cross_entropy(logits.mT, wanted, reduction="none")
    return losses, logits.argmax(-1) == wanted


def _write(folder: Path, train: Iterable[Row], test: Iterable[Row]) -> None:
    folder.mkdir(parents=True)
    for name, rows in (("train", train), ("test", test)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
