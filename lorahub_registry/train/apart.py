"""Whether a base keeps the rows of a batch apart, seen without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from lorahub_registry.errors import IncompatibleAdapters
from lorahub_registry.evaluate.nll import keeps_logits, label_logits
from lorahub_registry.evaluate.tokens import Encoded, one_batch
from lorahub_registry.runtime.grouped import Factors, Grouped, Share
from lorahub_registry.runtime.linear import fans
from lorahub_registry.train.parameters import targets


def check_apart(config: Any, wanted: Mapping[str, tuple[str, ...] | str], *, seq2seq: bool) -> None:
    """Two rows go through the base on torch's meta device, where only shapes are computed.

    A base whose forward looks at values (experts, some masks) is seen up to there; what is behind
    that, the first look at the loaded base finds (``Passes.probe``).

    Args:
        config: the base's.
        wanted: adapter → its ``target_modules``.

    Raises:
        IncompatibleAdapters: a module is none to train.
        RowsMerged: one does not see the rows apart.
    """
    kind = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        # The others' masks depend on values.
        model = kind.from_config(config, attn_implementation="eager")
    model.eval().requires_grad_(False)
    names: set[str] = set()
    for adapter, modules in wanted.items():
        try:
            names |= set(targets(model, modules))
        except IncompatibleAdapters as error:
            raise IncompatibleAdapters(f"{adapter}: {error}", hint=error.hint) from None
    batch = one_batch([Encoded([0], [0])] * 2, range(2), 0, "meta", seq2seq=seq2seq)
    with torch.no_grad(), Grouped(model, [{n: _thin(model, n) for n in sorted(names)}]) as grouped:
        grouped.shares = [Share(0, 0, 1), Share(0, 1, 2)]
        try:
            label_logits(model, batch, sliced=keeps_logits(model))
        except RuntimeError:
            return  # here it looks at values


def _thin(model: Any, name: str) -> Factors:
    """An adapter of rank 1."""
    fan_in, fan_out = fans(model.get_submodule(name))
    a, b = torch.empty(1, fan_in, device="meta"), torch.empty(fan_out, 1, device="meta")
    return Factors(a, b, a, b, 1.0)
