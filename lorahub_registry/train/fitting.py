"""Training and scoring on rows of equal length, small enough for one core."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lorahub_registry.evaluate.tokens import TokenRule, encode
from lorahub_registry.progress import Progress
from lorahub_registry.train.codeswitch import Row


@dataclass(frozen=True)
class Training:
    """How long something was trained; ``stopped``: by the clock, before its last step."""

    steps: int
    seconds: float
    stopped: bool


@dataclass(frozen=True)
class Score:
    """Of held-out rows: nats per output token, and the share (0 to 1) answered exactly."""

    nll: float
    exact_match: float


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


@torch.inference_mode()
def scores(model: Any, tokenizer: Any, rows: Iterable[Row], *, shares: int = 1) -> list[Score]:
    """Score each of ``shares`` equal parts of the rows.

    A row whose every token is the likeliest after the ones before is what greedy decoding says.
    """
    losses, right = answers(model, *tokens(tokenizer, rows))
    return [
        Score(float(part.mean()), float(hits.all(1).float().mean()))
        for part, hits in zip(losses.chunk(shares), right.chunk(shares), strict=True)
    ]


def fit(
    parameters: Iterable[torch.nn.Parameter],
    loss: Callable[[], torch.Tensor],
    title: str,
    progress: Progress,
    *,
    steps: int,
    clock_s: float,
) -> Training:
    """AdamW at 3e-3: a tenth of the steps to get there, the second half to go down again."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1.0, max(0.05, 2 * (1 - step / steps)))
    )
    start = time.monotonic()
    done = 0
    with progress.task(title, total=steps, unit="step") as task:
        while done < steps and (done == 0 or time.monotonic() - start < clock_s):
            value = loss()
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            task.advance()
    seconds = time.monotonic() - start
    if done < steps:
        progress.warn(
            f"{title}: the clock ({clock_s:g} s) stopped it after {done} of {steps} steps; "
            "another run may give other weights"
        )
    return Training(done, seconds, done < steps)
