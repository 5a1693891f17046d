"""Negative log-likelihood of the outputs, row by row, in nats."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional

from lorahub_registry.evaluate.tokens import IGNORED, Batch


@dataclass(frozen=True)
class RowNLL:
    """Σ token NLL and number of output tokens of each row, float64, both [rows]."""

    sums: torch.Tensor
    tokens: torch.Tensor

    @property
    def mean(self) -> float:
        """Σ token NLL / Σ output tokens."""
        return float(self.sums.sum() / self.tokens.sum())

    @property
    def stderr(self) -> float:
        """Standard error of the mean over rows, as a ratio of two sums (linearised)."""
        return _ratio_stderr(self.sums, self.tokens)

    def minus(self, other: RowNLL) -> tuple[float, float]:
        """(difference of means, its standard error), paired by row."""
        difference = self.sums - other.sums
        return float(difference.sum() / self.tokens.sum()), _ratio_stderr(difference, self.tokens)


def score(model: Any, batches: Sequence[Batch]) -> RowNLL:
    """NLL of every row of ``batches`` under ``model`` as it stands."""
    rows = sum(len(b.rows) for b in batches)
    sums = torch.zeros(rows, dtype=torch.float64)
    tokens = torch.zeros(rows, dtype=torch.float64)
    sliced = keeps_logits(model)
    with torch.inference_mode():
        for batch in batches:
            losses = token_losses(model, batch, sliced=sliced)
            sums[batch.rows] = losses.cpu().sum(1, dtype=torch.float64)
            tokens[batch.rows] = (batch.labels != IGNORED).sum(1).double().cpu()
    return RowNLL(sums, tokens)


def token_losses(model: Any, batch: Batch, *, sliced: bool) -> torch.Tensor:
    """−log p of each label, [rows, positions]; 0 where there is none.

    Args:
        sliced: see :func:`label_logits`.
    """
    logits = label_logits(model, batch, sliced=sliced)
    flat = functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        batch.labels.reshape(-1),
        ignore_index=IGNORED,
        reduction="none",
    )
    return flat.view(batch.labels.shape)


def label_logits(model: Any, batch: Batch, *, sliced: bool) -> torch.Tensor:
    """The logits that have to predict the labels, [rows, positions, vocabulary].

    Args:
        sliced: the model computes logits only where asked (see :func:`keeps_logits`).
    """
    if "labels" in batch.inputs:
        return model(**_without_labels(model, batch), use_cache=False).logits
    width = batch.inputs["input_ids"].shape[1]
    with _reading(model, batch):
        if not sliced:
            return model(**batch.inputs, use_cache=False).logits[:, batch.keep : width - 1]
        # The last position predicts nothing that is known.
        keep = torch.arange(batch.keep, width - 1, device=batch.labels.device)
        return model(**batch.inputs, use_cache=False, logits_to_keep=keep).logits


def _reading(model: Any, batch: Batch) -> AbstractContextManager[None]:
    """What decides by the prompt must not see the answer that it is scored on."""
    if not hasattr(model, "reading"):
        return nullcontext()
    ids = batch.inputs["input_ids"]
    prompts = batch.inputs.get("attention_mask", torch.ones_like(ids)).clone()
    prompts[:, batch.keep + 1 :][batch.labels != IGNORED] = 0
    return cast(AbstractContextManager[None], model.reading(prompts))


def _without_labels(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """A seq2seq model's inputs; given labels, it would compute a loss of its own."""
    inputs = dict(batch.inputs)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        labels = inputs.pop("labels")
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return inputs


def keeps_logits(model: Any) -> bool:
    """Whether the model's forward takes ``logits_to_keep``; a PEFT wrapper is looked through."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def _ratio_stderr(values: torch.Tensor, weights: torch.Tensor) -> float:
    n = len(values)
    if n < 2:
        return float("nan")
    residuals = values - values.sum() / weights.sum() * weights
    return float((residuals.square().sum() * n / (n - 1)).sqrt() / weights.sum())
