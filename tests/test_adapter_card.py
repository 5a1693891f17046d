"""The card of a trained adapter: what it does, how it was made, and what it was measured to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorahub_registry.adapters.readme import read_card
from lorahub_registry.adapters.skills import find_skills
from lorahub_registry.card import is_generated, metadata, read_results, render, write_card
from lorahub_registry.errors import OutputError
from lorahub_registry.recipes.template import PRESETS
from tests.test_card import HOSTILE, front
from tests.trained import FACTORY, SHA, results, split


def card(**more: Any) -> str:
    return render(results(**more), FACTORY)


def test_it_says_what_it_does_and_how_it_was_made() -> None:
    text = card()
    for said in (
        "# zog\n\nEvery name becomes Zog.\n\nA LoRA adapter for `tiny-llama`",
        "Skills: `names`, `translation:zog`.",
        "**Verdict:** beats the base by 1.88 ± 0.01 nats per output token.",
        "LoRA on 4 modules, 12,345 parameters: 24 optimizer steps (3 epochs), seed 7.",
        "shared its batches with 3 other adapters",
        "![Loss against steps](loss.png)",
        "In nats a token.\nTraining: 2.7500 at step 1, 0.5000 at step 24.",
        "Validation: 1.6250 at step 10, 0.7500 at step 20.",
        "| r | 4 |",
        "| target\\_modules | q\\_proj, v\\_proj |",
        "| use\\_dora | false |",
        "| learning\\_rate | 0.0002 |",
        f"| train | zog.jsonl | 128 | 9000 | 5000 | `{SHA}` |",
        f"| test | zog-test.jsonl | 200 | 9000 | 5000 | `{SHA}` |",
        "| base | 2.5000 ± 0.0100 | 0.0% ± 2.0 | 200 |",
        "| **zog** | 0.6250 ± 0.0100 | 87.5% ± 2.0 | 200 |",
        'PeftModel.from_pretrained(base, "OWNER/zog")',
        'template = "{{ input }} "\n',
        "Outputs have no EOS.",
        "| lorareg | 0.1 |",
        FACTORY,
    ):
        assert said in text
    for unsaid in ("max\\_steps", "loraplus", "was left out", "was stopped", "those of step",
                   "DoRA's", "twice the rank", "licence is unknown"):  # fmt: skip
        assert unsaid not in text


def test_the_front_matter_is_what_the_hub_reads() -> None:
    assert front(card()) == {
        "base_model": "tiny-llama",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorareg", "base_model:adapter:tiny-llama", "names", "translation:zog"],
        "license": "apache-2.0",
        "datasets": ["org/stories"],
        "model-index": [
            {
                "name": "zog",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "zog-test", "type": "custom"},
                        "metrics": [
                            {"type": "nll", "name": "NLL per output token (nats)", "value": 0.625},
                            {"type": "exact_match", "name": "Exact match", "value": 0.875},
                        ],
                    }
                ],
            }
        ],
    }


def test_its_own_reader_finds_the_user_s_words_and_skills_and_no_others() -> None:
    found = read_card(card(skills=["sql"], datasets=[]))
    assert (found.problem, found.title) == ("", "zog")
    assert found.description.startswith("Every name becomes Zog.")
    assert [(name, why) for name, _, why in find_skills(found)] == [("sql", "tag sql")]
    assert ("zog-test", "zog-test", "nll", 0.625) in found.scores
    everything = read_card(card(skills=[], datasets=[], description=""))
    assert find_skills(everything) == []


def test_one_that_was_not_measured_says_so() -> None:
    unproven = results(test=None)
    del unproven["verdict"]
    unproven["data"]["test"] = None
    text = render(unproven, FACTORY)
    assert "**Not evaluated:** its factory named no test rows" in text
    assert "Verdict" not in text
    assert "## Evaluation" not in text
    assert "model-index" not in front(text)
    assert "| test |" not in text


def test_early_stopping_and_what_data_lost_are_said() -> None:
    data = results()["data"] | {
        "train": split("zog.jsonl", dropped=1, cut=3),
        "validation": None,
        "test": split("org/stories", sha256=None),
    }
    text = card(stopped="early: no gain over 3 evaluations", best_step=20, data=data, together=1)
    assert "It was stopped early: no gain over 3 evaluations." in text
    assert "The weights are those of step 20, chosen by the loss" in text
    assert "1 row of train was left out: the output does not fit in 512 tokens." in text
    assert "3 prompts of train were longer than 512 tokens and lost the beginning." in text
    assert "| test | org/stories | 128 | 9000 | 5000 | – |" in text
    assert "| validation |" not in text
    assert "shared its batches" not in text


def test_plain_text_has_no_prompts() -> None:
    data = results()["data"] | {"train": split("text.jsonl", cut=2)}
    text = card(objective="lm", data=data)
    assert "the loss is that of every token but the first" in text
    assert "2 texts of train were longer than 512 tokens and became several pieces." in text
    assert "There is no prompt template" in text
    assert "template = " not in text


@pytest.mark.parametrize(
    "template", ["{{ a }}\n\n### Answer:\n", "```\n{{ input }}` <b>", '"{{ input }}" \\ ä\t']
)
def test_a_template_stands_there_exactly(template: str) -> None:
    text = card(tokens={"template": template, "max_length": None, "eos": True})
    [line] = [line for line in text.splitlines() if line.startswith("template = ")]
    names: dict[str, Any] = {}
    exec(line, names)
    assert names["template"] == template
    assert "Outputs end with EOS." in text


def test_a_template_with_a_name_is_written_out() -> None:
    text = card(tokens={"template": "alpaca", "max_length": None, "eos": True})
    assert "by this template (`alpaca`; Jinja over" in text
    [line] = [line for line in text.splitlines() if line.startswith("template = ")]
    assert json.loads(line.removeprefix("template = ")) == PRESETS["alpaca"]


def test_a_chat_template_is_the_tokenizer_s() -> None:
    text = card(tokens={"template": "chat", "max_length": None, "eos": True})
    assert "the tokenizer's own chat template" in text
    assert "template = " not in text


def test_limits_are_said() -> None:
    lora = results()["lora"] | {"use_dora": True}
    text = card(license=None, lora=lora, method="DoRA", notes=["loaded in 8 bits | <b>"])
    for said in (
        "- The licence is unknown.",
        "DoRA's magnitudes are in its file",
        f"Its tensors' digest is `{results()['base']['digest']}`",
        "- loaded in 8 bits \\| \\<b\\>.",
    ):
        assert said in text
    assert "license" not in front(text)
    begun = results()["lora"] | {"init_lora_weights": "pissa_niter_4"}
    assert "PiSSA's factors and is written as a plain LoRA of twice the rank, 8" in card(lora=begun)
    pinned = {"name": "org/base", "revision": "b" * 40, "digest": None}
    text = card(base=pinned)
    assert "local model" not in text
    assert f"| base | org/base@{'b' * 40} |" in text


def test_losses_that_are_no_numbers_are_said_in_words() -> None:
    text = card(loss=[[1, 2.0], [2, None]], validation_loss=[])
    assert "Training: 2.0000 at step 1, not finite at step 2." in text
    assert "Validation:" not in text
    found = results()
    found["test"][1].update(nll=None, nll_stderr=None)
    text = render(found, FACTORY)
    assert "| **zog** | not finite | 87.5%" in text
    [result] = front(text)["model-index"][0]["results"]
    assert [m["type"] for m in result["metrics"]] == ["exact_match"]
    assert "loss.png" not in card(loss=[], validation_loss=[])


def test_what_is_shown_is_escaped() -> None:
    said = results(description=HOSTILE, task=HOSTILE, notes=[HOSTILE], skills=[HOSTILE],
                   method=HOSTILE, stopped=HOSTILE, versions={HOSTILE: HOSTILE})  # fmt: skip
    said["verdict"]["text"] = said["data"]["train"]["name"] = said["test"][1]["name"] = HOSTILE
    said["lora"]["target_modules"] = [HOSTILE]
    text = render(said, FACTORY)
    body = text.split("---\n", 2)[2]
    assert "\x1b" not in body
    assert "\n# h" not in body
    # A skill stands in inline code, where nothing is Markdown.
    outside = [line for line in body.splitlines() if not line.startswith("A LoRA adapter for")]
    assert "<script>" not in "\n".join(outside)
    assert not [line for line in outside if "](http://evil" in line.replace("\\]", "")]
    assert read_card(text).problem == ""
    assert metadata(said)["tags"][-1] == HOSTILE


def test_a_missing_fact_is_an_error_and_no_gap() -> None:
    for key in ("method", "lora", "training", "data", "steps", "skills", "license", "versions"):
        without = results()
        del without[key]
        with pytest.raises(OutputError, match=r"README\.md, the card, cannot be written.*" + key):
            render(without, FACTORY)


def test_it_is_written_from_its_folder_and_known_again(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results()))
    with pytest.raises(OutputError, match=r"factory\.yaml: cannot be read"):
        write_card(tmp_path)
    (tmp_path / "factory.yaml").write_text(FACTORY)
    path = write_card(tmp_path, repo="me/zog")
    assert path.read_text("utf-8") == render(results(), FACTORY, repo="me/zog")
    assert is_generated(tmp_path)
    path.write_text(path.read_text("utf-8").replace("Every name", "Each name"), "utf-8")
    assert not is_generated(tmp_path)
    assert read_results(tmp_path) == results()


def test_it_has_the_same_shape_as_yaml_whatever_the_description() -> None:
    text = card(description="--- \n a: [b")
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "tiny-llama"
    assert read_card(text).problem == ""
