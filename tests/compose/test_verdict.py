"""The verdict's words: a win only beyond two standard errors, else an honest no."""

from __future__ import annotations

import pytest
import torch
import yaml

from lorahub_registry.compose.rivals import rival_name
from lorahub_registry.compose.verdict import PLAIN, judge
from lorahub_registry.evaluate.nll import RowNLL
from lorahub_registry.recipes.learned import Learn
from lorahub_registry.recipes.routed import Arrow, LoraFlow

ROWS = 100
NOISE = torch.randn(ROWS, generator=torch.Generator().manual_seed(0)).double()
NOISE -= NOISE.mean()
NOISE /= NOISE.std()


def at(mean: float, noise: float = 0.0) -> RowNLL:
    """One token a row, with this mean; differences between two have a known spread."""
    return RowNLL(torch.full((ROWS,), mean, dtype=torch.float64) + noise * NOISE, torch.ones(ROWS))


def scores(mixture: RowNLL, *, base: float = 3.0, uniform: float = 2.5) -> dict[str, RowNLL]:
    return {
        "base": at(base), "zog": at(2.6), "arr": at(1.5), "uniform average": at(uniform),
        "mixture": mixture,
    }  # fmt: skip


def test_a_win_is_over_the_best_single_adapter() -> None:
    found = judge(scores(at(1.4, 0.2)), ["zog", "arr"])
    assert found.win
    assert found.against == "arr"
    assert found.difference == pytest.approx(-0.1)
    assert found.stderr == pytest.approx(0.02)
    assert found.text == "beats the best single adapter, arr, by 0.100 ± 0.020 NLL"


@pytest.mark.parametrize(
    ("difference", "noise", "win"),
    [
        (-0.1, 0.49, True),  # two standard errors are 0.098
        (-0.1, 0.51, False),  # … 0.102
        (-0.001, 0.0, True),
        (0.0, 0.0, False),
        (0.1, 0.0, False),
    ],
)
def test_the_line_is_two_standard_errors(difference: float, noise: float, win: bool) -> None:
    assert judge(scores(at(1.5 + difference, noise)), ["zog", "arr"]).win is win


def test_no_better_names_what_to_use() -> None:
    found = judge(scores(at(1.55, 0.2)), ["zog", "arr"])
    assert not found.win
    assert found.text == "no better than arr: use arr (the mixture's NLL is 0.050 ± 0.020 higher)"


def test_the_base_is_named_where_it_beats_every_adapter() -> None:
    found = judge(scores(at(1.45), base=1.2), ["zog", "arr"])
    assert (found.win, found.against) == (False, "base")
    assert found.text.startswith(
        "no better than the base: use the base (the mixture's NLL is 0.250"
    )
    found = judge(scores(at(1.0, 0.2), base=1.2), ["zog", "arr"])
    assert found.text == "beats the base by 0.200 ± 0.020 NLL"


def test_a_base_as_good_as_the_best_adapter_is_preferred() -> None:
    assert judge(scores(at(2.0), base=1.5), ["zog", "arr"]).against == "base"


def test_a_win_no_better_than_the_uniform_average_says_so() -> None:
    found = judge(scores(at(1.4, 0.2), uniform=1.42), ["zog", "arr"])
    assert found.win
    assert found.text.endswith(
        "; it is no better than the uniform average (the mixture's NLL is 0.020 ± 0.020 lower, "
        "within 2 standard errors)"
    )
    assert "uniform" not in judge(scores(at(1.4, 0.2), uniform=1.5), ["zog", "arr"]).text


def test_one_row_is_no_proof() -> None:
    one = {k: RowNLL(v.sums[:1], v.tokens[:1]) for k, v in scores(at(0.1)).items()}
    found = judge(one, ["zog", "arr"])
    assert not found.win
    assert "nan" not in found.text


def test_an_adapter_without_finite_loss_is_not_the_best() -> None:
    broken = {**scores(at(1.4)), "zog": at(float("nan")), "arr": at(float("inf"))}
    assert judge(broken, ["zog", "arr"]).against == "base"
    broken["arr"] = at(1.5)
    assert judge(broken, ["zog", "arr"]).against == "arr"


def test_pairing_decides_and_not_the_spread_of_either() -> None:
    noisy = {k: RowNLL(v.sums + 30 * NOISE, v.tokens) for k, v in scores(at(1.4, 0.2)).items()}
    assert judge(noisy, ["zog", "arr"]).win


STATIC = "learned static coefficients (per layer)"


def decides(
    mixture: RowNLL, *, uniform: float = 2.5, static: float = 1.45, plain: float = 1.6
) -> dict[str, RowNLL]:
    """A dynamic mixture's scores; ``arr`` alone is at 1.5."""
    return scores(mixture, uniform=uniform) | {STATIC: at(static), PLAIN: at(plain)}


def test_one_that_decides_has_to_beat_the_best_of_all_that_is_simpler() -> None:
    found = judge(decides(at(1.4, 0.2)), ["zog", "arr"])
    assert (found.win, found.against) == (True, STATIC)
    assert found.text == f"beats the {STATIC}, the best of all else, by 0.050 ± 0.020 NLL"
    found = judge(decides(at(1.4, 0.2), static=1.55), ["zog", "arr"])
    assert (found.win, found.against) == (True, "arr")
    assert found.text.startswith("beats the best single adapter, arr, the best of all else, by 0.1")


@pytest.mark.parametrize(
    ("against", "changed"),
    [(STATIC, {"static": 1.41}), (PLAIN, {"plain": 1.41}), ("uniform average", {"uniform": 1.41})],
)
def test_it_does_not_win_by_beating_single_adapters_alone(
    against: str, changed: dict[str, float]
) -> None:
    found = judge(decides(at(1.4, 0.2), **changed), ["zog", "arr"])
    assert (found.win, found.against) == (False, against)
    use = f"the {against}"
    assert found.text.startswith(f"no better than {use}: use {use}")
    assert found.text.endswith(
        " (the mixture's NLL is 0.010 ± 0.020 lower, within 2 standard errors)"
    )
    assert ("which method" in found.text) == (against == STATIC)


def test_what_is_certainly_worse_is_called_worse() -> None:
    found = judge(decides(at(1.5, 0.2)), ["zog", "arr"])
    assert not found.win
    assert found.text == (
        f"worse than the {STATIC}: use the {STATIC}, which method: {{type: learn, optimizer: "
        "gradient, l1: 0, per: layer_group, layer_groups: 256} makes "
        "(the mixture's NLL is 0.050 ± 0.020 higher)"
    )
    assert judge(decides(at(1.48, 0.2)), ["zog", "arr"]).text.startswith("no better than the l")
    assert judge(decides(at(1.9), static=1.8), ["zog", "arr"]).text.startswith("worse than arr: u")
    base = decides(at(1.4)) | {"base": at(1.2)}
    text = judge(base, ["zog", "arr"]).text
    assert text.startswith("worse than the base: use the base (the mixture's")


def test_static_coefficients_are_named_with_the_recipe_that_makes_them() -> None:
    for method in (LoraFlow, Arrow):
        for learn in method().rivals:
            name = rival_name(learn)
            found = judge(scores(at(1.5)) | {name: at(1.4), PLAIN: at(1.6)}, ["zog", "arr"])
            assert f"worse than the {name}: use the {name}, which method: {{" in found.text
            said = found.text.partition("which ")[2].partition(" makes (")[0]
            assert Learn.model_validate(yaml.safe_load(said)["method"]) == learn


def test_a_noisy_one_that_is_not_the_best_is_named_beside_the_win() -> None:
    noisy = decides(at(1.4)) | {"zog": at(1.46, 0.5)}
    found = judge(noisy, ["zog", "arr"])
    assert (found.win, found.against) == (True, STATIC)
    assert found.text.endswith(
        "; it is no better than zog (the mixture's NLL is 0.060 ± 0.050 lower, "
        "within 2 standard errors)"
    )


def test_of_one_that_decides_one_row_is_no_proof_and_broken_ones_do_not_count() -> None:
    one = {k: RowNLL(v.sums[:1], v.tokens[:1]) for k, v in decides(at(0.1)).items()}
    found = judge(one, ["zog", "arr"])
    assert not found.win
    assert found.text.startswith("no better than")
    assert "nan" not in found.text
    broken = decides(at(1.4)) | {STATIC: at(float("nan"))}
    assert judge(broken, ["zog", "arr"]).against == "arr"
