"""Forwards and backwards of the base over rows of several adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lorahub_registry.errors import BaseModelError
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.nll import keeps_logits, label_logits, token_losses
from lorahub_registry.evaluate.packing import mask_dtype, packed_batch
from lorahub_registry.evaluate.tokens import Batch, Encoded, one_batch, tokens_that_fit
from lorahub_registry.progress import Progress, silent
from lorahub_registry.runtime.grouped import Grouped, Share
from lorahub_registry.train.learner import Learner, Micro, length
from lorahub_registry.train.loss import losses_over
from lorahub_registry.train.scoring import Scoring, cut

_CPU_TOKENS = 2048  # more in one pass bring nothing there, and take memory


class Standing:
    """The base computes with what is trained already: nothing is to be put on it."""

    def __enter__(self) -> Standing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, shares: Sequence[Share], real: torch.Tensor | None) -> None:
        """See :meth:`~lorahub_registry.runtime.grouped.Grouped.begin`."""

    def extra(self) -> dict[int, torch.Tensor]:
        """See :meth:`~lorahub_registry.runtime.grouped.Grouped.extra`."""
        return {}


class Passes:
    """One base, the learners' adapters on it.

    Attributes:
        tokens: how many one pass may have.
        most, last: adapters in the fullest pass so far, and in the one that was begun last.
        at: the first micro-batch of that one.
        extra: adapter → what the last ``gradients`` added to its loss beside its tokens'.
    """

    def __init__(
        self,
        base: LoadedBase,
        grouped: Grouped | Standing,
        learners: Sequence[Learner],
        progress: Progress = silent,
    ) -> None:
        self._base, self._grouped = base, grouped
        self._scoring = Scoring(progress)
        self._learners = {learner.number: learner for learner in learners}
        self._sliced = keeps_logits(base.model)
        self._additive = mask_dtype(base.model)
        self.tokens = pass_tokens(base.device.type, len(base.tokenizer))
        self.most = self.last = 0
        self.at: Micro | None = None
        self.extra: dict[int, float] = {}

    def gradients(
        self, groups: Sequence[Sequence[Micro]], outputs: Mapping[int, int]
    ) -> dict[int, float]:
        """Add up the gradients of all micro-batches, each adapter's in its own buffer.

        Args:
            outputs: adapter → output tokens of its whole step, of which this may be a part.

        Returns:
            Adapter → Σ NLL of its output tokens here, in nats, over those of the whole step.
        """
        sums, self.extra = dict.fromkeys(outputs, 0.0), {}
        for group in groups:
            self.at, self.last = group[0], len({micro.adapter for micro in group})
            batch, shares = self._batch(group)
            self._grouped.begin(shares, _real(batch, group))
            logits = label_logits(self._base.model, batch, sliced=self._sliced)
            losses = losses_over(logits, batch.labels).sum(1)
            del logits
            sizes = [share.stop - share.start for share in shares]
            # The mean over all of a step's output tokens, whatever passes they are in.
            weights = [self._learners[s.adapter].at.scale / outputs[s.adapter] for s in shares]
            each = torch.tensor(weights, device=losses.device)
            each = each.repeat_interleave(torch.tensor(sizes, device=losses.device))
            total = (losses * each).sum()
            for number, value in self._grouped.extra().items():
                adapter = shares[number].adapter
                # Of its part of the step, as the tokens' loss is.
                part = group[number].outputs / outputs[adapter]
                total = total + value * (self._learners[adapter].at.scale * part)
                self.extra[adapter] = self.extra.get(adapter, 0.0) + float(value.detach()) * part
            total.backward()
            found = [part.sum() for part in losses.detach().double().split(sizes)]
            for share, value in zip(shares, torch.stack(found).tolist(), strict=True):
                sums[share.adapter] += value
            self.most = max(self.most, self.last)
        return {adapter: value / outputs[adapter] for adapter, value in sums.items()}

    @torch.no_grad()
    def probe(self) -> None:
        """Look whether every module sees the rows apart, before anything is trained.

        Raises:
            RowsMerged: one does not, and is none to train.
        """
        rows = [Encoded([0], [0])] * len(self._learners)
        batch = one_batch(rows, range(len(rows)), 0, self._base.device, seq2seq=self._base.seq2seq)
        shares = [Share(number, n, n + 1) for n, number in enumerate(self._learners)]
        self._grouped.begin(shares, None)
        label_logits(self._base.model, batch, sliced=self._sliced)

    @torch.no_grad()
    def validation(self, learner: Learner) -> float:
        """Mean NLL of the output tokens of a learner's validation rows, in nats.

        Raises:
            NoMemory: one row alone does not fit.
        """
        batches = self._base.batches(learner.validation, gradients=True)

        def total(parts: int) -> float:
            found = 0.0
            for batch in cut(batches, parts):
                shares = [Share(learner.number, 0, len(batch.rows))]
                self._grouped.begin(shares, batch.inputs["attention_mask"].bool())
                found += float(token_losses(self._base.model, batch, sliced=self._sliced).sum())
            return found

        what, rows = f"validation rows of {learner.plan.name}", max(len(b.rows) for b in batches)
        whole = self._scoring(what, rows, total)
        return whole / sum(len(row.output) for row in learner.validation)

    def _batch(self, group: Sequence[Micro]) -> tuple[Batch, list[Share]]:
        items = [item for micro in group for item in micro.items]
        shares, at = [], 0
        for micro in group:
            shares.append(Share(micro.adapter, at, at + micro.rows, micro.seed))
            at += micro.rows
        pad, device = self._base.tokenizer.pad_token_id or 0, self._base.device
        which = list(range(len(items)))
        if group[0].packed:
            return packed_batch(items, which, pad, device, additive=self._additive), shares
        rows = [item[0] for item in items]
        return one_batch(rows, which, pad, device, seq2seq=self._base.seq2seq), shares


def _real(batch: Batch, group: Sequence[Micro]) -> torch.Tensor:
    """bool [rows, positions], false at padding, which stands behind a row's tokens."""
    width = batch.inputs["input_ids"].shape[1]
    lengths = torch.tensor([length(item) for micro in group for item in micro.items])
    return (torch.arange(width) < lengths[:, None]).to(batch.labels.device)


def pass_tokens(device: str, vocabulary: int) -> int:
    """How many tokens one pass may have; a single micro-batch may have more."""
    return _CPU_TOKENS if device == "cpu" else tokens_that_fit(device, vocabulary)


@contextmanager
def checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Keep only what enters each layer, and compute the rest again in the backward pass.

    Done here and not by transformers, which would have the layers train, and so drop out.

    Raises:
        BaseModelError: the model has no layers that can.
    """
    if not wanted:
        yield
        return
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise BaseModelError(
            f"{type(model).__name__} has no layers that can be computed twice",
            hint="leave out gradient_checkpointing, and lower batch_size or --max-together",
        )
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
