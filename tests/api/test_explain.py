"""What a dynamic mixture is said to do at each token, held against what it computes."""

import json
from pathlib import Path

import pytest
import torch

import lorahub_registry as lr
from lorahub_registry.adapters.dynamic import Arrow, Constant, LoraFlow, PromptRouter
from lorahub_registry.api.explain import explain
from lorahub_registry.api.listen import listen, pieces
from lorahub_registry.api.voices import (
    OTHERS,
    PALETTE,
    colours,
    loudest,
    runs,
    shade,
    strengths,
)
from lorahub_registry.errors import DataError, IncompatibleAdapters, UsageError
from lorahub_registry.weights.dynamic import Origin, read_dynamic, save_dynamic
from lorahub_registry.weights.lowrank import LowRank
from lorahub_registry.weights.prototypes import prototypes
from tests.compose.making import deltas


def write(folder, base, router, experts, tensors, task_type="CAUSAL_LM"):
    """A mixture's folder; its experts are called a, b, c."""
    folder.mkdir(parents=True)
    save_dynamic(
        folder, experts, [Origin(name) for name in "abc"[: len(experts)]], router, tensors,
        base=str(base.folder), base_revision=None, task_type=task_type,
        all_modules=[name for name, _ in base.model().named_modules()],
    )  # fmt: skip
    return folder


def llama_gates(*biases, scale=0.5, layers=2):
    """Gates of the tiny Llama that differ from layer to layer."""
    made, found = torch.Generator().manual_seed(4), {}
    for i in range(layers):
        place = f"model.layers.{i}.mixture"
        found[f"{place}.lora_gate"] = torch.randn(len(biases), 32, generator=made) * scale
        found[f"{place}.lora_gate_bias"] = torch.tensor(biases) + 0.1 * i
    return found


@pytest.fixture
def flow(tiny_llama, tmp_path):
    """A mixture of two adapters with gates per layer, and its tensors."""
    experts = [deltas(tiny_llama, kind) for kind in ("plain", "wide")]
    tensors = llama_gates(0.1, -0.2)
    router = LoraFlow("layer", 1.3)
    return write(tmp_path / "mix", tiny_llama, router, experts, tensors), tensors


def told(folder, base, text="ab cd", **options):
    loaded = (base.model(), base.tokenizer())
    return explain(folder, text, base=loaded, **{"max_new_tokens": 6, **options})


def table(lines):
    return torch.tensor(lines, dtype=torch.float64)


def test_the_first_layer_says_what_the_formula_gives_for_each_token(flow, tiny_llama):
    folder, tensors = flow
    found = told(folder, tiny_llama)
    model, tokenizer = tiny_llama.model(), tiny_llama.tokenizer()
    ids = [*tokenizer("ab cd ")["input_ids"]]
    place = "model.layers.0.mixture"
    x = model.model.embed_tokens(torch.tensor(ids))
    wanted = (x @ tensors[f"{place}.lora_gate"].T / 1.3).softmax(-1)
    wanted = wanted + tensors[f"{place}.lora_gate_bias"]
    heard = table(found.voices.layers["model.layers.0"])[: len(ids)]
    torch.testing.assert_close(heard, wanted.double(), rtol=1e-5, atol=1e-6)
    assert found.voices.prompt == len(ids)
    assert found.voices.tokens[:3] == ("<s>", "a", "b")


@pytest.mark.parametrize(
    "router", [LoraFlow("layer"), LoraFlow("module"), LoraFlow("model"), Arrow(2, 0.5)], ids=str
)
def test_it_is_what_was_in_force_while_the_answer_was_made(router, tiny_llama, tmp_path):
    experts = [deltas(tiny_llama, kind) for kind in ("plain", "wide", "patterns")]
    modules = sorted({name for each in experts for name in each})
    made = torch.Generator().manual_seed(9)
    if isinstance(router, Arrow):
        tensors = {f"{n}.lora_prototypes": v for n, v in prototypes(experts).items()}
    elif router.per == "module":
        tensors = {}
        for name in modules:
            width = next(each[name].shape[1] for each in experts if name in each)
            tensors[f"{name}.lora_gate"] = torch.randn(3, width, generator=made)
            tensors[f"{name}.lora_gate_bias"] = torch.randn(3, generator=made)
    else:
        layers = 1 if router.per == "model" else 2
        tensors = llama_gates(0.3, -0.4, 0.1, layers=layers)
    folder = write(tmp_path / "mix", tiny_llama, router, experts, tensors)
    found = told(folder, tiny_llama)

    loaded = lr.load(folder, base=(tiny_llama.model(), tiny_llama.tokenizer()))
    heard = {}

    def seen(_, module, c):
        heard.setdefault(module, []).append(c.dense(3).double().reshape(-1, 3))

    with loaded.model.watching(seen):
        assert loaded.generate("ab cd", max_new_tokens=6) == found.answer
    # The last new token was never read.
    read = len(found.voices.tokens) - 1
    for layer, said in found.voices.layers.items():
        own = [m for m in heard if m.startswith(layer)]
        sits = [torch.tensor([m in e for e in experts]).double() for m in own]
        total = sum(torch.cat(heard[m])[:read] * s for m, s in zip(own, sits, strict=True))
        wanted = total / sum(sits)
        absent = [i for i in range(3) if not sum(sits)[i]]
        lines = [[0.0 if v is None else v for v in line] for line in said[:read]]
        wanted[:, absent] = 0
        torch.testing.assert_close(table(lines), wanted, rtol=1e-4, atol=1e-5)
        assert all((line[i] is None) == (i in absent) for line in said for i in range(3))


def test_an_adapter_counts_only_where_it_sits(tiny_llama, tmp_path):
    first = {n: d for n, d in deltas(tiny_llama, "plain").items() if "layers.0" in n}
    experts = [first, deltas(tiny_llama, "wide")]
    router = LoraFlow("layer")
    folder = write(tmp_path / "mix", tiny_llama, router, experts, llama_gates(0.0, 0.0))
    voices = told(folder, tiny_llama).voices
    assert all(line[0] is None for line in voices.layers["model.layers.1"])
    assert all(line[0] is not None for line in voices.layers["model.layers.0"])
    # The mean over the layers is that of the layers where it is.
    assert [line[0] for line in voices.at()] == [
        line[0] for line in voices.layers["model.layers.0"]
    ]
    assert voices.means()["model.layers.1"][0] is None


def test_an_adapter_on_the_head_is_heard_at_every_token(tiny_llama, tmp_path):
    experts = [deltas(tiny_llama, kind) for kind in ("plain", "head")]
    modules = sorted({name for each in experts for name in each})
    tensors = {}
    for name in modules:
        tensors[f"{name}.lora_gate"] = torch.zeros(2, 32)
        tensors[f"{name}.lora_gate_bias"] = torch.tensor([0.0, 0.25])
    folder = write(tmp_path / "mix", tiny_llama, LoraFlow("module"), experts, tensors)
    voices = told(folder, tiny_llama).voices
    assert set(voices.layers[""]) == {(None, 0.75)}


def t5_experts(base):
    one = {n: d for n, d in deltas(base, "t5").items() if "EncDec" not in n}
    made = torch.Generator().manual_seed(2)
    other = {
        n: LowRank(torch.randn(2, d.shape[1], generator=made), torch.randn(d.shape[0], 2) * 0.1)
        for n, d in one.items()
    }
    return [one, other]


@pytest.mark.parametrize("new", range(1, 7))
def test_an_encoder_reads_the_prompt_and_a_decoder_the_answer(new, tiny_t5, tmp_path):
    experts = t5_experts(tiny_t5)
    tensors = {}
    for stack in ("encoder", "decoder"):
        for i in range(2):
            bias = [2.0 + i, 1.0] if stack == "encoder" else [1.0, 4.0 + i]
            tensors[f"{stack}.block.{i}.mixture.lora_gate"] = torch.zeros(2, 32)
            tensors[f"{stack}.block.{i}.mixture.lora_gate_bias"] = torch.tensor(bias)
    folder = write(
        tmp_path / "mix", tiny_t5, LoraFlow("layer"), experts, tensors, task_type="SEQ_2_SEQ_LM"
    )
    from lorahub_registry.evaluate.stock import stock_peft

    base = tiny_t5.base()
    prompt = base.tokenizer("abc")["input_ids"]  # 4 tokens, with EOS
    assert len(prompt) == 4
    answer = [10 + i for i in range(new)]  # 3 of them, behind the start, are as many
    with stock_peft(base, folder) as model:
        voices = listen(model, base.tokenizer, read_dynamic(folder), prompt, answer)
    assert len(voices.tokens) == 4 + new
    for i in range(2):
        assert list(voices.layers[f"encoder.block.{i}"]) == [(2.5 + i, 1.5)] * 4 + [None] * new
        assert list(voices.layers[f"decoder.block.{i}"]) == [None] * 4 + [(1.5, 4.5 + i)] * new
    assert voices.at() == [(3.0, 1.5)] * 4 + [(1.5, 5.0)] * new
    assert voices.at(voices.matching("1")) == [(3.5, 1.5)] * 4 + [(1.5, 5.5)] * new


def test_a_decoders_line_is_that_of_the_token_it_reads(tiny_t5, tmp_path):
    experts = t5_experts(tiny_t5)
    tensors = {}
    for stack in ("encoder", "decoder"):
        for i in range(2):
            gate = torch.randn(2, 32, generator=torch.Generator().manual_seed(i))
            tensors[f"{stack}.block.{i}.mixture.lora_gate"] = gate
            tensors[f"{stack}.block.{i}.mixture.lora_gate_bias"] = torch.zeros(2)
    folder = write(
        tmp_path / "mix", tiny_t5, LoraFlow("layer"), experts, tensors, task_type="SEQ_2_SEQ_LM"
    )
    from lorahub_registry.evaluate.stock import stock_peft

    base = tiny_t5.base()
    answer = [20, 21, 22]
    with stock_peft(base, folder) as model:
        voices = listen(model, base.tokenizer, read_dynamic(folder), [5, 6, 7, 2], answer)
    x = base.model.shared(torch.tensor(answer))
    wanted = (x @ tensors["decoder.block.0.mixture.lora_gate"].T).softmax(-1).double()
    heard = table(voices.layers["decoder.block.0"][4:])
    torch.testing.assert_close(heard, wanted, rtol=1e-5, atol=1e-6)


def test_a_router_of_prompts_gives_probabilities_and_never_reads_the_answer(tiny_llama, tmp_path):
    experts = [deltas(tiny_llama, kind) for kind in ("plain", "wide", "patterns")]
    known = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    folder = write(
        tmp_path / "mix", tiny_llama, PromptRouter(2, 0.5), experts,
        {"model.layers.0.mixture.lora_centroids": known},
    )  # fmt: skip
    found = told(folder, tiny_llama, max_new_tokens=8)
    assert found.router == "prompt_router"
    values = list(found.prompt.values())
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(1)
    assert values[2] == 0.0 < values[1] < values[0] < 1
    assert found.answer
    alone = told(folder, tiny_llama, max_new_tokens=0)
    assert alone.prompt == found.prompt
    assert alone.answer == ""


def test_pieces_are_the_text_and_a_letter_of_several_tokens_stands_at_the_last(tiny_llama):
    tokenizer = tiny_llama.tokenizer()
    ids = tokenizer("né 日!")["input_ids"]
    assert pieces(tokenizer, ids) == ["<s>", "n", "", "é", " ", "", "", "日", "!"]
    assert "".join(pieces(tokenizer, ids[:-2])).startswith("<s>né ")


def test_the_template_of_a_mixture_makes_the_prompt(kitchen):
    lr.compose(kitchen.recipe(method={"type": "arrow"}, data={"template": "Q: {{ input }} A:"}))
    found = explain(kitchen.out, "ab", max_new_tokens=2)
    assert "".join(found.voices.tokens[: found.voices.prompt]) == "<s>Q: ab A:"
    assert not (kitchen.out / "gates.png").exists()  # there was no row to show
    assert "gates.png" not in (kitchen.out / "README.md").read_text()


# What is no dynamic mixture, and other mistakes


def test_what_is_static_says_where_its_coefficients_stand(kitchen, tiny_llama, tmp_path):
    with pytest.raises(IncompatibleAdapters, match="loras/plain is one adapter") as caught:
        explain("loras/plain", "ab", base="./tiny-llama")
    assert "adapter_config.json" in caught.value.hint
    lr.compose(kitchen.recipe(
        adapters=[{"ref": "./loras/plain", "coefficient": 1}], method={"type": "linear"}, data={},
    ))  # fmt: skip
    with pytest.raises(IncompatibleAdapters, match="static mixture: its coefficients") as caught:
        explain(kitchen.out, "ab")
    assert str(kitchen.out / "results.json") in caught.value.hint
    experts = [deltas(tiny_llama, kind) for kind in ("plain", "wide")]
    folder = write(tmp_path / "constant", tiny_llama, Constant((0.5, 0.25)), experts, {})
    with pytest.raises(IncompatibleAdapters, match="static mixture: its coefficients") as caught:
        told(folder, tiny_llama)
    assert str(folder / "adapter_config.json") in caught.value.hint


def test_an_empty_prompt_and_one_that_is_too_long(flow, tiny_llama):
    folder, _ = flow
    for text in ("", " \n"):
        with pytest.raises(UsageError, match="the prompt is empty"):
            told(folder, tiny_llama, text)
    with pytest.raises(DataError, match="the prompt has 302 tokens, and the base takes 256"):
        told(folder, tiny_llama, "a" * 300)
    # Room for two more: BOS, the letters, the template's space.
    assert len(told(folder, tiny_llama, "a" * 252).voices.tokens) <= 256


# What the words mean


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ((0.5, 0.25), (0, 0.25)),
        ((0.25, 0.5), (1, 0.25)),
        ((0.5, -0.25), (0, 0.5)),  # who is taken off is no rival
        ((-0.5, -0.25), (None, 0.0)),
        ((0.0, 0.0), (None, 0.0)),
        ((0.5, 0.5 + 1e-9), (None, 0.0)),
        ((None, 0.5), (1, 0.5)),
        ((None, None), (None, 0.0)),
        ((-2.0, 0.25, 0.125), (1, 0.125)),
    ],
)
def test_who_is_the_loudest(line, wanted):
    assert loudest(line) == wanted


def test_the_strength_is_the_lead_beside_the_largest():
    assert strengths([(0.5, 0.25), (0.5, 0.0), (0.5, 0.5)]) == [0.5, 1.0, 0.0]
    assert strengths([(-1.0, -2.0)]) == [0.0]
    assert shade("#000000", 1.0) < shade("#000000", 0.5) < shade("#000000", 0.0)


def test_runs_end_where_another_leads_and_where_the_answer_begins():
    lines = [(1.0, 0.0), (0.5, 0.0), (0.5, 0.0), (0.0, 1.0), (0.0, 0.0)]
    found = [(r.adapter, r.start, r.stop, r.coefficients) for r in runs(lines, cut=2)]
    assert found == [
        (0, 0, 2, (0.75, 0.0)),
        (0, 2, 3, (0.5, 0.0)),
        (1, 3, 4, (0.0, 1.0)),
        (None, 4, 5, (0.0, 0.0)),
    ]


def test_of_more_than_eight_adapters_those_that_lead_most_have_colours():
    assert colours(3, []) == list(PALETTE[:3])
    one = [tuple(float(i == n) for i in range(10)) for n in range(10)]
    found = colours(10, [*one[2:], one[0]])
    assert [i for i, hue in enumerate(found) if hue == OTHERS] == [1, 9]
    assert len(set(found)) == 9


@pytest.mark.data
def test_on_real_adapters_gates_turn_to_the_one_whose_words_are_due(kitchen, data):
    names = ("zog", "arr")
    task = data / "tasks/stories/zog_arr"
    mixture = lr.compose(kitchen.recipe(
        base=str(data / "models/stories260k"),
        adapters=[str(data / f"adapters/stories260k/{name}") for name in names],
        method={"type": "lora_flow", "training": {"learning_rate": 0.01, "num_train_epochs": 3}},
        data={
            "train": {"path": str(task / "train.jsonl"), "limit": 32},
            "test": {"path": str(task / "test.jsonl"), "limit": 8},
        },
        device="cpu",
    ))  # fmt: skip
    found = explain(mixture.path, "Zog and Zog felt good, arr! They were happy", max_new_tokens=4)
    voices = found.voices
    lead = [line[1] - line[0] for line in voices.at()]
    text = list(voices.tokens[: voices.prompt])
    commas = [lead[i] for i, token in enumerate(text) if token == ","]
    starts = [lead[i] for i, token in enumerate(text) if token.strip() == "Z"]
    assert len(starts) == 2
    assert len(commas) == 1
    # After a comma comes "arr!"; after Z the rest of a name.
    assert min(commas) > max(starts)
    assert set(voices.layers) == set(json.loads(
        (Path(mixture.path) / "results.json").read_text())["routing"]["mean"])  # fmt: skip
