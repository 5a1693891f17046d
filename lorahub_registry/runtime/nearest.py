"""Which centroids a prompt lies nearest to, and with what probability each is the one."""

from __future__ import annotations

import torch
from torch.nn import functional


def nearest(
    vectors: torch.Tensor, centroids: torch.Tensor, top_k: int, temperature: float
) -> torch.Tensor:
    """How probable each centroid is for each vector: [n, E], float32, 0 outside the top k.

    A softmax of :func:`similarities` over the ``top_k`` largest, so that each row adds up to 1.

    Args:
        vectors: [n, width].
        centroids: [E, width], on the same device.
        top_k: how many stay; all, where there are fewer.
        temperature: more than 0; the smaller, the more goes to the nearest.

    Raises:
        ValueError: no centroid, ``top_k`` less than 1, or a temperature that is not positive.
    """
    if not len(centroids) or top_k < 1 or not temperature > 0:
        raise ValueError("wants a centroid, a top_k of at least 1 and a positive temperature")
    return probable(similarities(vectors, centroids), top_k, temperature)


def probable(near: torch.Tensor, top_k: int, temperature: float) -> torch.Tensor:
    """``near`` [n, E] as probabilities: a softmax over each row's ``top_k`` largest, else 0."""
    best, which = near.topk(min(top_k, near.shape[-1]), -1)
    return torch.zeros_like(near).scatter(-1, which, (best / temperature).softmax(-1))


def similarities(vectors: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """How near each vector is to each centroid: [n, E], float32; 1 at the centroid itself.

    The cosine c, told as ``(c - m) / (1 - m)`` with m the mean cosine of two centroids, so that 0
    is as far away as the centroids are from each other. All hidden states of a model point much the
    same way: their cosines may differ by 0.01, and by how much depends on model and layer. In these
    units one temperature does for all of them, and which centroid is nearest does not change. With
    a single centroid, or where all are the same, it is the cosine.
    """
    units = functional.normalize(centroids.float(), dim=-1)
    cosines = functional.normalize(vectors.float(), dim=-1) @ units.T
    count = len(units)
    if count < 2:
        return cosines
    # One cosine a pair: all of them, less each centroid with itself.
    mean = (units.sum(0).square().sum() - units.square().sum()) / (count * (count - 1))
    apart = 1 - mean
    return torch.where(apart > _SAME, (cosines - mean) / apart.clamp_min(_SAME), cosines)


_SAME = 1e-6  # cosines nearer to 1 than this are float32's rounding
