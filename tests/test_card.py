"""From facts to a card: complete, escaped, and readable by what reads cards."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorahub_registry.adapters.readme import read_card
from lorahub_registry.card import cell, license_id, read_results, render, write_card
from lorahub_registry.errors import OutputError

RECIPE = "version: 1\nname: zog-arr\nbase: org/base\n"


def measured(name: str, kind: str, nll: float, exact: float | None = None) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "n": 200, "nll": nll, "nll_stderr": 0.01,
        "exact_match": exact, "exact_match_stderr": None if exact is None else 0.02,
    }  # fmt: skip


def facts(**more: Any) -> dict[str, Any]:
    """What ``results.json`` holds of a learned mixture with a proof."""
    return copy.deepcopy(
        {
            "name": "zog-arr",
            "base": {"name": "org/base", "revision": "b" * 40, "digest": "d0"},
            "method": {"type": "learn"},
            "form": "delta",
            "seq2seq": False,
            "auto_class": "AutoModelForCausalLM",
            "members": [
                {"name": "zog", "ref": "me/zog@" + "a" * 40, "digest": "d1", "coefficient": 0.75},
                {"name": "arr", "ref": "./arr", "digest": "d2", "coefficient": -0.125},
            ],
            "tokens": {"template": "{{ input }} ", "eos": False, "max_length": None},
            "output": {
                "rank": "full", "dtype": "float32", "energy_kept": 1.0, "energy_kept_least": 1.0,
                "cast_error": 0.0,
            },
            "notes": [],
            "license": "apache-2.0",
            "datasets": ["org/stories"],
            "task": "stories/zog_arr",
            "test": [
                measured("base", "base", 2.844),
                measured("zog", "adapter", 2.59),
                measured("arr", "adapter", 1.548),
                measured("uniform average", "uniform", 2.0),
                measured("mixture", "mixture", 1.462),
            ],
            "verdict": {"win": True, "text": "beats the best single adapter, arr, by 0.086"},
            **more,
        }
    )  # fmt: skip


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_says_verdict_coefficients_scores_and_pins() -> None:
    card = render(facts(), RECIPE)
    for said in (
        "**Verdict:** beats the best single adapter, arr, by 0.086.",
        "| zog | +0.7500 | me/zog@",
        "| arr | -0.1250 | ./arr |",
        "| base | 2.8440 ± 0.0100 | 200 |",
        "| **mixture** | 1.4620 ± 0.0100 | 200 |",
        "ΔW = Σ cᵢ·sᵢ·BᵢAᵢ",
        "without truncation",
        "`d1`",
        "OWNER/zog-arr",
        f'revision="{"b" * 40}"',
        RECIPE,
    ):
        assert said in card
    assert "Not evaluated" not in card
    assert "changed the delta" not in card
    assert "exact match" not in card


def test_a_card_says_which_method_changed_entries_and_what_truncation_cost() -> None:
    output = {
        "rank": 8, "dtype": "float32", "energy_kept": 0.91, "energy_kept_least": 0.8,
        "truncation_error": 0.3, "cast_error": 0.0,
    }  # fmt: skip
    about = {"title": "TIES", "summary": "Entries, merged.", "paper": "P", "link": "https://p"}
    method = {"type": "ties", "density": 0.4, "majority_sign_method": "total"}
    card = render(facts(form="entries", about=about, method=method, output=output), RECIPE)
    assert (
        "TIES on each module's ΔW (`density` 0.4, `majority_sign_method` total), after "
        "[P](https://p). Entries, merged." in card
    )
    assert "91.000% of the delta's energy" in card
    assert "an error of 30.000% of its norm." in card
    assert "exact weighted sum" not in card


def test_the_front_matter_is_what_the_hub_reads() -> None:
    card = render(facts(), RECIPE, repo="me/mix")
    assert front(card) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorareg", "merge", "base_model:adapter:org/base"],
        "license": "apache-2.0",
        "datasets": ["org/stories"],
        "model-index": [
            {
                "name": "zog-arr",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "stories/zog_arr", "type": "custom"},
                        "metrics": [
                            {"type": "nll", "name": "NLL per output token (nats)", "value": 1.462}
                        ],
                    }
                ],
            }
        ],
    }
    assert 'PeftModel.from_pretrained(base, "me/mix")' in card


def test_its_own_reader_reads_the_card_back() -> None:
    found = read_card(render(facts(), RECIPE))
    assert (found.problem, found.base, found.license) == ("", "org/base", "apache-2.0")
    assert found.scores == (("stories/zog_arr", "stories/zog_arr", "nll", 1.462),)
    assert found.title == "zog-arr"


def test_exact_match_stands_in_table_and_front_matter() -> None:
    rows = [measured("base", "base", 2.8, 0.0), measured("mixture", "mixture", 1.4, 0.125)]
    card = render(facts(test=rows, exact_match="greedy decoding"), RECIPE)
    assert "| **mixture** | 1.4000 ± 0.0100 | 12.5% ± 2.0 | 200 |" in card
    assert "Exact match: greedy decoding." in card
    metrics = front(card)["model-index"][0]["results"][0]["metrics"]
    assert [m["type"] for m in metrics] == ["nll", "exact_match"]


def test_an_unproven_mixture_says_so() -> None:
    unproven = facts()
    for key in ("test", "verdict"):
        del unproven[key]
    card = render(unproven, RECIPE)
    assert "**Not evaluated:**" in card
    assert "Verdict" not in card
    assert "model-index" not in front(card)


def test_limits_are_said() -> None:
    card = render(
        facts(
            license=None,
            base={"name": "tiny", "revision": None, "digest": "d0"},
            notes=["allow_base: zog was made for another base"],
            output={
                "rank": 8, "dtype": "bfloat16", "energy_kept": 0.9876, "energy_kept_least": 0.9,
                "cast_error": 0.0125,
            },
            form="factor",
            seq2seq=True,
        ),
        RECIPE,
    )  # fmt: skip
    for said in (
        "licence is unknown",
        "Its tensors' digest is `d0`",
        "allow\\_base: zog was made for another base",
        "rank `8` in bfloat16, which keeps 98.760%",
        "(90.000% in the module that lost most)",
        "Writing it in bfloat16 changed the delta by 1.250% of its norm.",
        "ΔW = s·(Σ cᵢBᵢ)(Σ cᵢAᵢ)",
        "outputs end with EOS",
    ):
        assert said in card
    assert "license" not in front(card)
    assert front(card)["pipeline_tag"] == "text2text-generation"


HOSTILE = "<script>alert(1)</script> | a | [x](http://evil) ![i](u) `b` **c** _d_ \n# h \x1b[31m"


def test_what_is_shown_is_escaped() -> None:
    said = facts(notes=[HOSTILE], name="m", task=HOSTILE)
    said["members"][0].update(name=HOSTILE, ref=HOSTILE)
    said["test"][1]["name"] = HOSTILE
    said["verdict"]["text"] = HOSTILE
    card = render(said, RECIPE)
    body = card.split("---\n", 2)[2]
    assert "<script>" not in body
    assert "\x1b" not in body
    assert not re.search(r"(?<!\\)\]\(", body)
    assert "\n# h" not in body
    tables = [line for line in body.splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {4}
    assert read_card(card).problem == ""


def test_a_base_with_an_odd_name_stays_inside_its_code() -> None:
    odd = 'x")\nimport os; os.system("ls")\n```\n<script>'
    whole = render(facts(base={"name": odd, "revision": None, "digest": "d"}), RECIPE)
    card = whole.split("\n---\n")[1]
    (line,) = [line for line in card.splitlines() if line.startswith("A mixture of")]
    assert '````x") import os; os.system("ls") ``` <script>````' in line
    code = card.split("```python\n")[1].split("\n```\n")[0]
    compile(code, "card", "exec")
    assert not [line for line in code.splitlines() if line.startswith("import os")]


def test_a_recipe_or_template_with_backticks_stays_inside_its_code() -> None:
    said = facts(tokens={"template": "```\n{{ input }}` <b>", "eos": False, "max_length": None})
    card = render(said, "name: x\nnote: |\n  ```\n  <script>\n")
    fence = next(line for line in card.splitlines() if line.endswith("yaml")).removesuffix("yaml")
    inside = card.split(f"{fence}yaml\n")[1]
    assert inside.index("<script>") < inside.index(f"\n{fence}\n")
    assert "```\n{{ input }}" not in card


def test_a_missing_fact_is_an_error_and_no_gap() -> None:
    for key in ("members", "method", "output", "tokens", "notes"):
        without = facts()
        del without[key]
        with pytest.raises(OutputError, match=r"README\.md, the card, cannot be written"):
            render(without, RECIPE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Apache-2.0", "apache-2.0"), ("mit", "mit"), ("my own, see below", "other"), ("", "other")],
)
def test_a_licence_is_written_as_the_hub_does(text: str, expected: str) -> None:
    assert license_id(text) == expected


def test_a_cell_holds_neither_markdown_nor_control_characters() -> None:
    assert cell("a|b") == r"a\|b"
    assert cell("<b>[x](y)*_`#\\") == r"\<b\>\[x\](y)\*\_\`\#\\"
    assert cell("a\n\t\x1bb") == "a   b"


def test_a_card_is_written_beside_its_facts(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(facts()))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    path = write_card(tmp_path, repo="me/x")
    assert path.name == "README.md"
    assert path.read_text("utf-8") == render(facts(), RECIPE, repo="me/x")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}"])
def test_results_that_are_none_are_told(tmp_path: Path, text: str) -> None:
    with pytest.raises(OutputError, match="nothing that lorareg mixed or trained"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(OutputError):
        read_results(tmp_path)


def test_a_loss_that_is_no_number_is_said_in_words() -> None:
    found = facts()
    found["test"][1]["nll"] = found["test"][1]["nll_stderr"] = None
    assert "| not finite |" in render(found, RECIPE)


def decides(routing: dict[str, Any], *, train: bool = True, **more: Any) -> dict[str, Any]:
    """What ``results.json`` holds of a mixture that decides while it runs."""
    rows = {"train": {"rows": 64, "output_tokens": 900, "prompts_cut": 0}} if train else {}
    found = facts(
        method={"type": routing["type"], "general": []},
        about={"title": "T", "summary": "S.", "paper": "P", "link": "https://p"},
        routing={
            "temperature": 1.0, "folder": "dynamic", "peft_type": "LORA_MIXTURE",
            "mean": {f"model.layers.{i}": {"zog": 0.75, "arr": -0.125} for i in range(2)},
            **routing,
        },
        seed=0,
        **more,
    )  # fmt: skip
    found["tokens"] |= rows
    found["test"].insert(-1, measured("plain LoRA with mean coefficients", "plain", 1.51))
    return found


FLOW = {"type": "lora_flow", "loss": [[1, 2.0], [2, 1.5]]}
TABLE = "| model.layers.1 | +0.7500 | -0.1250 |"


@pytest.mark.parametrize(
    ("routing", "said", "by_layer"),
    [
        ({**FLOW, "per": "layer"}, "with each layer's mean coefficients over the tokens", True),
        ({**FLOW, "per": "module"}, "with each module's mean coefficients over the tokens", True),
        ({"type": "arrow", "top_k": 2}, "with each module's mean coefficients over", True),
        ({**FLOW, "per": "model"}, "with each adapter's mean coefficient over the tokens", False),
        ({"type": "prompt_router", "top_k": 1, "layer": 2},
         "with each adapter's mean coefficient over the training rows; the longer a row", False),
    ],
)  # fmt: skip
def test_a_card_says_what_the_plain_lora_has_the_means_of(
    routing: dict[str, Any], said: str, by_layer: bool
) -> None:
    card = render(decides(routing), RECIPE)
    assert said in card
    assert (TABLE in card) is by_layer
    assert ("holds for every layer alike" in card) is not by_layer
    assert "no training rows" not in card
    assert "over the best of all other rows of the table" in card


@pytest.mark.parametrize(
    "routing",
    [{"type": "arrow", "top_k": 2}, {"type": "prompt_router", "top_k": 1, "layer": 2}],
)
def test_a_card_of_a_mixture_without_rows_says_so(routing: dict[str, Any]) -> None:
    card = render(decides(routing, train=False), RECIPE)
    assert "with the same coefficient for each: no rows told others." in card
    assert "There were no training rows, so the plain LoRA has the uniform average." in card
    assert TABLE not in card
    assert "holds for every layer alike" not in card


def test_the_front_matter_has_the_scores_of_what_the_root_holds() -> None:
    card = render(decides({**FLOW, "per": "layer"}), RECIPE)
    [metric] = front(card)["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == 1.51
    assert "| **mixture** | 1.4620 ± 0.0100 | 200 |" in card
