"""``lorareg merge`` as its users meet it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file

from lorahub_registry.cli.merge import _term
from tests.cli.conftest import ROOT, Kitchen, Lorareg, tree


def test_merge_writes_a_model_and_tells_what_it_did(lorareg: Lorareg, kitchen: Kitchen) -> None:
    words = ("merge", "--base", "./tiny-llama", "--adapter", "./loras/plain", "--out", "merged")
    done = lorareg(*words, "--check")
    assert done.lines[0] == "tiny-llama + 1 · plain"
    assert "4 tensors changed" in done.lines[1]
    assert "logits:" in done.lines[3]
    assert "✓ written to merged" in done.err
    assert {"model.safetensors", "config.json", "tokenizer.json", "lorareg.json"} <= set(
        tree(kitchen / "merged")
    )
    assert "exists and is not empty" in lorareg.fails(*words)
    found = lorareg(*words, "--force", "--json").json
    assert found.pop("path") == "merged"
    report = json.loads((kitchen / "merged" / "lorareg.json").read_text())
    files = report.pop("files")
    assert found == report
    assert set(files) | {"lorareg.json"} == set(tree(kitchen / "merged"))
    assert report["adapters"][0]["coefficient"] == 1
    assert str(kitchen.folder) not in json.dumps(report)
    assert lorareg(*words, "--force", "-q").lines == ["merged"]


def test_coefficients_follow_the_last_equals_sign(lorareg: Lorareg, kitchen: Kitchen) -> None:
    (kitchen / "loras" / "plain").rename(kitchen / "loras" / "a=b")
    lorareg(
        "merge", "--base", "tiny-llama", "--adapter", "./loras/a=b", "--adapter",
        "./loras/wide=-0.25", "--out", "merged",
    )  # fmt: skip
    report = json.loads((kitchen / "merged" / "lorareg.json").read_text())
    assert [a["coefficient"] for a in report["adapters"]] == [1, -0.25]


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("zog", ("zog", 1.0)),
        ("zog=0.4", ("zog", 0.4)),
        ("zog=-1e-2", ("zog", -0.01)),
        ("a=b=2", ("a=b", 2.0)),
        ("0.4", ("0.4", 1.0)),
        ("=0.4", ("=0.4", 1.0)),
    ],
)
def test_terms(text: str, term: tuple[str, float]) -> None:
    assert _term(text) == term


def test_what_is_no_coefficient_is_part_of_a_folder_s_name_or_refused(kitchen: Kitchen) -> None:
    for text in ("zog=b", "zog=nan", "zog="):
        with pytest.raises(click.UsageError, match="is no coefficient"):
            _term(text)
    (kitchen / "zog=b").mkdir()
    assert _term("zog=b") == ("zog=b", 1.0)


def test_wrong_usage(lorareg: Lorareg, kitchen: Kitchen) -> None:
    base = ("merge", "--base", "./tiny-llama", "--out", "merged")
    assert "--adapter" in lorareg.fails(*base, code=2)
    assert "every coefficient is 0" in lorareg.fails(*base, "--adapter", "./loras/plain=0", code=2)
    plain = ("--adapter", "./loras/plain")
    assert "stands twice" in lorareg.fails(*base, *plain, "--adapter", "./loras/plain=2")
    assert "no adapter" in lorareg.fails(*base, "--adapter", "./loras").lower()
    nowhere = ("merge", "--base", "./nowhere", "--out", "merged")
    assert "no config.json" in lorareg.fails(*nowhere, *plain)
    assert tree(kitchen.folder) == [
        p for p in tree(kitchen.folder) if not p.startswith(("merged", ".merged"))
    ]


def test_a_device_that_is_not_there_is_refused(
    lorareg: Lorareg, kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ("merge", "--base", "./tiny-llama", "--adapter", "./loras/plain", "--out", "merged")
    said = lorareg.fails(*words, "--device", "cuda")
    assert "device 'cuda' is not on this machine" in said
    assert "use one of: auto, cpu" in said
    assert "'tpu' is not one of" in lorareg.fails(*words, "--device", "tpu", code=2)
    assert not (kitchen / "merged").exists()
    assert lorareg(*words, "--json").json["device"] == "cpu"


# Brings every megabyte to the disk, so that a small run can be stopped in its midst.
_CHILD = """
from lorahub_registry.weights.stream import part
part._SYNC = 1 << 20
from lorahub_registry.cli import cli
cli(prog_name="lorareg")
"""


def _large(folder: Path) -> None:
    """A Llama of 40 MB in bfloat16."""
    import transformers
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=2048, num_hidden_layers=5,
        num_attention_heads=8, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    numbers = torch.randn(2048 * 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    state = {n: numbers[: t.numel()].view(t.shape).clone() for n, t in shapes.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _adapter(folder: Path, base: Path) -> None:
    import peft
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(base)
        )
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
        )
    state = {
        n.replace(".default", ""): torch.randn(p.shape)
        for n, p in wrapped.named_parameters()
        if "lora_" in n
    }
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    wrapped.peft_config["default"].base_model_name_or_path = "large"
    wrapped.peft_config["default"].save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors")


def test_a_killed_run_goes_on_to_the_same_bytes(lorareg: Lorareg, kitchen: Kitchen) -> None:
    _large(kitchen / "large")
    _adapter(kitchen / "loras" / "one", kitchen / "large")
    words = ("merge", "--base", "./large", "--adapter", "./loras/one=0.5", "--out")
    lorareg(*words, "whole")
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, *words, "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    journal = kitchen / ".out.unfinished" / ".journal.jsonl"
    try:
        while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (kitchen / "out").exists()
    kept = journal.read_bytes().count(b"\n") - 1
    done = lorareg(*words, "out")
    assert f"an earlier run was stopped: {kept} tensors are there already" in done.err
    assert tree(kitchen / "out") == tree(kitchen / "whole")
    for name in tree(kitchen / "whole"):
        one, other = ((kitchen / place / name).read_bytes() for place in ("whole", "out"))
        assert one == other, name
    before = load_file(kitchen / "large" / "model.safetensors")
    after = load_file(kitchen / "out" / "model.safetensors")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if "q_proj" in n or "up_proj" in n}
    assert not [p for p in tree(kitchen.folder) if "unfinished" in p]
