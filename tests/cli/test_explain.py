"""``lorareg explain``: what it prints, in every format, and what it refuses."""

import json
import re
import shutil

import pytest
import torch

from lorahub_registry.adapters.dynamic import LoraFlow, PromptRouter
from lorahub_registry.weights.dynamic import Origin, save_dynamic
from tests import tiny
from tests.compose.making import deltas

ANSI = re.compile(r"\x1b\[([0-9;]*)m")
ANSI_SPAN = re.compile(r"\x1b\[([0-9;]+)m( ?[^\x1b ]+ ?)\x1b\[0m")


@pytest.fixture
def mixture(kitchen):
    """Gates by token in the first layer: ``a`` is for plain, ``b`` for wide; constant in the next.

    Between them nobody is ahead.
    """
    model, tokenizer = kitchen.tiny.model(), kitchen.tiny.tokenizer()
    a, b = model.model.embed_tokens(torch.tensor(tokenizer.convert_tokens_to_ids(["a", "b"])))
    tensors = {}
    for i in range(2):
        place = f"model.layers.{i}.mixture"
        # At "a" the logits differ by 8, at "b" by -8: the rest of the alphabet lies between.
        gram = torch.stack([torch.stack([a @ a, a @ b]), torch.stack([b @ a, b @ b])])
        weights = torch.linalg.solve(gram, torch.tensor([8.0, -8.0]))
        line = weights[0] * a + weights[1] * b
        gate = torch.stack([line, -line]) / 2 if i == 0 else torch.zeros(2, 32)
        bias = torch.zeros(2) if i == 0 else torch.tensor([0.25, -1.0])
        tensors |= {f"{place}.lora_gate": gate.detach(), f"{place}.lora_gate_bias": bias}
    return _write(kitchen, "gated", LoraFlow("layer"), tensors)


def _write(kitchen, name, router, tensors):
    kinds = ("plain", "wide")
    folder = kitchen / name
    folder.mkdir()
    save_dynamic(
        folder, [deltas(kitchen.tiny, kind) for kind in kinds], [Origin(kind) for kind in kinds],
        router, tensors, base="tiny-llama", base_revision=None, task_type="CAUSAL_LM",
    )  # fmt: skip
    return folder


BASE = ("--base", "./tiny-llama", "--max-new-tokens", "0")


def test_json_has_every_token_and_layer(lorareg, mixture):
    found = lorareg("explain", mixture, "aab", *BASE, "--layer", "0", "--json").json
    assert found["name"] == "gated"
    assert found["router"] == "lora_flow"
    assert found["answer"] == ""
    assert found["layer"] == ["model.layers.0"]
    assert [t["text"] for t in found["tokens"]] == ["<s>", "a", "a", "b", " "]
    assert {t["part"] for t in found["tokens"]} == {"prompt"}
    assert [t["loudest"] for t in found["tokens"]][1:4] == ["plain", "plain", "wide"]
    one = found["tokens"][1]
    assert one["layer"]["plain"] == pytest.approx(1 / (1 + 2.718281828**-8), abs=1e-5)
    assert found["layers"]["model.layers.1"] == pytest.approx({"plain": 0.75, "wide": -0.5})
    assert one["coefficients"]["plain"] == pytest.approx((one["layer"]["plain"] + 0.75) / 2)
    [plain, wide] = found["adapters"]
    assert plain["name"] == "plain"
    assert plain["highest"] == pytest.approx(one["layer"]["plain"])
    assert plain["highest_after"] in ("<s>a", "<s>aa")
    assert plain["lowest_after"] == "<s>aab"
    assert plain["loudest_at"] + wide["loudest_at"] <= 5


def test_the_mean_over_layers_colours_unless_a_layer_is_named(lorareg, mixture):
    over_all = lorareg("explain", mixture, "b", *BASE, "--json").json
    assert over_all["layer"] is None  # the mean
    assert "layer" not in over_all["tokens"][0]
    # The second layer says 0.75 and -0.5; at "b" the first says 0 and 1.
    assert over_all["tokens"][1]["loudest"] == "plain"
    first = lorareg("explain", mixture, "b", *BASE, "--json", "--layer", "model.layers.0").json
    assert first["tokens"][1]["loudest"] == "wide"


def test_without_colours_there_is_a_table_of_runs(lorareg, mixture):
    done = lorareg("explain", mixture, "aabb", *BASE, "--layer", "0")
    assert not ANSI.search(done.out)
    head, *body = done.lines[: done.lines.index("")]
    assert head.split() == ["PART", "TOKENS", "LOUDEST", "MEAN", "TEXT"]
    rows = [line.split(maxsplit=4) for line in body]
    assert ["prompt", "2", "plain", "1.000", "|aa|"] in rows or rows[0][4] == "|<s>aa|"
    assert any(row[2] == "wide" and row[4].startswith("|bb") for row in rows)
    assert sum(int(row[1]) for row in rows) == 6
    at = done.lines.index("Means over this text, layer by layer:")
    table = [line.split() for line in done.lines[at + 2 :]]
    assert table[0] == ["LAYER", "plain", "wide"]
    assert table[2] == ["model.layers.1", "0.750", "-0.500"]


def test_the_answer_has_runs_of_its_own(lorareg, mixture):
    done = lorareg("explain", mixture, "aab", "--base", "./tiny-llama", "--max-new-tokens", "5",
                   "--layer", "1")  # fmt: skip
    rows = [line.split(maxsplit=4) for line in done.lines[1 : done.lines.index("")]]
    assert [row[:4] for row in rows] == [
        ["prompt", "5", "plain", "0.750"],
        ["answer", "5", "plain", "0.750"],
    ]
    answer = lorareg("generate", mixture, "aab", "--base", "./tiny-llama", "--max-new-tokens", "5",
                     "--json").json[0]["text"]  # fmt: skip
    shown = lorareg("explain", mixture, "aab", "--base", "./tiny-llama", "--max-new-tokens", "5",
                    "--json").json  # fmt: skip
    assert shown["answer"] == answer


def test_on_a_terminal_the_text_is_coloured_by_who_leads(lorareg, mixture, monkeypatch):
    from lorahub_registry.api.voices import PALETTE, shade

    monkeypatch.delenv("NO_COLOR")
    for name, value in (("FORCE_COLOR", "1"), ("COLORTERM", "truecolor"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    found = lorareg("explain", mixture, "aab", "--base", "./tiny-llama", "--max-new-tokens", "3",
                    "--layer", "0").out  # fmt: skip
    legend, _, rest = found.split("\n", 2)
    assert ANSI.sub("", legend).split() == ["plain", "wide"]

    def near(style, colour):
        said = [int(n) for n in style.split("48;2;")[1].split(";")[:3]]
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return all(abs(x - y) <= 2 for x, y in zip(said, wanted, strict=True))

    first, second = (style for style, _ in ANSI_SPAN.findall(legend))
    assert near(first, shade(PALETTE[0], 1.0))
    assert near(second, shade(PALETTE[1], 1.0))
    spans = ANSI_SPAN.findall(rest.split("\nCoefficients")[0])
    strong = {text: style for style, text in spans}
    assert near(strong["a"], shade(PALETTE[0], 1.0))
    assert near(strong["b"], shade(PALETTE[1], 1.0))
    assert not strong["b"].startswith("1;")  # bold is the answer's
    assert any(style.startswith("1") for style, _ in spans)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = lorareg("explain", mixture, "aab", *BASE)
    assert not ANSI.search(plain.out)
    assert plain.lines[0].startswith("PART")


def test_sixteen_colours_are_too_few_to_tell_voices_apart(lorareg, mixture, monkeypatch):
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.delenv("COLORTERM", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert ANSI.search(lorareg("explain", mixture, "aab", *BASE).out)
    monkeypatch.setenv("TERM", "xterm-16color")
    plain = lorareg("explain", mixture, "aab", *BASE)
    assert not ANSI.search(plain.out)
    assert plain.lines[0].startswith("PART")


def test_quiet_names_who_is_the_loudest_most_often(lorareg, mixture):
    assert lorareg("explain", mixture, "b", *BASE, "-q").lines == ["plain"]


def test_what_a_terminal_would_obey_is_shown_and_not_sent(lorareg, mixture):
    done = lorareg("explain", mixture, "a\x1b[2Jb\nc", *BASE)
    assert "\x1b" not in done.out
    assert "a�[2Jb↵c" in done.out


@pytest.fixture
def by_prompt(kitchen):
    known = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    tensors = {"model.layers.0.mixture.lora_centroids": known}
    return _write(kitchen, "prompted", PromptRouter(2, 0.5), tensors)


def test_a_router_of_prompts_shows_probabilities(lorareg, by_prompt):
    options = ("--base", "./tiny-llama", "--max-new-tokens", "4")
    done = lorareg("explain", by_prompt, "ab", *options, "--json").json
    shares = {row["adapter"]: row["probability"] for row in done["adapters"]}
    assert sum(shares.values()) == pytest.approx(1)
    assert done["answer"]
    human = lorareg("explain", by_prompt, "ab", *options)
    assert human.lines[0].split() == ["ADAPTER", "PROBABILITY"]
    assert [line.split()[0] for line in human.lines[1:3]] == list(shares)
    assert lorareg("explain", by_prompt, "ab", *options, "-q").lines == list(shares)
    said = lorareg.fails("explain", by_prompt, "ab", *options, "--layer", "1", code=2)
    assert "decides once for the whole prompt" in said


def test_errors_say_what_to_do(lorareg, mixture, kitchen):
    said = lorareg.fails("explain", "loras/plain", "ab", *BASE)
    assert "Error: loras/plain is one adapter, no dynamic mixture" in said
    assert "Hint: its scaling stands in" in said
    said = lorareg.fails("explain", mixture, "  ", *BASE, code=2)
    assert "Error: the prompt is empty" in said
    assert "Hint: lorareg explain" in said
    said = lorareg.fails("explain", "nobody", "ab", *BASE)
    assert "nobody" in said
    said = lorareg.fails("explain", mixture, "ab", "--base", "./nowhere")
    assert "nowhere" in said
    assert "Hint" in said
    said = lorareg.fails("explain", mixture, "ab", *BASE, "--layer", "2", code=2)
    assert "Error: --layer 2: no layer with adapters is called so" in said
    assert "model.layers.0 … model.layers.1" in said


def test_what_is_wrong_is_told_before_the_base_is_loaded(lorareg, mixture, by_prompt, kitchen):
    def unloadable(folder):
        """A base with its tensors, of an architecture that nobody knows."""
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "nobody-s"}))
        return "--base", folder, "--max-new-tokens", "0"

    base = unloadable(shutil.copytree(kitchen / "tiny-llama", kitchen / "copy" / "tiny-llama"))
    said = lorareg.fails("explain", mixture, "ab", *base)
    assert "nobody-s" in said, "nothing else is wrong"
    said = lorareg.fails("explain", mixture, "ab", *base, "--layer", "2", code=2)
    assert "--layer 2: no layer with adapters is called so" in said
    assert "Hint: mean, or a number or name of model.layers.0 … model.layers.1" in said
    for there in ("1", "model.layers.1"):
        assert "nobody-s" in lorareg.fails("explain", mixture, "ab", *base, "--layer", there)
    said = lorareg.fails("explain", by_prompt, "ab", *base, "--layer", "1", code=2)
    assert "decides once for the whole prompt" in said
    other = unloadable(tiny.make("gpt2", kitchen / "copy").folder)
    said = lorareg.fails("explain", mixture, "ab", *other)
    assert "gated does not fit tiny-gpt2: the base has no model.layers.0" in said


def test_a_recipe_that_was_composed_is_its_mixture(lorareg, kitchen):
    recipe = kitchen.recipe(method={"type": "arrow"}, data={})
    said = lorareg.fails("explain", recipe, "ab")
    assert "was not composed yet" in said
    lorareg("compose", recipe)
    found = lorareg("explain", recipe, "ab", "--max-new-tokens", "1", "--json").json
    assert found["name"] == "blend"
    assert found["router"] == "arrow"
    assert lorareg("explain", "blend", "ab", "--max-new-tokens", "1", "--json").json == found
