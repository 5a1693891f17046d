"""Where prompts lie in the base's hidden space, and where those of an adapter lie on average.

Which hidden state tells best what a prompt is for was measured on two bases of five layers, by how
many of 200 test prompts of each of four skills lie nearest to their own skill's centroid (cosine;
128 training prompts each; zog, arr, upper and shakespeare, of which the first three tell the same
stories) and by the same over 29 tasks of T0 (45 to 100 prompts each to learn and to test):

    =================================  ===========  ============
    hidden state                       stories260k  babyllama105
    =================================  ===========  ============
    four skills, mean over the prompt
    embeddings                         0.919        0.817
    after layer 2, the middle          0.883        0.917
    the last                           0.841        0.892
    four skills, last token
    after layer 2, the middle          0.945        0.944
    the last                           0.840        0.894
    29 tasks, mean over the prompt
    embeddings                         0.800        0.624
    after layer 2, the middle          0.781        0.742
    the last                           0.822        0.750
    29 tasks, last token
    after layer 2, the middle          0.841        0.873
    the last                           0.835        0.732
    =================================  ===========  ============

So the middle is the default: neither end does on both bases. The last token alone is better still
where all prompts end the same way, as these do; the mean is taken because it depends less on the
template, and because it is what a dynamic mixture's router computes
(:func:`~lorahub_registry.runtime.prompts.prompt_means`). Taking the mean of all centroids off first
was worse on the four skills (0.847 and 0.883) and no better on the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from lorahub_registry.errors import UsageError
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.tokens import tokens_that_fit
from lorahub_registry.progress import Progress, silent
from lorahub_registry.runtime.prompts import prompt_means

Points = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""(decoder without its head or encoder, ids, mask) → [rows, width]"""


def prompt_vectors(
    base: LoadedBase,
    prompts: Sequence[Sequence[int]],
    layer: int | None = None,
    *,
    progress: Progress = silent,
) -> torch.Tensor:
    """The mean hidden state over each prompt's tokens: [n, width], float32 on the CPU.

    Args:
        prompts: token ids, at least one each.
        layer: 0 for the embeddings, n for what the n-th layer gives (of a seq2seq model: the
            encoder's); default: :func:`middle_layer`.

    Raises:
        UsageError: the base has no such layer.
    """
    wanted = middle_layer(base) if layer is None else layer
    most = layers(base)
    if not 0 <= wanted <= most:
        raise UsageError(
            f"{base.name} has no hidden state {wanted}", hint=f"0 (the embeddings) to {most}"
        )

    def points(reader: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return prompt_means(reader, ids, mask, wanted)

    return read(base, prompts, points, progress=progress)


def middle_layer(base: LoadedBase) -> int:
    """The hidden state halfway up, where prompts are told apart best."""
    return layers(base) // 2


def layers(base: LoadedBase) -> int:
    """How many a prompt passes: all, or a seq2seq model's encoder's."""
    return int(base.model.config.get_text_config().num_hidden_layers)


def centroid(
    base: LoadedBase,
    prompts: Sequence[Sequence[int]],
    layer: int | None = None,
    *,
    progress: Progress = silent,
) -> torch.Tensor:
    """Where ``prompts`` lie on average: [width], float32 on the CPU.

    Each counts by its direction alone: it is the mean of unit vectors.

    Raises:
        ValueError: there are none.
        UsageError: the base has no such layer.
    """
    if not prompts:
        raise ValueError("a centroid needs a prompt")
    vectors = prompt_vectors(base, prompts, layer, progress=progress)
    return functional.normalize(vectors, dim=-1).mean(0)


def read(
    base: LoadedBase, rows: Sequence[Sequence[int]], points: Points, *, progress: Progress = silent
) -> torch.Tensor:
    """What ``points`` says of each row of token ids: [n, width], float32 on the CPU.

    Rows of like length go together, padded on their right.
    """
    model, fitting = base.model, tokens_that_fit(base.device.type)
    reader = model.get_encoder() if base.seq2seq else model.base_model
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * len(rows[i]) <= fitting:
            groups[-1].append(i)
        else:
            groups.append([i])
    found: torch.Tensor | None = None
    with (
        torch.inference_mode(),
        progress.task("Looking at the rows", len(rows), "row") as task,
    ):
        for group in groups:
            ids = torch.full((len(group), len(rows[group[-1]])), base.tokenizer.pad_token_id or 0)
            mask = torch.zeros_like(ids)
            for n, i in enumerate(group):
                ids[n, : len(rows[i])] = torch.tensor(rows[i])
                mask[n, : len(rows[i])] = 1
            means = points(reader, ids.to(base.device), mask.to(base.device)).float().cpu()
            if found is None:
                found = torch.zeros(len(rows), means.shape[1])
            found[group] = means
            task.advance(len(group))
    assert found is not None
    return found
