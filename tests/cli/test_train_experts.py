"""``train`` with experts: from a factory to what every other command makes of them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import lorahub_registry.runtime  # noqa: F401
from lorahub_registry.cli import cli
from tests.cli.factories import LORA, nll, open_workshop, shop  # noqa: F401
from tests.cli.test_train_resumed import all_of, pressed  # noqa: F401

TWO = (
    {"name": "plain", "lora": LORA},
    {
        "name": "mix",
        "lora": {"r": 4, "lora_dropout": 0.1, "use_dora": True, "target_modules": "all-linear"},
        "method": {"type": "mixlora", "num_experts": 3, "expert_lora": {"r": 2}},
        "training": {"max_steps": 8},
    },
)


@pytest.fixture(scope="module")
def unbroken(tiny_llama, tmp_path_factory):
    """``TWO`` without an interruption: (the workshop, what was planned, what was printed)."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("experts")
        patch.setenv("LORAREG_HOME", str(folder / "home"))
        workshop = open_workshop(tiny_llama, folder / "desk")
        path = str(workshop.factory(*TWO))
        planned = CliRunner().invoke(cli, ["train", path, "--dry-run"])
        assert planned.exit_code == 0, planned.output
        done = CliRunner().invoke(cli, ["train", path, "--json"])
        assert done.exit_code == 0, done.output
        shown = CliRunner().invoke(cli, ["show", "mix"])
        found = CliRunner().invoke(cli, ["search", "--peft-type", "mixlora", "-q"])
    return workshop, planned.stdout, json.loads(done.stdout), shown.stdout + found.stdout


def test_the_dry_run_tells_of_experts(unbroken):
    _, planned, done, _ = unbroken
    assert "mixlora: 3 experts of rank 2 in 2 of them" in planned
    mix = next(one for one in done["results"] if one["name"] == "mix")
    assert f"{mix['parameters']:,} parameters" in planned


def test_what_is_told_of_a_test_is_what_peft_gives(unbroken):
    workshop, _, done, _ = unbroken
    mix = next(one for one in done["results"] if one["name"] == "mix")
    assert mix["method"] == "MixDoRA"
    found = nll(workshop.tiny, workshop.out / "mix", workshop / "test.jsonl", "{} ")
    assert mix["test"][1]["nll"] == pytest.approx(found, abs=1e-5)
    assert abs(mix["test"][0]["nll"] - found) > 1e-3


def test_card_log_and_registry(unbroken):
    workshop, _, _, told = unbroken
    card = (workshop.out / "mix" / "README.md").read_text()
    assert "A mixture of LoRA experts for" in card
    assert "import lorahub_registry.runtime" in card
    assert "| top\\_k | 2 |" in card
    assert "| experts' r | 2 |" in card
    assert "stock PEFT" not in card
    lines = (workshop.out / "mix" / "training.jsonl").read_text().splitlines()
    assert all(json.loads(line)["aux_loss"] > 0 for line in lines)
    assert "experts" in told
    assert told.rstrip().endswith("mix")


def test_a_stopped_run_goes_on_to_the_same_bytes(unbroken, lorareg, shop, pressed):  # noqa: F811
    shop.factory(*TWO)
    pressed(3)
    lorareg("train", "factory.yaml")
    assert all_of(shop) == all_of(unbroken[0])
