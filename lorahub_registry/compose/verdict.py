"""What a mixture's scores mean, in words.

A win is a paired per-row difference of more than two standard errors over the best single
adapter, and over the base where that is the better one. Everything else reads "no better than X:
use X".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lorahub_registry.evaluate.nll import RowNLL

ERRORS = 2.0
BASE, UNIFORM, MIXTURE = "base", "uniform average", "mixture"
STATIC, PLAIN = "learned static coefficients", "plain LoRA with mean coefficients"


@dataclass(frozen=True)
class Verdict:
    """The outcome of the paired comparison.

    Attributes:
        against: the best alternative to the mixture: a single adapter's name, or ``base``.
        difference: NLL of the mixture minus that of ``against``, in nats a token; less is better.
        stderr: its standard error over rows.
        text: one or two sentences for people.
    """

    win: bool
    against: str
    difference: float
    stderr: float
    text: str


def judge(scores: Mapping[str, RowNLL], singles: list[str]) -> Verdict:
    """Compare ``mixture`` with every alternative in ``scores``, on the same rows.

    Args:
        scores: under ``base``, ``uniform average``, ``mixture`` and the names in ``singles``;
            where the mixture is a dynamic one, static ones to compare it with, too.
    """
    finite = [name for name in singles if math.isfinite(scores[name].mean)]
    best = min(finite, key=lambda name: scores[name].mean, default=BASE)
    against = BASE if scores[BASE].mean <= scores[best].mean else best
    difference, stderr = scores[MIXTURE].minus(scores[against])
    win = difference < -ERRORS * stderr
    what = "the base" if against == BASE else f"the best single adapter, {against},"
    if not win:
        use = "the base" if against == BASE else against
        text = f"no better than {use}: use {use} ({_signed(difference, stderr)})"
        return Verdict(False, against, difference, stderr, text)
    text = f"beats {what} by {-difference:.3f} ± {stderr:.3f} NLL"
    for other in (UNIFORM, STATIC, PLAIN):
        if other not in scores:
            continue
        gap, error = scores[MIXTURE].minus(scores[other])
        if gap >= -ERRORS * error:
            text += f"; it is no better than the {other} ({_signed(gap, error)})"
    return Verdict(True, against, difference, stderr, text)


def _signed(difference: float, stderr: float) -> str:
    side = "lower" if difference < 0 else "higher"
    error = f" ± {stderr:.3f}" if math.isfinite(stderr) else ", on a single row,"
    return f"its NLL is {abs(difference):.3f}{error} {side}"
