"""Inspect: compare, and what ``show --weights`` prints."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from lorahub_registry.cli.output import Output, clean, with_output

if TYPE_CHECKING:
    from lorahub_registry.api.inspect import Comparison
    from lorahub_registry.api.models import ModelDifference
    from lorahub_registry.weights.compare import Pair
    from lorahub_registry.weights.inspect import Weights

_MARKS = "▁▂▃▄▅▆▇█"
_WORST = 3
_DROWNED = 0.9  # from here on the softer one's skill was lost, see weights/compare.py


@click.command()
@click.argument("refs", nargs=-1, required=True, metavar="REF REF…")
@with_output
def compare(refs: tuple[str, ...], out: Output) -> None:
    """See how adapters get on, or what differs between two models.

    Which adapter gets into another's way can be seen before they are mixed. REF is a folder, a
    name, or a Hub ref that was pulled; two or more. Nothing is run: all comes from the adapters'
    own factors. Of two models, the base first, it tells what was changed, module by module, and
    how well an extracted LoRA would hold it.

    Interference of B on A: for inputs that A's modules read, how loud B answers there, as a
    multiple of A's own answer. On two small models, adapters that felt 0.9 or more lost their
    skill in a plain sum: give the louder one a smaller coefficient, or let `learn` find one. Of
    two equally loud adapters it does not tell which fits better.

    Cosine: 1 where both change the weights alike, 0 where they have nothing in common, below 0
    where they pull against each other.

    Quiet prints a line for each ordered pair, the worst first: A, B, and what A feels of B.

    \b
    Examples:
      lorareg compare zog upper
      lorareg compare ./adapters/zog ./adapters/arr ./adapters/upper --json
      lorareg compare mistralai/Mistral-7B-v0.1 Open-Orca/Mistral-7B-OpenOrca
    """
    if len(refs) < 2:
        raise click.UsageError("one alone cannot be compared: name two or more")
    from lorahub_registry.api.inspect import compare as run
    from lorahub_registry.api.models import difference, is_model
    from lorahub_registry.registry.store import Registry

    with Registry(progress=out) as registry:
        whole = [ref for ref in refs if is_model(ref, registry)]
        if whole:
            if len(whole) < len(refs) or len(refs) > 2:
                raise click.UsageError(
                    f"{whole[0]} is a model: it is compared with one other model"
                )
            _print_models(difference(*refs, registry=registry, progress=out), out)
            return
        found = run(refs, registry=registry, progress=out)
    ordered = _ordered(found)
    lines = [f"{clean(on)} {clean(by)} {_number(felt)}" for felt, on, by, _ in ordered]
    out.record(_facts(found), _page(found), quiet="\n".join(lines))


def weights_facts(weights: Weights) -> dict[str, Any]:
    """An adapter's weights as JSON holds them."""
    from lorahub_registry.weights.inspect import Place

    return {
        "norm": weights.norm,
        "effective_rank": weights.effective_rank,
        "energy_by_rank": list(weights.energy_by_rank),
        "modules": [
            {
                "name": m.name,
                **_place(Place.of(m.name)),
                "rank": m.rank,
                "out": m.shape[0],
                "in": m.shape[1],
                "norm": m.norm,
                "effective_rank": m.effective_rank,
                "singular_values": list(m.singular_values),
                "energy_by_rank": list(m.energy_by_rank),
            }
            for m in weights.modules
        ],
    }


def weights_page(weights: Weights) -> str:
    """An adapter's weights for people: in words, and as a picture of norms."""
    from lorahub_registry.weights.inspect import rank_for

    shares = weights.energy_by_rank
    if not shares:
        return "weights     all deltas are zero: it changes nothing"
    kept = [f"{share:.0%} in rank {rank_for(share, shares)}" for share in (0.5, 0.9, 0.99)]
    modules = {m.name: m for m in weights.modules}
    title = f"weights     norm {weights.norm:.4g}, in {len(modules)} modules"
    rank = f"effective   rank {weights.effective_rank:.1f} in the mean module"
    energy = f"energy      {', '.join(kept)} of {len(shares)}"

    def notes(names: Sequence[str]) -> str:
        norm = math.hypot(*(modules[n].norm for n in names))
        rank = sum(modules[n].effective_rank for n in names) / len(names)
        return f"{norm:>7.3g} {rank:>9.1f}"

    norms = {name: m.norm for name, m in modules.items()}
    picture = _strips(norms, notes, f"{'norm':>7} {'eff. rank':>9}")
    return "\n".join([title, rank, energy, *picture])


def _print_models(found: ModelDifference, out: Output) -> None:
    """Two models: the difference's norms as a picture, and what a LoRA of it would keep."""
    kept = found.kept
    facts = {
        "base": found.base,
        "tuned": found.tuned,
        "kept_by_rank": {str(rank): share for rank, share in kept.items()},
        "outside": found.outside,
        "rest": found.rest,
        **weights_facts(found.weights),
    }
    for module in facts["modules"]:
        module["relative_norm"] = found.relative[module["name"]]
    shares = sorted(share for share in found.relative.values() if share is not None)
    middle = shares[len(shares) // 2] if shares else math.nan
    lines = [
        f"difference  {clean(found.tuned)} - {clean(found.base)}",
        weights_page(found.weights),
        f"relative    {middle:.2%} of the base's norm in the middle module",
        f"outside     {found.outside:.2%} of the energy"
        + (f": {found.words}" if found.words else ""),
        "extraction  "
        + ", ".join(f"rank {rank} keeps {share:.1%}" for rank, share in kept.items()),
    ]
    quiet = "\n".join(f"{rank} {share:.4f}" for rank, share in kept.items())
    out.record(facts, "\n".join(lines), quiet=quiet)


def _facts(found: Comparison) -> dict[str, Any]:
    pairs = []
    for pair in found.pairs:
        layers = pair.by_layer()
        names = found.names[pair.first], found.names[pair.second]
        pairs.append(
            {
                "adapters": list(names),
                "cosine": pair.cosine,
                "interference": dict(zip(names, pair.interference, strict=True)),
                "norms": dict(zip(names, pair.norms, strict=True)),
                "shared_modules": len(pair.meetings),
                "own_modules": dict(zip(names, pair.alone, strict=True)),
                "layers": [
                    {"stack": stack, "layer": layer,
                     "interference": dict(zip(names, felt, strict=True))}
                    for (stack, layer), felt in layers.items()
                ],
                "modules": [
                    {"name": m.module, "cosine": m.cosine,
                     "interference": dict(zip(names, m.interference, strict=True)),
                     "norms": dict(zip(names, m.norms, strict=True))}
                    for m in pair.meetings
                ],
            }
        )  # fmt: skip
    adapters = [{"name": n, "id": k} for n, k in zip(found.names, found.keys, strict=True)]
    return {"adapters": adapters, "pairs": pairs}


def _page(found: Comparison) -> str:
    count = len(found.names)
    felt: dict[tuple[int, int], float | None] = {}
    cosines: dict[tuple[int, int], float | None] = {}
    shared: dict[tuple[int, int], int] = {}
    for p in found.pairs:
        felt[p.first, p.second], felt[p.second, p.first] = p.interference
        for at in ((p.first, p.second), (p.second, p.first)):
            cosines[at], shared[at] = p.cosine, len(p.meetings)
    norms = {i: n for p in found.pairs for i, n in zip((p.first, p.second), p.norms, strict=True)}
    width = max(len(clean(name)) for name in found.names)
    lines = [f"{n + 1:>3}  {clean(found.names[n]):<{width}}  norm {norms[n]:.4g}"
             for n in range(count)]  # fmt: skip
    tables: list[tuple[str, Mapping[tuple[int, int], float | None]]] = [
        ("interference: what a row feels of a column", felt),
        ("cosine", cosines),
    ]
    if any(pair.alone != (0, 0) for pair in found.pairs):
        tables.append(("modules that both change", shared))
    else:
        lines += ["", f"all change the same {len(found.pairs[0].meetings)} modules"]
    for title, cells in tables:
        lines += ["", title, "     " + "".join(f"{n + 1:>7}" for n in range(count))]
        for i in range(count):
            row = "".join(f"{_number(cells.get((i, j), 0), i == j):>7}" for j in range(count))
            lines.append(f"{i + 1:>3}  {row}")
    drowned = [worst for worst in _ordered(found) if worst[0] >= _DROWNED]
    for loud, on, by, pair in drowned[:_WORST]:
        lines += ["", *_worst(loud, clean(on), clean(by), pair, found.names[pair.first] == on)]
    if len(drowned) > _WORST:
        rest = ", ".join(f"{clean(on)} by {clean(by)}" for _, on, by, _ in drowned[_WORST:])
        lines += ["", f"and drowned as well: {rest}"]
    return "\n".join(lines)


def _worst(felt: float, on: str, by: str, pair: Pair, on_first: bool) -> list[str]:
    side = 0 if on_first else 1
    values = {m.module: m.interference[side] for m in pair.meetings}
    layers = [(f[side] or 0.0, at) for at, f in pair.by_layer().items() if f[side] is not None]
    most = sorted(layers, key=lambda x: (-x[0], x[1][0], x[1][1] or 0))[:3]
    where = ", ".join(
        f"{stack}.{layer}" if layer is not None else "outside the layers"
        for _, (stack, layer) in most
    )
    says = f"{by} drowns {on}: {felt:.2f} times as loud where {on} reads, most in {where}"
    return [says, *_strips({n: v for n, v in values.items() if v is not None})]


def _ordered(found: Comparison) -> list[tuple[float, str, str, Pair]]:
    """(interference, on whom, of whom, pair), the worst first; what changes nothing feels none."""
    rows = []
    for pair in found.pairs:
        first, second = found.names[pair.first], found.names[pair.second]
        on_first, on_second = pair.interference
        rows += [(on_first or 0.0, first, second, pair), (on_second or 0.0, second, first, pair)]
    return sorted(rows, key=lambda row: (-row[0], row[1], row[2]))


def _strips(
    values: Mapping[str, float], notes: Any = lambda names: "", head: str = ""
) -> list[str]:
    """A line for each kind of module, a mark for each layer; all on one scale from 0."""
    from lorahub_registry.weights.inspect import by_kind

    rows = by_kind(values)
    labels = [clean(row.label) for row in rows]
    sides = [notes([n for n in row.modules if n]) for row in rows]
    width = max(map(len, labels))
    before = 2 + width + 2 + len(sides[0]) + (2 if sides[0] else 0)
    room = max(8, shutil.get_terminal_size((100, 24)).columns - before)
    marks = _marks()
    top = max(values.values(), default=0.0) or 1.0
    folded = max(-(-len(row.modules) // room) for row in rows)
    scale = f"by layer, {marks[-1]} = {top:.3g}"
    if folded > 1:
        scale += f", the largest of every {folded}"
    lines = [f"  {'':<{width}}  " + (f"{head}  " if head else "") + scale]
    for label, side, row in zip(labels, sides, rows, strict=True):
        cells = [values.get(name) if name else None for name in row.modules]
        parts = [cells[i : i + folded] for i in range(0, len(cells), folded)]
        strip = "".join(_mark([v for v in part if v is not None], top, marks) for part in parts)
        lines.append(f"  {label:<{width}}  " + (f"{side}  " if side else "") + strip)
    return lines


def _mark(values: Sequence[float], top: float, marks: str) -> str:
    if not values:
        return "·" if marks == _MARKS else "."
    return marks[min(len(marks), max(1, math.ceil(len(marks) * max(values) / top))) - 1]


def _marks() -> str:
    """Blocks, or digits where the output cannot show them."""
    try:
        (_MARKS + "·").encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return "12345678"
    return _MARKS


def _number(value: float | None, diagonal: bool = False) -> str:
    if diagonal or value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _place(place: Any) -> dict[str, Any]:
    return {"stack": place.stack, "layer": place.layer, "kind": place.kind}
