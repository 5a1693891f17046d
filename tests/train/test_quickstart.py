"""The quickstart's material in a few steps: what is written loads elsewhere, and means the same."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorahub_registry.adapters.readme import read_card
from lorahub_registry.progress import Task, silent
from lorahub_registry.train import codeswitch
from lorahub_registry.train.codeswitch import SKILLS
from lorahub_registry.train.fitting import tokens
from lorahub_registry.train.quickstart import (
    BASE_NAME,
    AdapterMade,
    BaseMade,
    make_adapters,
    make_base,
    make_task,
)
from lorahub_registry.train.stacked import stack, write_adapter

Made = tuple[BaseMade, list[AdapterMade]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("quickstart")
    base = make_base(folder / "base", seed=0, steps=4)
    return base, make_adapters(base.folder, folder / "adapters", seed=0, steps=3)


@pytest.fixture(scope="module")
def tokenizer(made: Made) -> Any:
    return AutoTokenizer.from_pretrained(made[0].folder)


def _load(made: Made) -> Any:
    return AutoModelForCausalLM.from_pretrained(made[0].folder)


def _ids(tokenizer: Any, rows: int = 12) -> torch.Tensor:
    return tokens(tokenizer, islice(codeswitch.echo_rows(codeswitch.split(0).test, 0), rows))[0]


def test_the_base_loads_as_any_causal_model(made: Made) -> None:
    model = _load(made)
    assert model.dtype == torch.float32
    assert model.num_parameters() == made[0].parameters < 500_000
    with safe_open(made[0].folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118


def test_every_word_is_one_piece(tokenizer: Any) -> None:
    for word in codeswitch.vocabulary():
        assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1, word


def test_special_tokens_are_where_they_should_be(tokenizer: Any) -> None:
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    ids = tokenizer("say: my old dog plays on the bed => ").input_ids
    assert ids[0] == 1
    assert not {0, 1, 2} & set(ids[1:])
    assert list(tokenizer("say:")) == ["input_ids", "attention_mask"]


def test_a_row_is_its_prompt_and_its_output_tokenised_apart(tokenizer: Any) -> None:
    (row,) = codeswitch.task_rows(["fr-who"], [(0,) * 7])
    ids, outputs = tokens(tokenizer, [row])
    assert tokenizer.convert_ids_to_tokens(ids[0])[-outputs - 2 :] == (
        ["Ġ=>", "Ġ", "mon", "Ġvieux", "Ġchien", "Ġplays", "Ġon", "Ġthe", "Ġbed", "."]
    )
    assert tokenizer.decode(ids[0, -outputs:]) == row["output"]
    assert tokenizer.decode(ids[0, 1:]) == f"{row['input']} {row['output']}"


def test_generation_ends_with_the_sentence(made: Made, tokenizer: Any) -> None:
    ends = _load(made).generation_config.eos_token_id
    assert ends == [tokenizer.eos_token_id, tokenizer(".", add_special_tokens=False).input_ids[0]]


def test_there_is_an_adapter_for_each_skill(made: Made) -> None:
    base, adapters = made
    assert [adapter.name for adapter in adapters] == list(SKILLS)
    for adapter in adapters:
        assert sorted(path.name for path in adapter.folder.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        # Three steps teach little, but in the right direction.
        assert adapter.score.nll < adapter.base_score.nll
        assert 0 <= adapter.score.exact_match <= 1
        assert adapter.training.steps == 3
    assert base.training.steps == 4
    assert not base.training.stopped


def test_each_adapter_loads_in_stock_peft(made: Made, tokenizer: Any) -> None:
    ids = _ids(tokenizer)
    plain = _load(made)(ids).logits
    seen = []
    for adapter in made[1]:
        model = PeftModel.from_pretrained(_load(made), adapter.folder)
        config = model.peft_config["default"]
        assert (config.r, config.lora_alpha, config.task_type) == (8, 16, "CAUSAL_LM")
        assert config.base_model_name_or_path == BASE_NAME
        state = load_file(adapter.folder / "adapter_model.safetensors")
        assert len(state) == 2 * 2 * 6
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        logits = model(ids).logits
        assert not any(torch.allclose(logits, other) for other in [plain, *seen])
        seen.append(logits)


def test_stacked_adapters_answer_as_peft_does(made: Made, tokenizer: Any, tmp_path: Path) -> None:
    ids = _ids(tokenizer)
    model = _load(made)
    layers = stack(model, ("q_proj", "down_proj"), 3, rank=4, alpha=6, seed=1)
    for layer in layers.values():
        torch.nn.init.normal_(layer.b)
    together = model(ids.repeat(3, 1)).logits.chunk(3)
    for index, logits in enumerate(together):
        write_adapter(tmp_path / f"a{index}", layers, index, alpha=6, base=BASE_NAME)
        alone = PeftModel.from_pretrained(_load(made), tmp_path / f"a{index}")
        # The same float32 products, summed in another order.
        torch.testing.assert_close(alone(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_only_the_stacked_factors_are_trained(made: Made) -> None:
    model = _load(made)
    stack(model, ("v_proj",), 2, rank=4, alpha=8, seed=0)
    trained = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"a", "b"}


def test_cards_are_readable_and_name_the_base(made: Made) -> None:
    for adapter in made[1]:
        card = read_card((adapter.folder / "README.md").read_text(encoding="utf-8"))
        assert not card.problem
        assert (card.base, card.license, card.title) == (BASE_NAME, "apache-2.0", adapter.name)
        assert {"lora", SKILLS[adapter.name].topic} <= set(card.tags)
        assert card.languages == (SKILLS[adapter.name].language,)
        assert card.description.startswith(adapter.description)


def test_nothing_written_holds_a_path(made: Made, tmp_path: Path) -> None:
    root = made[0].folder.parent
    for path in root.rglob("*"):
        if path.suffix in {".json", ".md"}:
            text = path.read_text(encoding="utf-8")
            assert str(root) not in text, path
            assert str(Path.home()) not in text, path


def test_a_seed_decides_the_files(made: Made, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", seed=0, steps=4)
    adapters = make_adapters(base.folder, tmp_path / "adapters", seed=0, steps=3)
    root = made[0].folder.parent
    files = [path for path in root.rglob("*") if path.is_file()]
    for path in files:
        assert path.read_bytes() == (tmp_path / path.relative_to(root)).read_bytes(), path
    assert [a.score for a in adapters] == [a.score for a in made[1]]
    other = make_base(tmp_path / "other", seed=1, steps=4)
    weights = "model.safetensors"
    assert (other.folder / weights).read_bytes() != (base.folder / weights).read_bytes()


def test_the_task_is_64_and_100_rows_of_two_columns(tmp_path: Path) -> None:
    paths = make_task(tmp_path / "task", seed=0)
    train, test = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in paths
    )
    assert [path.name for path in paths] == ["train.jsonl", "test.jsonl"]
    assert (len(train), len(test)) == (64, 100)
    assert {tuple(row) for row in train + test} == {("input", "output")}
    assert not {row["input"] for row in train} & {row["input"] for row in test}
    seen = {f"say: {codeswitch.say(sentence)} =>" for sentence in codeswitch.split(0).train}
    assert not seen & {row["input"] for row in train + test}


class _Watcher:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.titles: list[tuple[str, float | None]] = []
        self.warnings: list[str] = []

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        self.titles.append((title, total))
        with silent.task(title, total, unit) as task:
            yield task

    def say(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_the_clock_stops_the_training_and_says_so(made: Made, tmp_path: Path) -> None:
    watcher = _Watcher()
    base = make_base(tmp_path / "base", seed=0, progress=watcher, steps=9, clock_s=0)
    adapters = make_adapters(
        base.folder, tmp_path / "adapters", seed=0, progress=watcher, steps=7, clock_s=0
    )
    assert base.training.stopped
    assert base.training.steps == adapters[0].training.steps == 1
    assert watcher.titles == [("Training the base", 9), ("Training 6 adapters", 7)]
    assert len(watcher.warnings) == 2
    for warning, fact in zip(watcher.warnings, ("after 1 of 9", "after 1 of 7"), strict=True):
        assert fact in warning


def test_training_leaves_torch_as_it_was(tmp_path: Path) -> None:
    threads, drawn = torch.get_num_threads(), torch.random.get_rng_state()
    make_base(tmp_path, seed=5, steps=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_nothing_is_written_beside_progress(
    made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    base = make_base(tmp_path / "base", seed=0, steps=1)
    make_adapters(base.folder, tmp_path / "adapters", seed=0, steps=1)
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)
