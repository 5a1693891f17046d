"""``lorareg dare``: of two models and of an adapter; stopped, refused, replaced."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorahub_registry.registry.store import Registry
from tests.cli.conftest import ROOT, Kitchen, Lorareg, edit_config, edit_tensors, tree

MODELS = ("--base", "small", "--tuned", "tuned", "--rate", "0.6")


@pytest.fixture
def models() -> None:
    """``small`` and ``tuned``, which is in shards, in the folder one stands in."""
    from tests.weights import two

    base = two.model("Llama")
    two.save(base, Path("small"))
    two.save(two.tuned(base), Path("tuned"), max_shard_size="20KB")
    Path("tuned/training_args.bin").write_bytes(b"pickled")


def bytes_of(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_the_written_model_loads_and_is_neither_of_the_two(lorareg: Lorareg, models: None) -> None:
    import torch
    import transformers

    from tests.weights import two

    done = lorareg("dare", *MODELS, "--out", "out", "--json")
    report = json.loads(Path("out/lorareg.json").read_text())
    files = report.pop("files")
    assert done.json == {"path": str(Path("out").absolute()), **report}
    assert set(files) == set(bytes_of("tuned")) - {"training_args.bin"}
    assert set(bytes_of("out")) == {*files, "lorareg.json"}
    assert report["options"] == {"rate": 0.6, "strategy": "random", "rescale": True, "seed": 0}
    assert [report[of]["name"] for of in ("base", "tuned")] == ["small", "tuned"]
    assert str(Path.cwd()) not in Path("out/lorareg.json").read_text()
    total = report["total"]
    assert total["entries"] == sum(part["entries"] for part in report["tensors"].values())
    assert total["kept"] / total["entries"] == pytest.approx(0.4, abs=0.02)
    made, base, tuned = (
        two.logits(transformers.AutoModelForCausalLM.from_pretrained(name))
        for name in ("out", "small", "tuned")
    )
    assert torch.isfinite(made).all()
    assert not torch.allclose(made, base, atol=1e-3)
    assert not torch.allclose(made, tuned, atol=1e-3)
    assert transformers.AutoTokenizer.from_pretrained("out")("ab") == (
        transformers.AutoTokenizer.from_pretrained("tuned")("ab")
    )


def test_what_is_printed(lorareg: Lorareg, models: None) -> None:
    done = lorareg("dare", *MODELS, "--out", "out")
    assert "dropped   0.6 of the entries, at random, seed 0; the others times 2.5" in done.lines
    assert f"✓ written to {Path('out').absolute()}" in done.err
    quiet = lorareg(
        "dare", *MODELS, "--strategy", "magnitude", "--no-rescale", "--out", "other", "--quiet"
    )
    assert (quiet.lines, quiet.err) == ([str(Path("other").absolute())], "")
    report = json.loads(Path("other/lorareg.json").read_text())
    entries = {name: part["entries"] for name, part in report["tensors"].items()}
    kept = {name: part["kept"] for name, part in report["tensors"].items()}
    assert kept == {name: round(0.4 * count) for name, count in entries.items()}
    assert report["scale"] == 1


# Stops itself when so many tensors are marked; entries of the journal do not wait.
CHILD = """
import os, sys
from lorahub_registry.weights.stream import part
part._SYNC = 1
mark = part.Part.mark
def stopped(self, *words, **more):
    mark(self, *words, **more)
    if len(self.done) == 8:
        os.kill(os.getpid(), int(sys.argv.pop(1)))
part.Part.mark = stopped
from lorahub_registry.cli import cli
cli(sys.argv[2:], prog_name="lorareg")
"""


def stopped(number: int, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(number), "dare", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # Where the tests themselves run in the background, a child would ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.xdist_group("spawned")
@pytest.mark.parametrize(
    ("strategy", "number"),
    [
        ("random", signal.SIGKILL),
        ("random", signal.SIGINT),
        ("magnitude", signal.SIGKILL),
    ],
)
def test_a_stopped_run_leaves_no_output_and_goes_on_to_the_same_bytes(
    strategy: str, number: int, lorareg: Lorareg, models: None
) -> None:
    words = (*MODELS, "--strategy", strategy, "--out")
    done = stopped(number, *words, "out")
    assert done.returncode in {-number, 128 + number}, done.stderr
    assert done.stdout == ""
    assert not Path("out").exists()
    assert Path(".out.unfinished").exists()
    again = lorareg("dare", *words, "out")
    assert "an earlier run was stopped: " in again.err
    assert not Path(".out.unfinished").exists()
    lorareg("dare", *words, "unbroken")
    assert bytes_of("out") == bytes_of("unbroken")


def test_what_cannot_be_done_is_said(lorareg: Lorareg, models: None) -> None:
    def says(*words: str, code: int = 1) -> str:
        said = lorareg.fails("dare", *words, "--out", "out", code=code)
        assert tree(Path("out")) == []
        return said

    assert "nothing to drop" in says("--base", "small", "--tuned", "small")
    for rate in ("1", "-0.1", "1.5", "nan"):
        says(*MODELS[:-1], rate, code=2)
    assert "name --base and --tuned" in says("--base", "small", code=2)
    assert "takes the place" in says(*MODELS, "--adapter", "x", code=2)
    assert "--rank is an adapter's" in says(*MODELS, "--rank", "3", code=2)
    config = Path("tuned/config.json")
    written = json.loads(config.read_text())
    config.write_text(json.dumps(written | {"quantization_config": {"quant_method": "fp8"}}))
    assert "tuned is quantised" in says(*MODELS)
    config.write_text(json.dumps(written | {"model_type": "mistral"}))
    assert "they have no difference" in says(*MODELS)
    config.write_text(json.dumps(written))
    sorted(Path("tuned").glob("*.safetensors"))[1].unlink()
    assert "a shard that the index names is not there" in says(*MODELS)


def test_force_replaces_what_it_wrote_and_nothing_else(lorareg: Lorareg, models: None) -> None:
    words = ("dare", *MODELS, "--out", "out")
    lorareg(*words)
    first = bytes_of("out")
    assert "--force replaces it" in lorareg.fails(*words)
    lorareg(*words, "--force", "--seed", "1")
    assert bytes_of("out").keys() == first.keys()
    assert bytes_of("out") != first
    lorareg(*words, "--force")
    assert bytes_of("out") == first
    Path("out/mine").write_text("x")
    assert "which lorareg has not written" in lorareg.fails(*words, "--force")


def dense(folder: Path) -> dict[str, Any]:
    from lorahub_registry.adapters.facts import read_facts
    from lorahub_registry.weights.files import load_deltas

    return {name: delta.dense() for name, delta in load_deltas(folder, read_facts(folder)).items()}


@pytest.mark.parametrize("strategy", ["random", "magnitude"])
def test_an_adapter_of_full_rank_is_its_dropped_delta(
    strategy: Any, lorareg: Lorareg, kitchen: Kitchen
) -> None:
    import torch

    from lorahub_registry.weights.dare import Drop

    words = ("dare", "--adapter", "loras/wide", "--rate", "0.5", "--strategy", strategy)
    found = lorareg(*words, "--rank", "48", "--out", "whole", "--json").json
    made = dense(Path("whole"))
    for name, delta in dense(Path("loras/wide")).items():
        expected = Drop(0.5, strategy).apply(name, delta)
        torch.testing.assert_close(made[name], expected, rtol=1e-4, atol=1e-5)
        assert found["modules"][name]["error"] < 1e-5
    assert found["error"] < 1e-5


def test_what_truncation_costs_is_measured_and_the_adapter_is_indexed(
    lorareg: Lorareg, kitchen: Kitchen
) -> None:
    import torch
    from peft import PeftModel

    from lorahub_registry.weights.dare import Drop
    from tests.weights import two

    before = Path("loras/wide")
    done = lorareg("dare", "--adapter", "loras/wide", "--rate", "0.5", "--out", "dropped")
    report = json.loads(Path("dropped/lorareg.json").read_text())
    made, lost, whole = dense(Path("dropped")), 0.0, 0.0
    for name, delta in dense(before).items():
        expected = Drop(0.5).apply(name, delta)
        error = float((made[name] - expected).norm() / expected.norm())
        told = report["modules"][name]
        assert told["rank"] == 6
        assert told["error"] == pytest.approx(error, rel=1e-3)
        lost += float((made[name] - expected).norm()) ** 2
        whole += float(expected.norm()) ** 2
    assert report["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert f"an error of {report['error']:.2%}" in done.out
    with Registry() as registry:
        stored = registry.get(str(Path("dropped").absolute())).record
    assert (stored.name, stored.base.name, stored.rank) == ("dropped", "tiny-llama", 6)
    model = PeftModel.from_pretrained(kitchen.tiny.model(), "dropped")
    assert not torch.allclose(two.logits(model), two.logits(kitchen.tiny.model()), atol=1e-3)
    lorareg("dare", "--adapter", "dropped", "--out", "again")
    lorareg("dare", "--adapter", "loras/wide", "--rate", "0.9", "--out", "dropped", "--force")


def test_adapters_that_are_not_all_low_rank_or_nothing_are_refused(
    lorareg: Lorareg, kitchen: Kitchen
) -> None:
    kitchen.lora("dora")
    said = lorareg.fails("dare", "--adapter", "loras/dora", "--out", "out")
    assert "DoRA" in said
    edit_tensors(kitchen / "loras" / "plain", lambda held: {n: t * 0 for n, t in held.items()})
    said = lorareg.fails("dare", "--adapter", "loras/plain", "--out", "out")
    assert "nothing to drop" in said
    assert not Path("out").exists()


def test_the_error_is_that_of_what_is_written(lorareg: Lorareg, kitchen: Kitchen) -> None:
    import torch

    from lorahub_registry.weights.dare import Drop

    edit_tensors(
        kitchen / "loras" / "wide", lambda held: {n: t.bfloat16() for n, t in held.items()}
    )
    words = ("dare", "--adapter", "loras/wide", "--rate", "0.5", "--rank", "48")
    found = lorareg(*words, "--out", "half", "--json").json
    made = dense(Path("half"))
    for name, delta in dense(Path("loras/wide")).items():
        expected = Drop(0.5).apply(name, delta)
        error = float((made[name] - expected).norm() / expected.norm())
        # All directions are there: what is told is the rounding.
        assert error > 1e-4
        assert found["modules"][name]["error"] == pytest.approx(error, rel=1e-3)

    def huge(held: dict[str, Any]) -> dict[str, Any]:
        return {n: torch.full_like(t, 6e4, dtype=torch.float16) for n, t in held.items()}

    edit_tensors(kitchen / "loras" / "plain", huge)
    said = lorareg.fails("dare", "--adapter", "loras/plain", "--out", "out")
    assert "its factors are more than float16 holds" in said
    assert "--no-rescale" in said
    assert tree(Path("out")) == []


@pytest.mark.xdist_group("spawned")
def test_a_stopped_run_of_an_adapter_goes_on_to_the_same_bytes(
    lorareg: Lorareg, kitchen: Kitchen
) -> None:
    words = ("--adapter", "loras/wide", "--rate", "0.5", "--out")
    done = stopped(signal.SIGKILL, *words, "out")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not Path("out").exists()
    again = lorareg("dare", *words, "out")
    assert "an earlier run was stopped: " in again.err
    lorareg("dare", *words, "unbroken")
    assert bytes_of("out") == bytes_of("unbroken")
    assert [p for p in tree(Path()) if "unfinished" in p] == []


@pytest.mark.xdist_group("spawned")
def test_a_run_of_another_config_is_begun_anew(lorareg: Lorareg, models: None) -> None:
    words = (*MODELS, "--out", "out")
    stopped(signal.SIGKILL, *words)
    assert Path(".out.unfinished").exists()
    config = Path("small/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    assert "an earlier run" not in lorareg("dare", *words).err


def test_adapters_of_the_hub_are_pulled(hub: Any, lorareg: Lorareg, kitchen: Kitchen) -> None:
    hub.add_repo("me/near", bytes_of("loras/plain"))
    hub.add_repo("me/far", bytes_of("loras/wide"))
    for command, name in ((["resize"], "near"), (["dare", "--adapter"], "far")):
        lorareg(*command, f"me/{name}", "--rank", "3", "--out", command[0])
        report = json.loads(Path(command[0], "lorareg.json").read_text())
        assert report["adapter"]["name"] == name
        assert str(Path.cwd()) not in json.dumps(report)


def test_to_lora_takes_a_number_or_full(lorareg: Lorareg, models: None) -> None:
    words = ("dare", *MODELS, "--to-lora")
    said = lorareg.fails(*words, "many", "--out", "out", code=2)
    assert "--to-lora many: neither a number nor full" in said
    report = lorareg(*words, "full", "--out", "out", "--json").json["report"]
    assert report["error"] < 1e-5
    assert {m["rank"] for m in report["modules"].values()} == {16, 32}


def test_a_device_is_where_factors_are_computed_or_refused(
    lorareg: Lorareg, kitchen: Kitchen, models: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda = ("--device", "cuda", "--out", "out")
    said = lorareg.fails("dare", *MODELS, *cuda, code=2)
    assert "a model is not dropped on cuda" in said
    for words in ((*MODELS, "--to-lora", "4"), ("--adapter", "loras/plain")):
        said = lorareg.fails("dare", *words, *cuda)
        assert "device 'cuda' is not on this machine" in said
        assert "'tpu' is not one of" in lorareg.fails("dare", *words, "--device", "tpu", code=2)
    assert not Path("out").exists()
    found = lorareg("dare", "--adapter", "loras/plain", "--out", "out", "--json").json
    assert found["options"]["device"] == "cpu"
    lorareg("dare", *MODELS, "--device", "cpu", "--out", "model")


def test_nothing_that_stays_is_an_error(lorareg: Lorareg, kitchen: Kitchen) -> None:
    words = ("--adapter", "loras/plain", "--rate", "0.9999", "--strategy", "magnitude")
    assert "no entry that is not zero stays" in lorareg.fails("dare", *words, "--out", "out")
    assert tree(Path("out")) == []


def test_an_adapter_in_place_of_a_model_is_named(lorareg: Lorareg, kitchen: Kitchen) -> None:
    kitchen.lora("ia3")
    lorareg("add", "loras")
    words = ("--base", "./tiny-llama", "--tuned")
    said = lorareg.fails("dare", *words, "plain", "--out", "out")
    assert "Error: plain is an adapter in the registry (LORA), and a model is wanted here" in said
    assert "lorareg merge --base BASE --adapter plain --out FOLDER" in said
    said = lorareg.fails("extract", *words, "ia3", "--out", "out")
    assert "ia3 is an adapter in the registry (IA3)" in said
    assert "such as its base's: tiny-llama" in said
    assert "is an adapter" not in lorareg.fails("dare", *words, "neither", "--out", "out")
    shutil.copytree("loras/plain", "more/plain")
    edit_config(Path("more/plain"), base_model_name_or_path="me/other-1b")
    lorareg("add", "more")
    said = lorareg.fails("merge", "--base", "plain", "--adapter", "./loras/plain", "--out", "out")
    assert "plain is the name of adapters in the registry" in said
