"""Route: which adapters a prompt is for, told by the rows that they learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorahub_registry.api.bases import ResolvedBase, load_found, resolve_base
from lorahub_registry.api.centroids import positions
from lorahub_registry.errors import BaseModelError, DataError, UnknownRef, UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes import render
from lorahub_registry.recipes.rows import Row
from lorahub_registry.recipes.template import CHAT
from lorahub_registry.registry.records import CentroidRecord, Query, StoredAdapter
from lorahub_registry.registry.search import COUNTED
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    import torch

    from lorahub_registry.evaluate.base import LoadedBase

TEMPERATURE = 0.1
"""Measured on the bases and prompts of ``evaluate/hidden.py``: there it costs at most 0.06 nats a
prompt more than the best temperature of each."""
FAR = 2.0
"""From here on a prompt may be for nobody: so many times as far away as an adapter's own rows are
on average. On the two bases of ``evaluate/hidden.py`` and their four adapters this is said of 6% of
the adapters' own test prompts (0% to 17% by adapter), of all strings of random letters, and of 44%
of the prompts of four other tasks (gsm8k's, which tell stories, too: 2%)."""
_SAME = 1e-6  # nearer to 1 than this, a length is float32's rounding
_FEWEST = 8  # rows whose mean tells how far they usually lie from it
_NAMED = 3


@dataclass(frozen=True)
class Routed:
    """How probable it is that a prompt is for this adapter.

    Attributes:
        ref: what to type for it.
        similarity: 1 where its own rows lie, 0 as far away as the adapters are from each other (see
            :func:`~lorahub_registry.runtime.nearest.similarities`).
        distance: by the cosine, 1 where its own rows lie on average; None where these were too
            few, or all alike.
    """

    ref: str
    name: str
    probability: float
    similarity: float
    distance: float | None
    skills: tuple[str, ...]


def route(
    prompt: str,
    *,
    base: str,
    top_k: int = 5,
    temperature: float = TEMPERATURE,
    skill: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    registry: Registry | None = None,
    progress: Progress = silent,
) -> list[Routed]:
    """The adapters that a prompt is for, the likeliest first; none of their files is needed.

    Those whose centroid is known on this very base take part; others of the base that a search
    would find are counted and named through ``progress``. Of an adapter that was trained again into
    another folder, only the newest takes part: two that are nearly one would halve each other's
    probability.

    Args:
        base: a family name, a Hub id or a path.
        top_k: at most so many; their probabilities add up to 1.
        temperature: the smaller, the more goes to the nearest.
        skill: only adapters that have it.
        device, dtype: as in a recipe.

    Raises:
        UsageError: the prompt is empty, ``top_k`` is less than 1, ``temperature`` is not positive.
        UnknownRef: no adapter of the base is known, or none has a centroid on it.
        BaseModelError, AmbiguousRef, HubError: the base cannot be found, told apart or loaded.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty", hint='lorareg route "Write a SQL query" --base B')
    if top_k < 1 or not temperature > 0:
        raise UsageError("top_k must be at least 1, and temperature more than 0")
    if registry is None:
        with Registry(progress=progress) as opened:
            return route(
                prompt, base=base, top_k=top_k, temperature=temperature, skill=skill,
                device=device, dtype=dtype, registry=opened, progress=progress,
            )  # fmt: skip
    found = resolve_base(base, registry=registry, progress=progress)
    known = registry.centroids(skill=skill)
    here = [(a, c) for a, c in known if c.base_digest == found.facts.digest]
    name, digest = found.facts.name, found.facts.digest
    others = sum(c.base == name and c.base_digest != digest for _, c in known)
    _tell(found, base, here, others, skill, registry, progress)
    here = _newest(here, progress)
    loaded = load_found(found, device, dtype, progress)
    here, vectors, which = _placed(prompt, here, loaded, progress)
    import torch

    from lorahub_registry.runtime.nearest import probable, similarities

    width = vectors.shape[1]
    for stored, one in here:
        if len(one.vector) != 4 * width:
            raise BaseModelError(
                f"{stored.record.name}: its centroid has {len(one.vector) // 4} numbers, and "
                f"{loaded.name} is {width} wide",
                hint=_learn(stored.ref, base),
            )
    centroids = torch.stack([_vector(one) for _, one in here])
    # Each adapter is asked by the prompt as its own rows were written.
    near = similarities(vectors, centroids)[which, range(len(here))]
    distances = _distances(vectors[which], here, centroids)
    shares = probable(near[None], top_k, temperature)[0]
    routed = [
        Routed(
            stored.ref,
            stored.record.name,
            float(share),
            float(one),
            distance,
            tuple(sorted({s.name for s in stored.record.skills})),
        )
        for (stored, _), one, share, distance in zip(here, near, shares, distances, strict=True)
    ]
    best = sorted(routed, key=lambda r: (-r.probability, -r.similarity, r.ref))
    far = best[0].distance
    if far is not None and far > FAR:
        progress.warn(
            f"the prompt may be for none of them: it lies {far:.1f} times as far from "
            f"{best[0].name}, the nearest, as that adapter's own rows do on average"
        )
    return best[:top_k]


def _distances(
    vectors: torch.Tensor,
    known: Sequence[tuple[StoredAdapter, CentroidRecord]],
    centroids: torch.Tensor,
) -> list[float | None]:
    """How far each of ``vectors`` [E, width] lies from its centroid; see :class:`Routed`.

    A centroid is the mean of unit vectors, so that its length is their mean cosine to it.
    """
    from torch.nn.functional import cosine_similarity

    apart = 1 - cosine_similarity(vectors, centroids, dim=-1)
    usual = 1 - centroids.norm(dim=-1)
    return [
        float(one / own) if placed.rows >= _FEWEST and own > _SAME else None
        for (_, placed), one, own in zip(known, apart, usual, strict=True)
    ]


def _newest(
    known: Sequence[tuple[StoredAdapter, CentroidRecord]], progress: Progress
) -> list[tuple[StoredAdapter, CentroidRecord]]:
    """All but those that were trained again, elsewhere, under the same name; these are told of.

    Others of one name, as of different owners, are different adapters: their refs tell them apart.
    """
    last: dict[str, StoredAdapter] = {}
    for stored, _ in known:
        if _trained(stored):
            other = last.get(stored.record.name, stored)
            last[stored.record.name] = max(stored, other, key=lambda a: (a.updated_at, a.id))
    old = [a for a, _ in known if _trained(a) and last[a.record.name].id != a.id]
    for one in old:
        now = last[one.record.name]
        progress.say(
            f"{one.record.name} was trained again: {now.ref} takes part, the older {one.ref} does "
            f"not; lorareg remove {one.ref} forgets it"
        )
    left_out = {one.id for one in old}
    return [(a, c) for a, c in known if a.id not in left_out]


def _trained(stored: StoredAdapter) -> bool:
    """Whether lorareg trained it on this machine; a mixture has members."""
    local = stored.record.repo.kind == "local"
    return local and stored.mixture is not None and not stored.mixture.members


def _placed(
    prompt: str,
    known: Sequence[tuple[StoredAdapter, CentroidRecord]],
    base: LoadedBase,
    progress: Progress,
) -> tuple[list[tuple[StoredAdapter, CentroidRecord]], Any, list[int]]:
    """Those that the prompt can be written for, where it lies ([ways, width]), and whose way which.

    It lies elsewhere in another template, or another layer.
    """
    import torch

    from lorahub_registry.evaluate.hidden import prompt_vectors
    from lorahub_registry.evaluate.quiet import threads_for
    from lorahub_registry.evaluate.tokens import TokenRule, encode_one

    kept: list[tuple[StoredAdapter, CentroidRecord]] = []
    vectors: dict[tuple[str, int], torch.Tensor] = {}
    cut = 0
    row = Row(prompt, "-", {"input": prompt, "output": "-"}, place="the prompt")
    for stored, one in known:
        key = one.template, one.layer
        if key not in vectors:
            chat = one.template == CHAT
            try:
                text = prompt if chat else render(one.template, row)
            except DataError as error:
                progress.warn(f"{stored.record.name} is left out: {error}")
                continue
            # The output only has to be there: the prompt alone is looked at.
            rule = TokenRule(positions(base), chat=chat)
            ids = encode_one(base.tokenizer, text, "-", rule, seq2seq=base.seq2seq, place=row.place)
            cut = max(cut, ids.cut)
            with threads_for(base.model):
                vectors[key] = prompt_vectors(base, [ids.prompt], one.layer)[0]
        kept.append((stored, one))
    if cut:
        progress.warn(
            f"the prompt is longer than {base.name} takes: its first {cut} tokens are cut"
        )
    if not kept:
        raise UnknownRef(
            "the templates of all centroids want columns that a prompt has not",
            hint="learn them with a template over `input` alone: lorareg route --learn REF …",
        )
    ways = list(vectors)
    which = [ways.index((one.template, one.layer)) for _, one in kept]
    return kept, torch.stack([vectors[way] for way in ways]), which


def _mixed(stored: StoredAdapter) -> bool:
    return stored.mixture is not None and bool(stored.mixture.members)


def _tell(
    found: ResolvedBase,
    written: str,
    here: Sequence[tuple[StoredAdapter, CentroidRecord]],
    others: int,
    skill: str | None,
    registry: Registry,
    progress: Progress,
) -> None:
    """Who does not take part, and what would help.

    Raises:
        UnknownRef: nobody does.
    """
    ids = {stored.id for stored, _ in here}
    skills = (skill,) if skill else ()
    answer = registry.search(Query(base=found.facts.name, skills=skills, limit=COUNTED))
    # A mixture is made of what is asked for here.
    without = [a for a in answer.adapters if a.id not in ids and not _mixed(a)]
    having = f" with the skill {skill!r}" if skill else ""
    if not here and not answer.adapters:
        raise UnknownRef(
            f"the registry has no adapter of {found.facts.name}{having}",
            hint=f"lorareg add FOLDER --base {found.facts.name}, or lorareg sync --base ID",
        )
    least = "at least " if answer.more else ""
    elsewhere = f"; {others} on other weights of that name" if others else ""
    if not here and not without:
        raise UnknownRef(
            f"{found.facts.name} has mixtures only{having}, and they are made of what prompts are "
            "sent to",
            hint="add or train adapters of it",
        )
    if not here:
        raise UnknownRef(
            f"none of the {least}{len(without)} adapters of {found.facts.name}{having} has a "
            f"centroid on it{elsewhere}",
            hint=_learn(without[0].ref, written),
        )
    if without:
        names = ", ".join(a.record.name for a in without[:_NAMED])
        more = ", …" if len(without) > _NAMED else ""
        progress.say(
            f"{least}{len(without)} more of {found.facts.name} have no centroid and take no part: "
            f"{names}{more}; {_learn(without[0].ref, written)}"
        )


def _learn(ref: str, written: str) -> str:
    return f"lorareg route --learn {ref} --rows rows.jsonl --base {written}"


def _vector(one: CentroidRecord) -> Any:
    import numpy
    import torch

    return torch.from_numpy(numpy.frombuffer(one.vector, "<f4").astype("f4"))
