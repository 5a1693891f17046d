"""A trained adapter's papers, and what the registry knows of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lorahub_registry.api.papers import enter, write_papers
from lorahub_registry.api.publish import push
from lorahub_registry.card import render
from lorahub_registry.errors import OutputError, RecipeError
from lorahub_registry.lock import Lock
from lorahub_registry.registry.records import Query, StoredAdapter
from lorahub_registry.registry.store import Registry
from tests import tiny, trained

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def folder(tiny_llama: tiny.Tiny, tmp_path: Path) -> Path:
    return trained.adapter(tiny_llama, tmp_path / "out" / "zog")


def entered(folder: Path, **more: object) -> StoredAdapter:
    with Registry() as registry:
        return enter(folder, trained.results(**more), trained.FACTORY, "f" * 64, registry)


def test_the_papers_stand_beside_the_weights(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == trained.FILES
    assert json.loads((folder / "results.json").read_text("utf-8")) == trained.results()
    assert (folder / "factory.yaml").read_text("utf-8") == trained.FACTORY
    assert Lock.load(folder / "lorareg.lock") == trained.lock()
    assert (folder / "loss.png").read_bytes().startswith(PNG)
    card = render(trained.results(), trained.FACTORY)
    assert (folder / "README.md").read_text("utf-8") == card


def test_numbers_that_json_has_no_word_for_become_null(
    tiny_llama: tiny.Tiny, tmp_path: Path
) -> None:
    told = trained.results(loss=((1, math.inf), (2, 1.5)), validation_loss=[(2, math.nan)])
    told["test"][1]["nll_stderr"] = math.nan
    target = trained.weights(tiny_llama, tmp_path / "zog")
    found = write_papers(target, told, trained.FACTORY, trained.lock())

    def refuse(name: str) -> None:
        raise ValueError(name)

    text = (target / "results.json").read_text("utf-8")
    assert json.loads(text, parse_constant=refuse) == found
    assert found["loss"] == [[1, None], [2, 1.5]]
    assert found["validation_loss"] == [[2, None]]
    assert found["test"][1]["nll_stderr"] is None
    assert (target / "loss.png").read_bytes().startswith(PNG)


def test_the_curve_shows_its_facts(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    def drawn(name: str, **more: object) -> bytes:
        made = trained.adapter(tiny_llama, tmp_path / name, **more)
        return (made / "loss.png").read_bytes()

    first = drawn("a")
    assert drawn("b") == first
    changes = [
        {"loss": [[1, 2.75], [12, 2.5], [24, 0.5]]},
        {"validation_loss": []},
        {"best_step": 20},
        {"stopped": "early: no gain over 3 evaluations"},
        {"loss": [[1, 2.75]], "validation_loss": []},
    ]
    pictures = {first, *(drawn(f"c{n}", **more) for n, more in enumerate(changes))}
    assert len(pictures) == 1 + len(changes)


def test_a_single_point_is_seen(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    from matplotlib.image import imread

    more = {"loss": [[1, 2.75]], "validation_loss": []}
    picture = imread(trained.adapter(tiny_llama, tmp_path / "zog", **more) / "loss.png")
    height, width, _ = picture.shape
    blue = abs(picture[:, :, :3] * 255 - [31, 119, 180]).max(axis=2) < 2
    middle = blue[height // 4 : 3 * height // 4, width // 3 : 2 * width // 3]
    assert middle.any()  # the legend is in a corner


def test_without_a_step_there_is_no_curve(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    made = trained.adapter(tiny_llama, tmp_path / "zog", loss=[], validation_loss=[])
    assert not (made / "loss.png").exists()
    assert "loss.png" not in (made / "README.md").read_text("utf-8")


def test_the_registry_knows_how_it_came_about(folder: Path) -> None:
    stored = entered(folder)
    with Registry() as registry:
        assert registry.get("zog") == stored
        assert registry.counts()["adapters"] == 1
    record, lineage = stored.record, stored.mixture
    assert record.description == "Every name becomes Zog."
    assert (record.base.name, record.base.how) == ("tiny-llama", "given")
    assert (record.local_path, record.rank) == (str(folder), 4)
    assert record.repo.license == "apache-2.0"
    assert {f.name for f in record.files} == set(trained.FILES)
    assert {(s.name, s.source, s.evidence) for s in record.skills} == {
        ("names", "user", "factory.yaml"), ("translation:zog", "user", "factory.yaml"),
    }  # fmt: skip
    assert lineage is not None
    assert (lineage.method, lineage.seed, lineage.members) == ("train LoRA", 7, ())
    assert lineage.verdict == trained.results()["verdict"]["text"]
    assert lineage.recipe_yaml == trained.FACTORY
    assert lineage.recipe_digest == "f" * 64


def test_its_scores_and_its_base_s_are_measured_ones(folder: Path) -> None:
    scores = {(s.task, s.metric): s for s in entered(folder).record.scores}
    assert {key: s.value for key, s in scores.items()} == {
        ("zog-test", "nll"): 0.625,
        ("zog-test", "exact_match"): 0.875,
        ("zog-test, base", "nll"): 2.5,
        ("zog-test, base", "exact_match"): 0.0,
    }
    for score in scores.values():
        assert (score.source, score.n, score.few_shot) == ("measured", 200, 0)
        assert score.dataset == f"zog-test.jsonl@{trained.SHA[:12]}"
        assert score.revision == trained.DIGEST[:12]
    assert scores["zog-test", "exact_match"].stderr == 0.02


def test_a_search_for_its_skill_finds_it(folder: Path) -> None:
    entered(folder)
    with Registry() as registry:
        for query in (
            Query(skills=("names",), base="tiny-llama"),
            Query(skills=("translation:zog",)),
            Query(text="becomes"),
            Query(min_scores={"zog-test/exact_match": 0.8}),
        ):
            assert [a.record.name for a in registry.search(query).adapters] == ["zog"]
        assert [a.record.name for a in registry.list()] == ["zog"]
        assert registry.search(Query(skills=("code",))).adapters == ()


def test_entered_again_it_is_one_with_its_new_scores(folder: Path) -> None:
    first = entered(folder)
    again = entered(folder, test=None, skills=["names"])
    assert again.id == first.id
    better = [
        trained.measured("base", "base", 2.5, None), trained.measured("zog", "adapter", 0.5, None),
    ]  # fmt: skip
    last = entered(folder, test=better, method="rsLoRA")
    assert {(s.task, s.value) for s in last.record.scores if s.metric == "nll"} == {
        ("zog-test", 0.5), ("zog-test, base", 2.5),
    }  # fmt: skip
    assert last.mixture is not None
    assert last.mixture.method == "train rsLoRA"


def test_trained_anew_it_loses_the_scores_of_its_former_tensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    before = entered(folder)
    file = folder / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    after = entered(folder, test=None)
    assert after.id == before.id
    assert after.record.digest != before.record.digest
    assert len(before.record.scores) == 4
    assert after.record.scores == ()


def test_one_that_was_not_measured_enters_without_scores(folder: Path) -> None:
    told = trained.results(test=None, description="")
    del told["verdict"]
    told["data"]["test"] = None
    with Registry() as registry:
        stored = enter(folder, told, trained.FACTORY, "f" * 64, registry)
    assert stored.record.scores == ()
    assert stored.mixture is not None
    assert stored.mixture.verdict == "not evaluated"
    assert stored.record.description == "trained by LoRA: not evaluated"


def test_two_of_one_factory_keep_their_own_texts(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    with Registry() as registry:
        for name in ("zog", "arr"):
            made = trained.adapter(tiny_llama, tmp_path / name, name=name)
            enter(made, trained.results(name=name), f"name: {name}\n", f"{name}-digest", registry)
        for name in ("zog", "arr"):
            lineage = registry.get(name).mixture
            assert lineage is not None
            assert lineage.recipe_yaml == f"name: {name}\n"


def test_a_local_base_is_found_again(folder: Path, tiny_llama: tiny.Tiny) -> None:
    with Registry() as registry:
        assert registry.base_folder("tiny-llama") is None
        enter(
            folder, trained.results(), trained.FACTORY, "f" * 64, registry,
            base_folder=tiny_llama.folder,
        )  # fmt: skip
        assert registry.base_folder("tiny-llama") == tiny_llama.folder


def test_stock_peft_loads_it_as_the_card_says(folder: Path, tiny_llama: tiny.Tiny) -> None:
    import torch
    from peft import PeftModel

    card = (folder / "README.md").read_text("utf-8")
    said = card.split("```python\n")[1].split("```")[0].replace("OWNER/zog", str(folder))
    names: dict[str, object] = {}
    exec(said.replace('"tiny-llama"', repr(str(tiny_llama.folder))), names)
    model = names["model"]
    assert isinstance(model, PeftModel)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert not torch.allclose(model(ids).logits, tiny_llama.model()(ids).logits)


def test_an_unknown_licence_is_not_published(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    made = trained.adapter(tiny_llama, tmp_path / "zog", license=None)
    with pytest.raises(RecipeError, match="zog: its licence is unknown") as caught:
        push(made, "me/zog", dry_run=True)
    assert caught.value.hint == ("say it in the factory (license: …), and train again with --force")


def test_facts_that_are_missing_leave_an_error(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    told = trained.results()
    del told["lora"]
    target = trained.weights(tiny_llama, tmp_path / "zog")
    with pytest.raises(OutputError, match="'lora'"):
        write_papers(target, told, trained.FACTORY, trained.lock())
