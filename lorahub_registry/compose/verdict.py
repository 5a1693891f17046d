"""What a mixture's scores mean, in words.

A win is a paired per-row difference of more than two standard errors over the best single
adapter, and over the base where that is the better one. Everything else reads "no better than X:
use X". A mixture that decides while it runs costs more than fixed coefficients do, so it has to
beat the best of these, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lorahub_registry.evaluate.nll import RowNLL

ERRORS = 2.0
BASE, UNIFORM, MIXTURE = "base", "uniform average", "mixture"
STATIC, PLAIN = "learned static coefficients", "plain LoRA with mean coefficients"

_LEARN = "method: {type: learn, optimizer: gradient, l1: 0"
RECIPES = {
    f"{STATIC} (per model)": f"{_LEARN}}}",
    f"{STATIC} (per layer)": f"{_LEARN}, per: layer_group, layer_groups: 256}}",
    f"{STATIC} (per module)": f"{_LEARN}, per: module}}",
}
"""Learned static coefficients, as the table names them → what of a recipe makes them."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of the paired comparison.

    Attributes:
        against: the best alternative to the mixture: a single adapter's name, or ``base``; of a
            dynamic mixture any other row of the table.
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
            of a dynamic mixture also under ``PLAIN`` and the names of learned static
            coefficients, and everything in ``scores`` is an alternative to it.
    """
    if PLAIN in scores:
        return _judge_dynamic(scores, singles)
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
    text += _no_better(scores, {UNIFORM: f"the {UNIFORM}"})
    return Verdict(True, against, difference, stderr, text)


def _judge_dynamic(scores: Mapping[str, RowNLL], singles: list[str]) -> Verdict:
    words = {name: name if name in singles else f"the {name}" for name in scores if name != MIXTURE}
    finite = [name for name in words if math.isfinite(scores[name].mean)]
    # Of two that are equal the base is the simpler one.
    against = min(finite, key=lambda name: (scores[name].mean, name != BASE), default=BASE)
    difference, stderr = scores[MIXTURE].minus(scores[against])
    use = words.pop(against)
    if difference < -ERRORS * stderr:
        what = f"the best single adapter, {use}" if against in singles else use
        text = f"beats {what}, the best of all else, by {-difference:.3f} ± {stderr:.3f} NLL"
        text += _no_better(scores, words)
        return Verdict(True, against, difference, stderr, text)
    how = "worse" if difference > ERRORS * stderr else "no better"
    made = f", which {RECIPES[against]} makes" if against in RECIPES else ""
    text = f"{how} than {use}: use {use}{made} ({_signed(difference, stderr)})"
    return Verdict(False, against, difference, stderr, text)


def _no_better(scores: Mapping[str, RowNLL], words: Mapping[str, str]) -> str:
    """Which of ``words`` the mixture does not beat, to go on with."""
    found = ""
    for name, said in words.items():
        gap, error = scores[MIXTURE].minus(scores[name])
        if gap >= -ERRORS * error:
            found += f"; it is no better than {said} ({_signed(gap, error)})"
    return found


def _signed(difference: float, stderr: float) -> str:
    side = "lower" if difference < 0 else "higher"
    error = f" ± {stderr:.3f}" if math.isfinite(stderr) else ", on a single row,"
    # It is said only where the mixture is no better: lower by so little may be chance.
    chance = f", within {ERRORS:g} standard errors" if side == "lower" and error[:2] == " ±" else ""
    return f"the mixture's NLL is {abs(difference):.3f}{error} {side}{chance}"
