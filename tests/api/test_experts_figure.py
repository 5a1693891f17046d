"""The picture in a MixLoRA's card: a map of its experts' loads above the coloured text."""

import pytest

from lorahub_registry.api.gates_figure import draw
from lorahub_registry.api.voices import PALETTE, Voices, shade


def spoken(experts, layers):
    line = tuple(1.0 if i == 0 else 0.0 for i in range(experts))
    said = {f"model.layers.{n}": [line, line] for n in range(layers)}
    return Voices(tuple(f"$expert {i}" for i in range(experts)), (" a", " b"), 1, said)


@pytest.mark.parametrize(("experts", "layers"), [(4, 5), (20, 40)])
def test_each_expert_has_a_line_and_each_layer_a_column(experts, layers):
    loads = {
        f"model.layers.{n}": tuple((i + n) % experts / experts for i in range(experts))
        for n in range(layers)
    }
    figure = draw(spoken(experts, layers), loads, "the rows", "a row", loads=True)
    figure.canvas.draw()
    above, below = figure.axes
    [image] = above.images
    assert image.get_array().shape == (experts, layers)
    assert image.get_array()[1].tolist() == [line[1] for line in loads.values()]
    assert image.get_clim() == (0, 1)
    assert above.get_title("right") == "share of the tokens of the rows"
    assert len(above.get_xticks()) <= 20
    names = [label.get_text() for label in above.get_yticklabels()]
    assert names[:2] == (["$expert 0", "$expert 1"] if experts == 4 else ["$expert 0", "$expert 2"])
    told = [text.get_text() for text in above.texts]
    assert told == ([f"{v:.0%}" for i in range(4) for v in image.get_array()[i]] * (experts == 4))
    from matplotlib.colors import to_hex

    grounds = {to_hex(patch.get_facecolor()).upper() for patch in below.patches}
    assert grounds == {shade(PALETTE[0], 1.0)}
