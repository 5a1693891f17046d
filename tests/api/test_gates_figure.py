"""The picture in a dynamic mixture's card: what stands in it, and that it is there."""

import dataclasses

import pytest

import lorahub_registry as lr
from lorahub_registry.api.gates_figure import MOST, _page, draw
from lorahub_registry.api.voices import PALETTE, Voices, shade


def spoken(adapters, layers, tokens, prompt):
    lines = [
        tuple(float((t + i) % adapters) / adapters for i in range(adapters)) for t in range(tokens)
    ]
    said = {f"model.layers.{n}": lines for n in range(layers)}
    names = tuple(f"_$x^${i}" for i in range(adapters))
    # No formula, though it looks like a broken one.
    text = (" $x^$", *(f" t{i}" for i in range(1, tokens)))
    return Voices(names, text, prompt, said)


def _drawn(figure):
    figure.canvas.draw()
    above, below = figure.axes
    return above, below, [t.get_text() for t in below.texts]


@pytest.mark.parametrize(("adapters", "layers"), [(2, 2), (8, 80), (12, 12)])
def test_the_picture_has_a_line_for_each_adapter_and_the_whole_text(adapters, layers):
    voices = spoken(adapters, layers, 60, 30)
    above, below, texts = _drawn(draw(voices, voices.means(), "", "a row"))
    drawn = [line for line in above.lines if len(line.get_xdata()) == layers]
    assert len(drawn) == adapters
    for i, line in enumerate(sorted(drawn, key=lambda one: one.get_zorder())):
        assert len(set(line.get_ydata())) == 1, i
    names = [t.get_text() for t in above.get_legend().get_texts()]
    assert names[0] == "_$x^$0"
    assert len(names) == min(adapters, 9)
    assert len(above.get_xticks()) <= 20
    assert "".join(texts) == "".join(voices.tokens)
    bold = [t.get_text() for t in below.texts if t.get_weight() == "bold"]
    assert bold == list(voices.tokens[30:])


def test_tokens_stand_on_the_colour_of_who_leads():
    voices = dataclasses.replace(
        spoken(2, 1, 3, 1), layers={"model.layers.0": [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]}
    )
    _, below, _ = _drawn(draw(voices, voices.means(), "", "a row"))
    from matplotlib.colors import to_hex

    grounds = [to_hex(patch.get_facecolor()).upper() for patch in below.patches]
    assert grounds == [shade(PALETTE[0], 1.0), shade(PALETTE[1], 1.0), "#FFFFFF"]


def test_of_a_long_text_the_border_of_prompt_and_answer_is_shown():
    voices = spoken(2, 2, 900, 500)
    _, below, texts = _drawn(draw(voices, voices.means(), "", "a row"))
    assert len(texts) == MOST
    assert " t499" in texts
    bold = [t.get_text() for t in below.texts if t.get_weight() == "bold"]
    assert bold[0] == " t500"


def test_lines_of_text_are_not_too_long_and_words_stay_whole():
    assert _page([" word"] * 19 + [" sp", "lit"])[-2:] == [(19, 1, 0, " sp"), (20, 1, 3, "lit")]
    tokens = [" one", "half", "\n", " 日本", "x" * 230, *[" word"] * 60]
    page = _page(tokens)
    assert page[0] == (0, 0, 0, " one")
    assert page[1] == (1, 0, 4, "half")
    assert page[2][3] == "↵"
    assert page[3] == (3, 1, 0, " 日本")
    assert page[4][2] == 5 or page[4][1] == 2  # two columns for each of these letters
    assert max(column + len(text) for _, _, column, text in page) <= 100
    assert "".join(text for *_, text in page) == "".join(tokens).replace("\n", "↵")


@pytest.mark.parametrize("method", [
    {"type": "lora_flow", "training": {"max_steps": 2}},
    {"type": "arrow"},
])  # fmt: skip
def test_compose_puts_the_picture_into_folder_and_card(method, kitchen):
    lr.compose(kitchen.recipe(method=method))
    image = (kitchen.out / "gates.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    card = (kitchen.out / "README.md").read_text()
    assert "](gates.png)" in card
    from lorahub_registry.hub.publishable import collect

    files, _ = collect(kitchen.out)
    assert "gates.png" in [file.name for file in files]
    lr.compose(kitchen.recipe(method=method), force=True)
    assert (kitchen.out / "gates.png").read_bytes() == image
