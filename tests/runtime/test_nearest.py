"""Probabilities by nearness: the nearest first, whatever the space's own direction and scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.runtime.nearest import nearest, similarities


def points(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 8), st.floats(0.02, 3))
def test_rows_add_up_to_one_over_the_top_k(seed: int, count: int, k: int, t: float) -> None:
    vectors, centroids = points(seed, 5, 7), points(seed + 1, count, 7)
    found = nearest(vectors, centroids, k, t)
    assert found.shape == (5, count)
    assert found.dtype == torch.float32
    assert torch.allclose(found.sum(1), torch.ones(5), atol=1e-6)
    cosines = torch.cosine_similarity(vectors[:, None], centroids[None], dim=-1)
    for row, near in zip(found, cosines, strict=True):
        # Outside of the k nearest by cosine there is nothing, and the nearest has the most.
        outside = near.argsort(descending=True)[k:]
        assert not row[outside].any()
        assert row[near.argmax()] == row.max()


def test_it_is_the_softmax_of_the_similarities() -> None:
    vectors, centroids = points(1, 4, 6), points(2, 3, 6)
    near = similarities(vectors, centroids)
    wanted = (near / 0.3).softmax(-1)
    assert torch.allclose(nearest(vectors, centroids, 3, 0.3), wanted, atol=1e-6)
    cut = near.masked_fill(near < near.topk(2, -1).values[:, -1:], -torch.inf)
    assert torch.allclose(nearest(vectors, centroids, 2, 0.3), (cut / 0.3).softmax(-1), atol=1e-6)


def test_similarity_is_one_at_a_centroid_and_zero_as_far_as_they_are_from_each_other() -> None:
    centroids = torch.tensor([[1.0, 0, 0, 5], [0, 1, 0, 5], [0, 0, 1, 5]])
    found = similarities(3 * centroids, centroids)
    assert torch.allclose(found, torch.eye(3), atol=1e-5)


def test_a_direction_that_all_share_changes_nothing() -> None:
    # Hidden states do: here all cosines lie above 0.999.
    shared = torch.zeros(8)
    shared[0] = 100
    offset = points(5, 3, 8)
    offset[:, 0] = 0
    offset = torch.nn.functional.normalize(offset, dim=-1)
    vectors = offset[:2] + 0.1 * offset[2]
    plain = nearest(vectors, offset, 3, 0.2)
    assert torch.allclose(nearest(vectors + shared, offset + shared, 3, 0.2), plain, atol=0.06)
    assert nearest(vectors + shared, offset + shared, 1, 0.2)[0, 0] == 1


def test_one_centroid_takes_all_and_twins_share() -> None:
    vectors = points(1, 2, 5)
    assert torch.equal(nearest(vectors, points(2, 1, 5), 4, 0.1), torch.ones(2, 1))
    twins = points(3, 1, 5).repeat(2, 1)
    assert torch.allclose(nearest(vectors, twins, 2, 0.1), torch.full((2, 2), 0.5))
    assert torch.isfinite(similarities(vectors, twins)).all()


def test_half_precision_and_gradients_go_through() -> None:
    vectors = points(1, 2, 5).requires_grad_()
    torch.autograd.backward(nearest(vectors, points(2, 3, 5).bfloat16(), 2, 0.5)[:, 0].sum())
    assert vectors.grad is not None
    assert torch.isfinite(vectors.grad).all()


@pytest.mark.parametrize(
    ("count", "k", "t"), [(0, 1, 1.0), (2, 0, 1.0), (2, 1, 0.0), (2, 1, float("nan"))]
)
def test_what_has_no_answer_is_refused(count: int, k: int, t: float) -> None:
    with pytest.raises(ValueError, match="centroid"):
        nearest(points(1, 2, 5), points(2, count, 5), k, t)
