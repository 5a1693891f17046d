"""What the quickstart makes from nothing: a base that loads elsewhere, and rows to train on."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorahub_registry.train import codeswitch
from lorahub_registry.train.codeswitch import SKILLS
from lorahub_registry.train.quickstart import (
    SKILL_ROWS,
    BaseMade,
    answers,
    make_base,
    make_rows,
    tokens,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseMade:
    return make_base(tmp_path_factory.mktemp("quickstart") / "base", seed=0, steps=4)


@pytest.fixture(scope="module")
def tokenizer(base: BaseMade) -> Any:
    return AutoTokenizer.from_pretrained(base.folder)


def _load(base: BaseMade) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.folder)


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_base_loads_as_any_causal_model(base: BaseMade) -> None:
    model = _load(base)
    assert model.dtype == torch.float32
    assert model.num_parameters() == base.parameters < 500_000
    with safe_open(base.folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118


def test_steps_teach_the_base_something(base: BaseMade, tmp_path: Path, tokenizer: Any) -> None:
    rows = list(islice(codeswitch.echo_rows(codeswitch.split(0).test, 0), 20))
    one = make_base(tmp_path / "one", seed=0, steps=1)

    def loss(made: BaseMade) -> float:
        with torch.inference_mode():
            return float(answers(_load(made), *tokens(tokenizer, rows))[0].mean())

    assert loss(base) < loss(one) - 0.05
    assert 0 <= base.exact_match <= 1


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


def test_generation_ends_with_the_sentence(base: BaseMade, tokenizer: Any) -> None:
    ends = _load(base).generation_config.eos_token_id
    assert ends == [tokenizer.eos_token_id, tokenizer(".", add_special_tokens=False).input_ids[0]]


def test_nothing_written_holds_a_path(base: BaseMade) -> None:
    for path in base.folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert str(base.folder.parent) not in text, path
        assert str(Path.home()) not in text, path


def test_a_seed_decides_the_files(base: BaseMade, tmp_path: Path) -> None:
    again = make_base(tmp_path / "again", seed=0, steps=4)
    for path in base.folder.iterdir():
        assert path.read_bytes() == (again.folder / path.name).read_bytes(), path
    other = make_base(tmp_path / "other", seed=1, steps=4)
    weights = "model.safetensors"
    assert (other.folder / weights).read_bytes() != (base.folder / weights).read_bytes()
    first, second, third = (tmp_path / name for name in "abc")
    for folder, seed in ((first, 0), (second, 0), (third, 1)):
        make_rows(folder, seed=seed)
    for path in first.rglob("*.jsonl"):
        place = path.relative_to(first)
        assert path.read_bytes() == (second / place).read_bytes(), path
        assert path.read_bytes() != (third / place).read_bytes(), path


def test_each_skill_has_rows_of_its_own_and_so_has_the_task(tmp_path: Path) -> None:
    unseen = make_rows(tmp_path, seed=0)
    assert unseen == tmp_path / "es-animals-fr-does"
    assert {path.name for path in tmp_path.iterdir()} == {*SKILLS, unseen.name}
    trained = {row["input"] for name in SKILLS for row in _lines(tmp_path / name / "train.jsonl")}
    said = {f"say: {codeswitch.say(sentence)} =>" for sentence in codeswitch.split(0).train}
    for name in (*SKILLS, unseen.name):
        train, test = (_lines(tmp_path / name / f"{part}.jsonl") for part in ("train", "test"))
        assert (len(train), len(test)) == (64 if name == unseen.name else SKILL_ROWS, 100)
        assert {tuple(row) for row in train + test} == {("input", "output")}
        held_out = {row["input"] for row in test}
        assert not held_out & {row["input"] for row in train}
        assert not held_out & (trained | said)
        if name in SKILLS:
            wanted = codeswitch.task_rows([name], codeswitch.split(0).test[:100])
            assert test == [dict(row) for row in wanted]
    assert not {row["input"] for row in _lines(unseen / "train.jsonl")} & (trained | said)


def test_training_leaves_torch_as_it_was(tmp_path: Path) -> None:
    threads, drawn = torch.get_num_threads(), torch.random.get_rng_state()
    make_base(tmp_path, seed=5, steps=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_nothing_is_written_beside_progress(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    make_base(tmp_path / "base", seed=0, steps=1)
    make_rows(tmp_path / "tasks", seed=0)
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)
