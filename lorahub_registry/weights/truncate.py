"""The best approximation of a delta by rank (Eckart–Young), and what it costs.

Three ways to the same thing. Factors: QR of both stacks, SVD of the small core. A dense matrix: a
few of its leading directions by a block Krylov method (Musco & Musco, arXiv:1504.05477), or all of
them from the eigenvectors of its Gram matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lorahub_registry.weights.lowrank import LowRank

SMALL = 512  # up to here, all directions at once cost less than looking for some
_SHARE = 1e-12  # a share of energy within this of the asked one counts as kept
_GAP = 1e-3  # how much more than the least possible a search may leave, in energy lost
_MOST_STEPS = 40
_PLAIN = 1e-30  # sums of squares from here to its inverse are far from float32's limits


@dataclass(frozen=True)
class Truncated:
    """A truncation and what it cost.

    Attributes:
        delta: the best approximation of its rank.
        energy: the squared Frobenius norm of what was truncated.
        lost: that of what was cut off.
    """

    delta: LowRank
    energy: float
    lost: float

    @property
    def kept(self) -> float:
        """Share of the energy that it holds, 0 to 1."""
        return 1 - self.lost / self.energy if self.energy > 0 else 1.0

    @property
    def error(self) -> float:
        """Frobenius norm of what was cut off, as a share of the whole's."""
        return math.sqrt(self.lost / self.energy) if self.energy > 0 else 0.0


def truncate(delta: LowRank, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """The best approximation of ``delta`` by rank, or by the share of energy it must keep.

    Args:
        rank: at most this rank.
        energy: the smallest rank that keeps this share of the squared Frobenius norm.

    The work is done in float64; the result has the input's dtype, B and A sharing the singular
    values evenly. The rank is never more than the matrix has, and never less than 1.
    """
    m, n = delta.shape
    if min(m, n) > SMALL and 2 * delta.rank * (m + n) > m * n:
        # Factors as large as the matrix: their QR would cost more than the matrix itself.
        # In float64, too: what terms that cancel leave may be small beside them.
        cut = truncate_dense(delta.b.double() @ delta.a.double(), rank=rank, energy=energy)
        made = LowRank(cut.delta.a.to(delta.dtype), cut.delta.b.to(delta.dtype), delta.kind)
        return Truncated(made, cut.energy, cut.lost)
    q_b, core, q_a = delta.core()
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    squares = s.square()
    keep = _rank(squares, float(squares.sum()), rank, energy)
    root = s[:keep].sqrt()
    a, b = root[:, None] * (vh[:keep] @ q_a.T), (q_b @ u[:, :keep]) * root
    made = LowRank(a.to(delta.dtype).contiguous(), b.to(delta.dtype).contiguous(), delta.kind)
    return Truncated(made, float(squares.sum()), float(squares[keep:].sum()))


def truncate_dense(
    matrix: torch.Tensor,
    *,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    exact: bool = False,
) -> Truncated:
    """The best approximation of a dense ΔW, its Frobenius error at most 1.001 times the least.

    Of a large float32 matrix that holds where the error is more than a thousandth of the norm;
    below that rounding has a say, and it may be 1.01 times.

    Args:
        matrix: [fan_out, fan_in], float32 or float64, on any device; it is not changed.
        rank: at most this rank.
        energy: the smallest rank that keeps this share of the squared Frobenius norm. With
            neither, its full rank.
        seed: of the directions that the search starts from.
        exact: from all directions, however large the matrix.

    Returns:
        A delta of the matrix's dtype; what was cut off is measured, not estimated.
    """
    total = frobenius(matrix) ** 2
    directions = None
    # Ritz values are rounded: next to a whole, only all directions tell what is left.
    if (
        not exact
        and total > 0
        and min(matrix.shape) > SMALL
        and (energy is None or energy < 1 - 1e-6)
    ):
        directions = _leading(matrix, total, rank, energy, seed)
    if directions is None:
        directions = _all(matrix, rank, energy)
    # The best approximation in these directions is the projection on them.
    b = matrix @ directions
    lost = distance(matrix, b, directions.T) ** 2 if total > 0 else 0.0
    size = b.norm(dim=0).clamp_min(torch.finfo(b.dtype).tiny)
    root = size.sqrt()
    made = LowRank((directions * root).T.contiguous(), (b / root).contiguous())
    return Truncated(made, total, min(lost, total))


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """All of a dense matrix, descending, float64 on the CPU: roots of its Gram's eigenvalues."""
    gram = _gram(matrix if matrix.shape[0] < matrix.shape[1] else matrix.T)
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt().cpu()


def _rank(squares: torch.Tensor, total: float, rank: int | None, energy: float | None) -> int:
    """How many of the squared singular values, descending, have to stay."""
    keep = squares.numel() if rank is None else max(1, min(rank, squares.numel()))
    if energy is not None:
        # Of nothing, one rank is all.
        shares = squares.cumsum(0) / total if total > 0 else torch.ones_like(squares)
        keep = min(keep, int((shares < energy - _SHARE).sum()) + 1)
    return keep


def _all(matrix: torch.Tensor, rank: int | None, energy: float | None) -> torch.Tensor:
    """[fan_in, kept]: right singular vectors, from the Gram matrix of the smaller side.

    In float64 it resolves singular values down to 1e-8 of the largest, below float32's own
    rounding.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    gram = _gram(matrix if wide else matrix.T)
    values, vectors = torch.linalg.eigh(gram)
    squares = values.flip(0).clamp_min(0)
    keep = _rank(squares, float(squares.sum()), rank, energy)
    found = vectors.flip(1)[:, :keep].to(matrix.dtype)
    return torch.linalg.qr(matrix.T @ found)[0] if wide else found


def _leading(
    matrix: torch.Tensor, total: float, rank: int | None, energy: float | None, seed: int
) -> torch.Tensor | None:
    """[fan_in, kept]: leading right singular vectors; None where that would not be less work."""
    least = min(matrix.shape)
    wanted = rank if rank is not None else None if energy is None else 64
    while wanted is not None and wanted <= least // 8:
        found = _krylov(matrix, total, wanted, seed)
        if found is None:
            return None
        squares, directions = found
        if energy is None:
            return directions
        keep = _rank(squares, total, None, energy)
        if float(squares.sum()) >= (energy - _SHARE) * total or wanted == rank:
            return directions[:, :keep]
        # Every further direction holds at most what the last one does.
        short = (energy * total - float(squares.sum())) / max(float(squares[-1]), 1e-300)
        wanted = max(2 * wanted, wanted + int(min(short, least)))
        wanted = min(wanted, rank) if rank is not None else wanted
    return None


def _krylov(
    matrix: torch.Tensor, total: float, rank: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The leading ``rank`` squared singular values, and right singular vectors [fan_in, rank].

    The basis [M·X, (M·Mᵀ)M·X, …] grows until what the best ``rank`` directions in it hold gains no
    more than a thousandth of what is left; the gains fall geometrically, so the last two tell how
    much is still to come. None where the basis would outgrow the matrix before that.
    """
    block = rank + max(8, rank // 8)
    floor = (1e-6 if matrix.dtype == torch.float32 else 1e-13) * total  # below is rounding
    start = torch.randn(
        matrix.shape[1], block, generator=torch.Generator().manual_seed(seed), dtype=matrix.dtype
    ).to(matrix.device)
    q = torch.linalg.qr(matrix @ start)[0]
    basis, images = [q], [matrix.T @ q]
    held, gain = 0.0, math.inf
    for _ in range(_MOST_STEPS):
        image = torch.cat(images, 1)  # Mᵀ·basis: its singular values are the Ritz values
        values, vectors = torch.linalg.eigh(_gram(image.T))
        squares = values.flip(0)[:rank].clamp_min(0)
        last, gain, held = gain, float(squares.sum()) - held, float(squares.sum())
        ratio = min(gain / last, 0.99)
        ahead, least = gain * ratio / (1 - ratio), _GAP * max(total - held, floor)
        if last < math.inf and ahead <= least and gain <= least:
            right = image @ vectors.flip(1)[:, :rank].to(matrix.dtype)
            return squares, torch.linalg.qr(right)[0]
        if image.shape[1] + block > min(matrix.shape):
            break
        # What the basis holds already is taken out twice: once leaves rounding behind.
        q = matrix @ images[-1]
        whole = torch.cat(basis, 1)
        for _ in range(2):
            q = torch.linalg.qr(q - whole @ (whole.T @ q))[0]
        basis.append(q)
        images.append(matrix.T @ q)
    return None


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """``rows·rowsᵀ`` in float64, some columns at a time."""
    found = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    step = _rows(rows.T)
    for begin in range(0, rows.shape[1], step):
        part = rows[:, begin : begin + step].double()
        found.addmm_(part, part.T)
    return found


def frobenius(matrix: torch.Tensor) -> float:
    """‖matrix‖, to 1e-7 of it where that is float32, and never a copy of the whole.

    Blocks that a cache holds are multiplied with themselves in their own type and summed in
    float64; where squares leave float32's range, in float64.
    """
    squares = 0.0
    matrix = matrix if matrix.is_contiguous() else matrix.T
    for rows in matrix.split(max(1, _rows(matrix) // 64)):
        flat = rows.reshape(-1)
        square = float(torch.dot(flat, flat))
        if not _PLAIN < square < 1 / _PLAIN and flat.numel():
            square = float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2
        squares += square
    return math.sqrt(squares)


def rounding(matrix: torch.Tensor, rounded: torch.Tensor) -> float:
    """‖matrix − rounded‖, of whatever dtype that is."""
    step = _rows(matrix)
    parts = zip(matrix.split(step), rounded.split(step), strict=True)
    return math.hypot(*(frobenius(one - other.to(one.dtype)) for one, other in parts))


def distance(matrix: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> float:
    """‖matrix − b·a‖; the factors may be of another dtype."""
    right, step = a.to(matrix.dtype), _rows(matrix)
    parts = zip(matrix.split(step), b.split(step), strict=True)
    return math.hypot(*(frobenius(rows - left.to(rows.dtype) @ right) for rows, left in parts))


def _rows(matrix: torch.Tensor) -> int:
    """How many at a time, where a whole matrix in float64 would not do: 32 MiB of it."""
    return max(1, (1 << 22) // max(1, matrix[0].numel())) if len(matrix) else 1
