"""Published LoRA-Flow gates become a mixture that PEFT loads and that computes their formula."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file

import lorahub_registry.runtime  # noqa: F401  (PEFT learns the type)
from lorahub_registry.adapters.tensors import file_sha256
from lorahub_registry.lock import Lock
from lorahub_registry.weights.dynamic import load_dynamic
from tests import tiny
from tests.cli.conftest import edit_config, tree
from tests.weights import gated

REPO = "Bowen232/LoRA-Flow"
PAIR = ("--adapters", "LoRAs/zh_lora", "LoRAs/math_lora")
IDS = torch.tensor([[1, 20, 33, 7, 90, 41], [1, 5, 60, 61, 12, 100]])


@pytest.fixture(scope="session")
def published(tiny_llama, tmp_path_factory):
    """The repo's layout, in a folder."""
    root = gated.pair(tiny_llama, tmp_path_factory.mktemp("flow") / "LoRA-Flow")
    gated.save(gated.gates(), root / "Gates" / "es_math.pt")
    gated.save(gated.gates(), root / "Gates" / "zh_math.pt")
    gated.save(gated.gates(biases=False), root / "Gates" / "old.pt")
    return root


@pytest.fixture
def flow(published, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(published, tmp_path / "desk" / "LoRA-Flow")


@pytest.fixture
def on_hub(hub, published):
    """It on a Hub, among more."""
    files = {p: (published / p).read_bytes() for p in tree(published) if (published / p).is_file()}
    card = "---\nlicense: mit\n---\n"
    hub.add_repo(REPO, {**files, "README.md": card, "LoRAs/big/adapter_model.bin": b"unwanted"})
    return hub


def safe(flow):
    """The adapters as safetensors, so that no child is needed to read them."""
    for name in gated.RANKS:
        folder = flow / "LoRAs" / name
        save_file(torch.load(folder / "adapter_model.bin"), folder / "adapter_model.safetensors")
        (folder / "adapter_model.bin").unlink()
    for path in (flow / "Gates").glob("*.pt"):
        save_file(torch.load(path), path.with_suffix(".safetensors"))
    return flow


@pytest.fixture
def quick(flow):
    """The same without pickles."""
    return safe(flow)


def found(folder, made):
    model = PeftModel.from_pretrained(made.model(), str(Path(folder) / "dynamic")).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def plain(folder, made):
    model = PeftModel.from_pretrained(made.model(), str(folder)).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(one, other):
    """Float32 sums in another order; logits are about 10 large."""
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", ["es_math", "old"])
def test_what_is_written_computes_the_published_formula(lorareg, flow, published, tiny_llama, gate):
    done = lorareg("convert", flow, "--gate", f"Gates/{gate}.pt", *PAIR)
    out = flow.parent / gate
    assert f"✓ written to {out}" in done.err
    assert sorted(os.listdir(out)) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "dynamic",
        "lorareg.lock", "results.json",
    ]  # fmt: skip
    assert tree(flow) == tree(published), "the pickles are where they were, and nothing beside"
    ours, tensors = found(out, tiny_llama), gated.gates(biases=gate == "es_math")
    wanted = gated.logits(tiny_llama.model(), published, tensors, IDS, 1.0)
    assert close(ours, wanted)
    # The comparison sees what it is to see: biases, temperature, which adapter is which.
    other = gated.gates(biases=gate != "es_math")
    assert not close(ours, gated.logits(tiny_llama.model(), published, other, IDS, 1.0))
    assert not close(ours, gated.logits(tiny_llama.model(), published, tensors, IDS, 1.1))
    turned = {
        name: tensor.flip(0 if tensor.shape[0] == 2 else 1) for name, tensor in tensors.items()
    }
    assert not close(ours, gated.logits(tiny_llama.model(), published, turned, IDS, 1.0))
    # At the root, what the gates say where they see nothing.
    blind = {n: t if n.endswith("bias") else torch.zeros_like(t) for n, t in tensors.items()}
    assert close(
        plain(out, tiny_llama), gated.logits(tiny_llama.model(), published, blind, IDS, 1.0)
    )


def test_of_a_repo_only_what_is_named_is_pulled(lorareg, on_hub, published, tiny_llama, tmp_path):
    done = lorareg("convert", REPO, "--gate", "Gates/zh_math.pt", *PAIR, "--out", "mix", "--json")
    assert f"{REPO}: zh_math.pt was trained with a temperature of 1.1, which is taken" in done.err
    assert "base inferred as tiny-llama" in done.err
    [snapshot] = (tmp_path / "hf").glob("hub/*/snapshots/*")
    assert [name for name in tree(snapshot) if (snapshot / name).is_file()] == [
        "Gates/zh_math.pt",
        "LoRAs/math_lora/adapter_config.json",
        "LoRAs/math_lora/adapter_model.bin",
        "LoRAs/zh_lora/adapter_config.json",
        "LoRAs/zh_lora/adapter_model.bin",
        "README.md",
    ]
    wanted = gated.logits(tiny_llama.model(), published, gated.gates(), IDS, 1.1)
    assert close(found("mix", tiny_llama), wanted)

    report, sha = done.json, on_hub.sha(REPO)
    assert report["gates"]["ref"] == f"{REPO}/Gates/zh_math.pt"
    assert (report["gates"]["revision"], report["gates"]["temperature"]) == (sha, 1.1)
    dynamic, _, _ = load_dynamic(tmp_path / "desk" / "mix" / "dynamic")
    assert dynamic.names == ("zh_lora", "math_lora")
    assert [e.ref for e in dynamic.experts] == [f"{REPO}/LoRAs/{n}" for n in dynamic.names]
    assert {e.revision for e in dynamic.experts} == {sha}
    assert [e.digest for e in dynamic.experts] == [a["digest"] for a in report["members"]]
    names = ("adapter_config.json", "results.json")
    config, told = ((tmp_path / "desk/mix" / name).read_text() for name in names)
    assert not any(place in config + told for place in (str(tmp_path), "/data/someone"))
    assert json.loads(config)["base_model_name_or_path"] == "tiny-llama"


def test_a_converted_mixture_is_found_shown_and_published(
    lorareg, on_hub, logged_in, published, tmp_path
):
    words = ("convert", REPO, "--gate", "Gates/es_math.pt", *PAIR, "--base", "me/tiny@v1")
    done = lorareg(*words)
    sha, out = on_hub.sha(REPO), tmp_path / "desk/es_math"
    assert "licence" not in done.err, "all of it is under the repo's"

    [found] = lorareg("search", "--base", "me/tiny", "--json").json
    assert (found["ref"], found["base"], found["license"]) == ("es_math", "me/tiny", "mit")
    shown = lorareg("show", "es_math", "--json").json
    members = {m["name"]: m for m in shown["mixture"]["members"]}
    assert shown["mixture"]["method"] == "lora_flow"
    assert [m["ref"] for m in members.values()] == [f"{REPO}/LoRAs/{n}" for n in gated.RANKS]
    biases = [gated.gates()[f"encoder.layers.{i}.weight_bias"][0] for i in range(2)]
    wanted = (torch.stack(biases).double().mean(0) + 0.5).tolist()
    assert [m["coefficient"] for m in members.values()] == pytest.approx(wanted)
    page = lorareg("show", "es_math").out
    assert "by lora_flow, seed 0: not measured here" in page
    assert "the mixture itself is in dynamic/ and decides while it runs: generate and" in page
    assert "kind        LORA CAUSAL_LM (a plain LoRA with fixed coefficients)" in page
    assert "these are the plain LoRA's coefficients" in page
    assert shown["dynamic"] is True

    card = (out / "README.md").read_text()
    sums = {p: file_sha256(published / p) for p in ("Gates/es_math.pt",
            *(f"LoRAs/{n}/adapter_model.bin" for n in gated.RANKS))}  # fmt: skip
    for said in (
        "**Not measured:**", "No score was measured here", "lorareg score REF",
        f"| gates | {REPO}/Gates/es\\_math.pt@{sha} | Gates/es\\_math.pt (a pickle) |",
        f"| zh\\_lora | {wanted[0]:+.4f} | {REPO}/LoRAs/zh\\_lora@{sha} | mit |",
        f"lorareg convert {REPO}@{sha} --gate Gates/es_math.pt", 'subfolder="dynamic"',
        *sums.values(),
    ):  # fmt: skip
        assert said in card
    lock = Lock.load(out / "lorareg.lock")
    assert lock.data["gates"].files == {"Gates/es_math.pt": sums["Gates/es_math.pt"]}
    assert {name: pin.files["adapter_model.bin"] for name, pin in lock.adapters.items()} == {
        name: sums[f"LoRAs/{name}/adapter_model.bin"] for name in gated.RANKS
    }

    files = ["README.md", "adapter_config.json", "adapter_model.safetensors",
             "dynamic/adapter_config.json", "dynamic/adapter_model.safetensors", "lorareg.lock",
             "results.json"]  # fmt: skip
    dry = lorareg("push", "es_math", "me/spoken", "--dry-run", "--json").json
    assert [file["name"] for file in dry] == files
    assert not on_hub.find("*/commit/*")
    lorareg("push", "es_math", "me/spoken")
    there = on_hub.files("me/spoken")
    assert sorted(set(there) - {".gitattributes"}) == files
    front = ModelCard(there["README.md"].decode()).data
    assert (front.base_model, front.license, front.library_name) == ("me/tiny", "mit", "peft")
    text = b"".join(there[name] for name in files if not name.endswith(".safetensors"))
    assert not any(place.encode() in text for place in (str(tmp_path), "/data/someone"))
    # The card is as it was written, so that it is written anew for whatever repo.
    assert lorareg("push", "es_math", "me/other").err.count("edited by hand") == 0


def test_the_licence_is_what_all_say_or_the_user(lorareg, quick):
    words = ("convert", quick, "--gate", "Gates/old.safetensors", *PAIR, "--force", "--json")
    done = lorareg(*words)
    assert done.json["license"] is None
    assert "its licence is unknown, and the unknown is not published: --license ID" in done.err
    assert "The licence is unknown" in (quick.parent / "old/README.md").read_text()
    said = lorareg.fails("push", "old", "me/x", "--dry-run")
    assert "Hint: convert again with --license ID --force" in said
    (quick / "README.md").write_text("---\nlicense: mit\n---\n")
    (quick / "LoRAs/zh_lora/README.md").write_text("---\nlicense: llama2\n---\n")
    done = lorareg(*words)
    assert done.json["license"] is None
    assert done.json["notes"] == [
        "on its licence: zh_lora says llama2, math_lora says mit, the gates' card says mit"
    ]
    done = lorareg(*words, "--license", "llama2")
    assert done.json["license"] == "llama2"
    assert done.json["notes"] == [
        "it was given as llama2, but math_lora says mit, the gates' card says mit"
    ]
    assert "unknown" not in done.err
    (quick / "LoRAs/zh_lora/README.md").unlink()
    assert lorareg(*words).json["license"] == "mit"
    assert "a licence without a name" in lorareg.fails(*words, "--license", " ", code=2)


def test_of_a_folder_no_path_is_told(lorareg, quick, tiny_llama):
    words = ("convert", quick, "--gate", "Gates/old.safetensors", *PAIR, "--license", "mit")
    lorareg(*words, "--base", tiny_llama.folder)
    out = quick.parent / "old"
    for name in ("README.md", "results.json", "lorareg.lock"):
        assert str(quick.parent) not in (out / name).read_text()
    card = (out / "README.md").read_text()
    assert "lorareg convert FOLDER --gate old.safetensors --adapters zh_lora math_lora" in card
    assert "| gates | a local file | old.safetensors |" in card
    assert "Pickles were read" not in card
    # The base is found again by its name.
    answers = lorareg("generate", "old", "hi", "--max-new-tokens", "2", "--json").json
    assert [a["name"] for a in answers] == ["old"]
    lorareg("push", "old", "me/x", "--dry-run")
    inner = out / "dynamic"
    for words in (
        ("resize", inner, "--rank", "2"),
        ("merge", "--base", tiny_llama.folder, "--adapter", inner),
        ("dare", "--adapter", inner, "--rank", "2"),
    ):
        said = lorareg.fails(*words, "--out", "no")
        assert "it is LORA_MIXTURE: its coefficients differ from token to token" in said
        assert "so that it cannot be merged, resized or summed" in said
        assert f"Hint: it decides while it runs; its plain LoRA stands beside it: {out}" in said
    said = lorareg.fails("compare", inner, quick / "LoRAs/zh_lora")
    assert f"its plain LoRA stands beside it: {out}" in said
    told = lorareg("resize", out, "--rank", "2", "--out", "small").err
    assert "old: what is resized is its plain LoRA with fixed coefficients, another model" in told
    assert "another model" not in lorareg("resize", "small", "--rank", "1", "--out", "less").err
    alone = shutil.copytree(inner, quick.parent / "alone")
    said = lorareg.fails("resize", alone, "--rank", "2", "--out", "no")
    assert "take the adapters that it is made of" in said


def test_without_a_connection_the_cache_is_enough(lorareg, on_hub, monkeypatch):
    words = ("convert", REPO, "--gate", "Gates/es_math.pt", *PAIR, "--out")
    lorareg(*words, "first", "-q")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert lorareg(*words, "second", "-q").lines == [os.path.abspath("second")]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with open(f"first/{name}", "rb") as one, open(f"second/{name}", "rb") as other:
            assert one.read() == other.read()
    said = lorareg.fails("convert", REPO, "--gate", "Gates/zh_math.pt", *PAIR)
    assert "offline mode is on, and this is not in the cache" in said


def test_what_a_repo_does_not_have_is_said(lorareg, on_hub):
    said = lorareg.fails("convert", REPO, "--gate", "Gates/fr_math.pt", *PAIR)
    assert f"Error: {REPO} has no file Gates/fr_math.pt" in said
    assert "Hint: it has Gates/es_math.pt, Gates/old.pt, Gates/zh_math.pt" in said
    said = lorareg.fails("convert", REPO, "--gate", "Gates/old.pt", "--adapters", "LoRAs", "zh")
    assert f"Error: {REPO} has no adapter in LoRAs" in said
    assert "it has adapters in LoRAs/math_lora, LoRAs/zh_lora" in said
    said = lorareg.fails("convert", REPO, "--gate", "../x.pt", *PAIR, code=2)
    assert "'../x.pt' is no path in a repo" in said
    assert not on_hub.find("*/resolve/*"), "nothing was fetched"


def test_the_temperature_is_the_user_s_to_say(lorareg, quick):
    words = ("convert", quick, *PAIR, "--json", "--gate")
    done = lorareg(*words, "Gates/zh_math.safetensors")
    assert done.json["gates"]["temperature"] == 1
    assert "Warning: the temperature is taken as 1" in done.err
    assert "if this is it, --temperature 1.1" in done.err
    done = lorareg(*words, "Gates/zh_math.safetensors", "--temperature", "1.1", "--force")
    assert done.json["gates"]["temperature"] == 1.1
    assert load_dynamic(quick.parent / "zh_math/dynamic")[0].router.temperature == 1.1
    done = lorareg(*words, "Gates/es_math.safetensors")
    assert (done.json["gates"]["temperature"], "the temperature" in done.err) == (1, False)
    for wrong in ("0", "-1", "nan", "inf"):
        said = lorareg.fails(*words, "Gates/old.safetensors", "--temperature", wrong, code=2)
        assert "it is to be above 0" in said


def test_what_the_reader_sees(lorareg, quick):
    done = lorareg("convert", quick, "--gate", "Gates/old.safetensors", *PAIR, "--out", "mix")
    assert done.lines == [
        "gates     old.safetensors: 2 layers, 32 wide, without biases, temperature 1",
        "base      tiny-llama",
        "adapter   zh_lora    rank 4",
        "adapter   math_lora  rank 16",
    ]
    said = lorareg.fails("convert", quick, "--gate", "Gates/old.safetensors", *PAIR, "--out", "mix")
    assert "exists and is not empty" in said
    said = lorareg.fails("convert", quick, "--gate", "Gates/old.safetensors", *PAIR, "--force",
                         "--out", quick / "LoRAs/zh_lora")  # fmt: skip
    assert "zh_lora holds what this is made of" in said


def test_the_list_of_adapters_ends_with_the_next_option(lorareg, quick):
    first = lorareg("convert", quick, *PAIR, "--gate", "Gates/old.safetensors", "-q").lines
    separate = ("--adapters", "LoRAs/zh_lora", "--adapters", "./LoRAs/math_lora/")
    other = lorareg("convert", *separate, "--out", "b", quick, "--gate=Gates/old.safetensors", "-q")
    one, two = (load_dynamic(quick.parent / p / "dynamic")[0] for p in (*first, *other.lines))
    assert one == two


def test_a_base_that_is_a_folder_is_held_against_the_adapters(lorareg, quick, tiny_llama):
    words = ("convert", quick, "--gate", "Gates/old.safetensors", *PAIR, "--force", "--out", "mix")
    lorareg(*words, "--base", tiny_llama.folder)
    config = json.loads((quick.parent / "mix/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(tiny.LINEAR)
    assert config["base_model_name_or_path"] == tiny_llama.name
    other = tiny.make("gpt2", quick.parent)
    said = lorareg.fails(*words, "--base", other.folder)
    assert "zh_lora does not fit tiny-gpt2" in said
    lorareg(*words, "--base", "me/tiny@v1")
    config = json.loads((quick.parent / "mix/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny", "v1")


# Refused


def fails(lorareg, quick, *more, gate="Gates/old.safetensors", adapters=PAIR):
    said = lorareg.fails("convert", quick, "--gate", gate, *adapters, *more)
    left = [name for name in tree(quick.parent) if not name.startswith("LoRA-Flow")]
    assert left == [], "nothing stays of what failed"
    return said


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        ({"layers": 3}, "has gates of 3 layers, and the adapters sit in 2, up to model.layers.1"),
        ({"layers": 1}, "has gates of 1 layers, and the adapters sit in 2"),
        ({"width": 48}, "residual stream of width 48, and in zh_lora model.layers.0.self_attn."),
        ({"width": 64}, "residual stream of width 64"),
        ({"experts": 3}, "its gates choose among 3 adapters, and 2 are named"),
    ],
)
def test_gates_of_other_adapters(lorareg, quick, gates, said):
    save_file(gated.gates(**gates), quick / "Gates/x.safetensors")
    assert said in fails(lorareg, quick, gate="Gates/x.safetensors")


def test_gates_that_diverged(lorareg, quick):
    tensors = gated.gates()
    tensors["encoder.layers.1.weight_bias"][0, 1] = float("nan")
    save_file(tensors, quick / "Gates/x.safetensors")
    said = fails(lorareg, quick, gate="Gates/x.safetensors")
    assert "Gates/x.safetensors: encoder.layers.1.weight_bias holds NaN or infinity" in said


def test_a_pickle_that_holds_more_than_tensors(lorareg, quick):
    gated.save(gated.gates() | {"optimizer": {"lr": 0.1}}, quick / "Gates/x.pt")
    said = fails(lorareg, quick, gate="Gates/x.pt")
    assert "it holds something else than named tensors" in said


def test_an_adapter_s_pickle_that_would_run_code(lorareg, flow, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": Evil()}, flow / "LoRAs/math_lora/adapter_model.bin")
    said = fails(lorareg, flow, gate="Gates/old.pt")
    assert "math_lora/adapter_model.bin: cannot be read as tensors" in said
    assert not (tmp_path / "ran").exists()


def test_adapters_that_a_sum_does_not_express(lorareg, quick):
    edit_config(quick / "LoRAs/zh_lora", use_dora=True)
    assert "zh_lora: DoRA scales the whole weight" in fails(lorareg, quick)


def test_adapters_of_different_bases(lorareg, quick):
    edit_config(quick / "LoRAs/math_lora", base_model_name_or_path="/models/llama-2-13b")
    said = fails(lorareg, quick)
    assert "zh_lora was made for tiny-llama, and math_lora for llama-2-13b" in said
    edit_config(quick / "LoRAs/math_lora", base_model_name_or_path="/data/checkpoint-10")
    said = fails(lorareg, quick)
    assert "math_lora does not say which base it was made for" in said
    assert "--base ID" in said
    lorareg("convert", quick, "--gate", "Gates/old.safetensors", *PAIR, "--base", "tiny-llama")


def test_adapters_of_different_shapes(lorareg, quick):
    path = quick / "LoRAs/math_lora/adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    tensors[key] = torch.ones(50, 16)
    save_file(tensors, path)
    said = fails(lorareg, quick)
    assert "zh_lora and math_lora cannot be mixed: model.layers.0.mlp.up_proj is" in said


def test_an_adapter_outside_of_the_layers(lorareg, quick):
    path = quick / "LoRAs/zh_lora/adapter_model.safetensors"
    head = {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32),
            "base_model.model.lm_head.lora_B.weight": torch.ones(259, 4)}  # fmt: skip
    save_file(load_file(path) | head, path)
    said = fails(lorareg, quick)
    assert "zh_lora: lm_head is in no layer, so no layer's gate decides for it" in said


def test_what_is_named_wrongly(lorareg, quick):
    assert "Gates/no.pt: no such file" in fails(lorareg, quick, gate="Gates/no.pt")
    said = fails(lorareg, quick, adapters=("--adapters", "LoRAs/zh_lora", "LoRAs/no"))
    assert "LoRAs/no: no adapter_config.json there" in said
    words = ("convert", quick, "--gate", "Gates/old.safetensors")
    said = lorareg.fails(*words, "--adapters", "LoRAs/zh_lora", "./LoRAs/zh_lora", code=2)
    assert "the adapter LoRAs/zh_lora is named twice" in said
    assert "none is named" in lorareg.fails(*words, code=2)
    said = lorareg.fails("convert", "./gone", "--gate", "x.pt", *PAIR)
    assert "./gone: no such folder" in said
    assert "--adapters goes with --gate" in lorareg.fails("convert", quick, *PAIR, code=2)
    said = lorareg.fails("convert", quick, "--temperature", "0", code=2)
    assert "--temperature goes with --gate" in said
