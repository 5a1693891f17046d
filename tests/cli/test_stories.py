"""Real adapters on a real base: a mixture that wins, and one that must say it does not."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

NAMES = ("zog", "arr", "upper", "shakespeare")

pytestmark = [pytest.mark.data, pytest.mark.xdist_group("stories")]


def _recipe(kitchen, data, task, *, budget, train, test=None):
    test_rows = {"path": str(data / f"tasks/stories/{task}/test.jsonl")}
    if test:
        test_rows["limit"] = test
    return kitchen.recipe(
        name=task,
        base=str(data / "models/stories260k"),
        adapters=[str(data / f"adapters/stories260k/{name}") for name in NAMES],
        method={"type": "learn", "budget": budget},
        data={
            "train": {"path": str(data / f"tasks/stories/{task}/train.jsonl"), "limit": train},
            "test": test_rows,
        },
        device="cpu",
    )


def test_two_skills_at_once_are_a_win_that_is_proven(lorareg, kitchen, data):
    recipe = _recipe(kitchen, data, "zog_arr", budget=40, train=64)
    done = lorareg("compose", recipe)
    results = kitchen.results()
    nll = {row["name"]: row["nll"] for row in results["test"]}
    expected = {
        "base": 2.844, "zog": 2.590, "arr": 1.548, "upper": 10.086, "shakespeare": 3.604,
        "uniform average": 2.921,
    }  # fmt: skip
    for name, value in expected.items():
        assert nll[name] == pytest.approx(value, abs=0.0006), name
    assert nll["mixture"] == pytest.approx(1.461, abs=0.015)
    assert results["verdict"]["win"]
    assert results["verdict"]["against"] == "arr"
    coefficients = {m["name"]: m["coefficient"] for m in results["members"]}
    assert coefficients["zog"] > 0.4
    assert coefficients["arr"] > 0.6
    # stdout: coefficients, the table, the verdict.
    assert done.lines[-1].startswith("zog_arr beats the best single adapter, arr, by 0.0")
    [shown] = [line.split() for line in done.lines if line.startswith("mixture ")]
    assert float(shown[1]) == round(nll["mixture"], 4)
    assert "on 200 held-out rows of zog_arr" in done.lines
    card = (kitchen.out / "README.md").read_text()
    assert "**Verdict:** beats the best single adapter, arr" in card
    stored = lorareg("show", "zog_arr", "--json").json
    measured = {score["task"]: score["value"] for score in stored["scores"]}
    assert measured["zog_arr"] == pytest.approx(nll["mixture"])
    assert measured["zog_arr, base"] == pytest.approx(nll["base"])
    _loads_in_stock_peft(kitchen, data)


def _loads_in_stock_peft(kitchen, data):
    """It does there what its verdict was given for."""
    place = data / "models/stories260k"
    base = AutoModelForCausalLM.from_pretrained(place)
    ids = AutoTokenizer.from_pretrained(place)("Once upon a time", return_tensors="pt")
    with torch.inference_mode():
        before = base(**ids).logits
        after = PeftModel.from_pretrained(base, str(kitchen.out))(**ids).logits
    assert (after - before).abs().max() > 1


def test_where_one_adapter_is_best_it_says_so_and_whose_it_is(lorareg, kitchen, data):
    recipe = _recipe(kitchen, data, "zog_upper", budget=16, train=12, test=40)
    done = lorareg("compose", recipe)
    verdict = kitchen.results()["verdict"]
    assert not verdict["win"]
    assert verdict["against"] == "upper"
    assert done.lines[-1].startswith("zog_upper is no better than upper: use upper (the mixture's ")
    assert "**Verdict:** no better than upper: use upper" in (kitchen.out / "README.md").read_text()
    assert lorareg("show", "zog_upper", "--json").json["mixture"]["verdict"] == verdict["text"]
