"""The picture of a dynamic mixture in its card: who speaks in which layer, and at which token."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub_registry.adapters.dynamic import FOLDER
from lorahub_registry.api.listen import listen
from lorahub_registry.api.listen_experts import listen_experts
from lorahub_registry.api.prepare import Prepared
from lorahub_registry.api.voices import (
    OTHERS,
    Line,
    Voices,
    colours,
    loudest,
    shade,
    strengths,
)
from lorahub_registry.card import GATES_NAME

if TYPE_CHECKING:
    from lorahub_registry.evaluate.base import LoadedBase

MOST = 320
"""So many tokens of a text are shown: half a page, the border of prompt and answer among them."""
_COLUMNS, _POINTS, _LINE = 100, 9, 0.2
_WIDTH = _COLUMNS * 0.602 * _POINTS / 72
"""Of the text in inches; a letter of DejaVu Sans Mono is 0.602 of its size wide."""


def draw_gates(folder: Path, results: Mapping[str, Any], ready: Prepared, base: LoadedBase) -> None:
    """Write the picture of the mixture in ``folder``, as a PNG.

    Above, each adapter's mean coefficient, layer by layer: over the training rows as
    ``results["routing"]`` has it, or where there are none over the text. Below, one row, each
    token on the colour of the adapter that was the loudest: the first held-out row, or else the
    first training row. A recipe without rows has no picture, and neither has a router of prompts,
    which says the same in every layer and at every token. Of a MixLoRA the part above is a map:
    which share of a layer's tokens each expert gets.
    """
    from lorahub_registry.evaluate.rows import tokenise
    from lorahub_registry.evaluate.stock import stock_peft
    from lorahub_registry.weights.dynamic import read_dynamic

    split, rows = ("held-out", ready.test) if ready.test else ("training", ready.train)
    if not rows or results["routing"]["type"] == "prompt_router":
        return
    data = ready.recipe.data
    [row] = tokenise(rows[:1], data, base.tokenizer, seq2seq=base.seq2seq, drop=False).rows
    loads = results["routing"].get("load")
    with stock_peft(base, folder / FOLDER) as model:
        if loads:
            names = [member["name"] for member in results["members"]]
            voices = listen_experts(model, base.tokenizer, names, row.prompt, row.output)
        else:
            dynamic = read_dynamic(folder / FOLDER)
            voices = listen(model, base.tokenizer, dynamic, row.prompt, row.output)
    said = loads or results["routing"]["mean"]
    means = {
        layer: tuple(each.get(name) for name in voices.adapters) for layer, each in said.items()
    }
    over = f"the {results['tokens']['train']['rows']} training rows" if ready.train else ""
    figure = draw(
        voices, means if ready.train else voices.means(), over, f"first {split} row",
        loads=bool(loads),
    )  # fmt: skip
    with warnings.catch_warnings():
        # Of a script that the font lacks, boxes are drawn; their colours still tell.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure.savefig(folder / GATES_NAME, format="png", dpi=110, metadata={"Software": None})


def draw(
    voices: Voices, means: Mapping[str, Line], over: str, text: str, *, loads: bool = False
) -> Any:
    """The figure.

    Args:
        means: layer → each adapter's mean coefficient.
        over: what they are means over; empty where it is the text below.
        text: what the text is called.
        loads: ``means`` are shares of the layer's tokens that each expert is chosen by.
    """
    # Late, and without a display: half a second that only a dynamic mixture takes.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = _shown(voices)
    lines = voices.at()[shown]
    hues = colours(len(voices.adapters), lines)
    page = _page(voices.tokens[shown])
    high = _LINE * (1 + max(line for _, line, _, _ in page))
    legend = _legend(voices.adapters, hues)
    across = max(1, _COLUMNS // (6 + max(len(name) for name, _ in legend)))
    top = 0.35 + 0.21 * -(-len(legend) // across)
    height = top + 2.2 + 0.8 + high + 0.1
    width = 0.75 + _WIDTH + 0.15
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    box = (0.75 / width, 1 - (top + 2.2) / height, _WIDTH / width, 2.2 / height)
    axes = figure.add_axes(box)
    if loads:
        _draw_loads(axes, means, voices.adapters)
    else:
        _draw_layers(axes, means, hues)
    axes.set_title(
        f"{'share of the tokens of' if loads else 'mean over'} {over or 'the text below'}",
        fontsize="small", loc="right", pad=3, color="#555",
    )  # fmt: skip
    marks = [axes.plot([], [], "s", color=hue, markersize=8)[0] for _, hue in legend]
    drawn = axes.legend(
        marks, ["·"] * len(legend), ncols=min(across, len(legend)), frameon=False,
        loc="lower left", bbox_to_anchor=(-0.02, 1.06), fontsize="small", borderaxespad=0,
    )  # fmt: skip
    # Given as labels, names that begin with an underscore would be left out.
    for label, (name, _) in zip(drawn.get_texts(), legend, strict=True):
        label.set_text(name)
        label.set_parse_math(False)

    below = figure.add_axes((0.75 / width, 0.1 / height, _WIDTH / width, high / height))
    below.set_axis_off()
    below.set_xlim(0, _COLUMNS)
    below.set_ylim(high / _LINE, 0)
    below.set_title(
        f"{text}, its answer in bold; coloured by the loudest adapter, the stronger the further it "
        "is ahead",
        fontsize="small", loc="left", pad=5,
    )  # fmt: skip
    grounds = [
        "#FFFFFF" if (first := loudest(line)[0]) is None else shade(hues[first], strength)
        for line, strength in zip(lines, strengths(lines), strict=True)
    ]
    _draw_text(below, page, grounds, voices.prompt - shown.start)
    return figure


def _shown(voices: Voices) -> slice:
    """The tokens that are shown: of a long text those about the border of prompt and answer."""
    total = len(voices.tokens)
    start = max(0, min(voices.prompt - MOST // 2, total - MOST))
    return slice(start, min(total, start + MOST))


def _legend(adapters: Sequence[str], hues: Sequence[str]) -> list[tuple[str, str]]:
    """(Name, colour); all that are grey have one entry."""
    found = [(n, hue) for n, hue in zip(adapters, hues, strict=True) if hue != OTHERS]
    if rest := len(adapters) - len(found):
        found.append((f"{rest} others", OTHERS))
    return [(name if len(name) <= 40 else f"{name[:39]}…", hue) for name, hue in found]


def _draw_layers(axes: Any, means: Mapping[str, Line], hues: Sequence[str]) -> None:
    """A line for each adapter; it breaks where another stack of layers begins."""
    stacks: dict[str, list[int]] = {}
    names = list(means)
    for i, name in enumerate(names):
        stacks.setdefault(name.rpartition(".")[0] if name else name, []).append(i)
    nothing = float("nan")
    for i, hue in sorted(enumerate(hues), key=lambda one: one[1] != OTHERS):
        values = [line[i] for line in means.values()]
        size = 4 if len(names) <= 40 else 2
        for stack in stacks.values():
            own = [nothing if (v := values[at]) is None else v for at in stack]
            axes.plot(stack, own, "o-", color=hue, markersize=size, linewidth=1.4)
    known = [v for line in means.values() for v in line if v is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    # What differs by less than a tenth is not to look like much.
    margin = max(0.05 * (high - low), (0.1 - (high - low)) / 2)
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_formatter("{x:.2f}")
    if low < 0:
        axes.axhline(0, color="#888888", linewidth=0.8)
    step = -(-len(names) // 20)
    ticks = [i for stack in stacks.values() for i in stack[::step]]
    axes.set_xticks(ticks, [names[i].rpartition(".")[2] or "–" for i in ticks], fontsize="small")
    axes.set_xlim(-0.5, len(names) - 0.5)
    words = [name or "outside the layers" for name in stacks]
    axes.set_xlabel("layer" if len(words) == 1 else "layers: " + " | ".join(words))
    axes.set_ylabel("mean coefficient")
    axes.grid(axis="y", linewidth=0.4)


def _draw_loads(axes: Any, loads: Mapping[str, Line], adapters: Sequence[str]) -> None:
    """A map: a line for each expert, a column for each layer, darker the more tokens it gets."""
    shares = [[line[i] or 0.0 for line in loads.values()] for i in range(len(adapters))]
    axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    names = [name.rpartition(".")[2] for name in loads]
    step = -(-len(names) // 20)
    axes.set_xticks(range(0, len(names), step), names[::step], fontsize="small")
    axes.set_xlabel("layer")
    every = -(-len(adapters) // 16)
    ticks = range(0, len(adapters), every)
    short = [name if len(name) <= 9 else f"{name[:8]}…" for name in adapters]
    axes.set_yticks(ticks, [short[i] for i in ticks], fontsize="x-small")
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    if len(names) > 16 or len(adapters) > 10:
        return
    for i, line in enumerate(shares):
        for at, share in enumerate(line):
            axes.text(
                at, i, f"{share:.0%}", ha="center", va="center", fontsize="x-small",
                color="white" if share > 0.6 else "black",
            )  # fmt: skip


def _page(tokens: Sequence[str]) -> list[tuple[int, int, int, str]]:
    """(Token, line, column, text) of what is drawn; words go to the next line whole."""
    words: list[list[tuple[int, str]]] = []
    for number, token in enumerate(tokens):
        for part in re.split(r"(\n)", token):
            clean = "".join(c if c.isprintable() else "�" for c in part.replace("\n", "↵"))
            for at in range(0, len(clean), _COLUMNS // 2):
                piece = clean[at : at + _COLUMNS // 2]
                if not words or piece[0] in " ↵" or words[-1][-1][1] == "↵":
                    words.append([])
                words[-1].append((number, piece))
    found, line, column = [], 0, 0
    for word in words:
        if column and column + sum(_wide(piece) for _, piece in word) > _COLUMNS:
            line, column = line + 1, 0
        for number, piece in word:
            if column + _wide(piece) > _COLUMNS:  # a word that is longer than a line
                line, column = line + 1, 0
            found.append((number, line, column, piece))
            column += _wide(piece)
        if word[-1][1] == "↵":
            line, column = line + 1, 0
    return found or [(0, 0, 0, "")]


def _wide(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _draw_text(
    axes: Any, page: Sequence[tuple[int, int, int, str]], grounds: Sequence[str], answer: int
) -> None:
    from matplotlib.patches import Rectangle

    for number, line, column, piece in page:
        axes.add_patch(
            Rectangle((column, line), _wide(piece), 0.94, color=grounds[number], linewidth=0)
        )
        axes.text(
            column, line + 0.47, piece, family="DejaVu Sans Mono", fontsize=_POINTS,
            va="center_baseline", parse_math=False,
            weight="bold" if number >= answer else "normal",
        )  # fmt: skip
