"""The package as a notebook imports it."""

import subprocess
import sys

import pytest
import torch
from peft import PeftModel

import lorahub_registry as lr
from tests.cli.conftest import ROOT, edit_config
from tests.hub.made import BASE, adapter, card


def test_everything_that_is_promised_is_there():
    assert set(lr.__all__) <= set(dir(lr))
    assert [name for name in lr.__all__ if not callable(getattr(lr, name))] == []
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        lr.serach  # noqa: B018


def test_functions_stay_what_they_are_when_rooms_of_their_name_are_imported():
    script = (
        "import lorahub_registry as lr\n"
        "import lorahub_registry.card, lorahub_registry.compose\n"
        "from lorahub_registry.card import cell\n"
        "from lorahub_registry import card, compose\n"
        "print(lr.card.__module__, lr.compose.__module__, card is lr.card, compose is lr.compose)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    said = "lorahub_registry.api.publish lorahub_registry.api.mix True True\n"
    assert done.stdout == said, done.stderr


def test_sync_search_and_pull(hub):
    hub.add_repo("me/one", adapter(rank=8) | {"README.md": card(tags=["code"])})
    hub.add_repo("me/two", adapter(rank=64, fill=2) | {"README.md": card(tags=["code"])})
    assert lr.sync(BASE).new == 2
    found = lr.search(base="mistral-7b", skill="code", rank="32..")
    assert found.bases == (BASE,)
    [two] = found.adapters
    assert (two.record.name, two.record.weights, found.total) == ("two", "listed", 1)
    assert lr.search(base="mistral-7b", skill=["code", "sql"]).total == 0
    pulled = lr.pull("me/two")
    [here] = pulled.adapters
    assert here.folder.joinpath("adapter_model.safetensors").is_file()
    assert pulled.commit == hub.sha("me/two")
    with lr.Registry() as registry:
        assert registry.get("me/two").record.local_path == str(here.folder)


def test_a_dry_pull_gets_nothing_and_makes_no_registry(hub, database):
    hub.add_repo("me/one", adapter())
    database.unlink()
    result = lr.pull("me/one", dry_run=True)
    assert [a.subfolder for a in result.found] == [""]
    assert result.missing_bytes > 0
    assert result.adapters == ()
    assert not database.exists()


def test_errors_have_one_root_and_a_hint(hub):
    with pytest.raises(lr.LoraregError, match="me/gone: no such repo") as caught:
        lr.pull("me/gone")
    assert "check the spelling" in caught.value.hint
    with pytest.raises(lr.LoraregError, match="is not a rank"):
        lr.search(rank="many")


def test_compose_takes_a_file_or_plain_data(kitchen):
    first = lr.compose(str(kitchen.recipe()))
    data = {
        "version": 1,
        "name": "blend",
        "base": "./tiny-llama",
        "adapters": ["./loras/plain", "./loras/wide"],
        "method": {"type": "learn", "budget": 4},
        "data": {"train": {"path": "train.jsonl"}, "test": {"path": "test.jsonl"}},
        "output": {"path": "out/again"},
    }
    second = lr.compose(data)
    assert first.coefficients == second.coefficients
    assert list(first.coefficients) == ["plain", "wide"]
    assert (first.path, second.path) == (kitchen.out, kitchen / "out/again")
    assert first.verdict == kitchen.results()["verdict"]["text"]
    assert first.url is None
    assert first.stored.mixture.verdict == first.verdict


def test_compose_takes_a_base_that_is_loaded_already(kitchen):
    recipe = kitchen.recipe(base="me/tiny-llama")
    model, tokenizer = kitchen.tiny.model(), kitchen.tiny.tokenizer()
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = lr.compose(recipe, base=(model, tokenizer))
    assert made.results["base"]["name"] == "me/tiny-llama"
    assert made.coefficients == lr.compose(kitchen.recipe(), force=True).coefficients
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not hasattr(model, "peft_config")


def test_compose_refuses_a_loaded_base_that_carries_adapters(kitchen):
    model = PeftModel.from_pretrained(kitchen.tiny.model(), str(kitchen / "loras/plain"))
    with pytest.raises(lr.LoraregError, match="carries PEFT adapters already"):
        lr.compose(kitchen.recipe(), base=(model.get_base_model(), kitchen.tiny.tokenizer()))
    assert not kitchen.out.exists()


def test_compose_into_a_registry_of_one_s_own(kitchen, tmp_path):
    with lr.Registry(tmp_path / "mine.sqlite") as mine:
        lr.compose(kitchen.recipe(), registry=mine)
        assert [a.record.name for a in mine.list(mixtures=True)] == ["blend"]
    with lr.Registry() as default:
        assert default.list() == ()


def test_load_and_generate(kitchen):
    made = lr.compose(kitchen.recipe())
    loaded = lr.load(made.path)
    text = loaded.generate("ab cd", max_new_tokens=6)
    assert isinstance(text, str)
    assert loaded.generate("ab cd", max_new_tokens=6) == text
    assert lr.load("blend").generate("ab cd", max_new_tokens=6) == text
    assert isinstance(loaded.model, PeftModel)
    assert loaded.prompt == "{{ input }} "
    hot = [loaded.generate("ab cd", temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def test_what_was_loaded_is_shown_in_a_line_and_takes_one_prompt(kitchen):
    base = (kitchen.tiny.model(), kitchen.tiny.tokenizer())
    loaded = lr.load(kitchen.lora("ia3"), base=base)
    assert repr(loaded) == "<IA3 'ia3' on 'tiny-llama', ready to generate>"
    for no_text in (["a", "b"], 3, None):
        with pytest.raises(lr.LoraregError, match="takes one prompt, a text, and was given") as no:
            loaded.generate(no_text)
        assert (repr(no_text) in str(no.value), no.value.exit_code) == (True, 2)


def test_load_answers_as_generate_does(kitchen):
    from lorahub_registry.api.talk import generate

    lr.compose(kitchen.recipe())
    with lr.Registry() as registry:
        [said] = generate("blend", ["ab"], max_new_tokens=6, registry=registry)
    assert said["blend"] == lr.load("blend").generate("ab", max_new_tokens=6)


def test_load_takes_kinds_that_no_sum_expresses(kitchen):
    folder = kitchen.lora("dora")
    base = (kitchen.tiny.model(), kitchen.tiny.tokenizer())
    assert lr.load(folder, base=base).model.peft_config["adapter"].use_dora


def test_load_never_reads_a_pickle(kitchen):
    folder = kitchen.lora("same", "pickled")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    base = (kitchen.tiny.model(), kitchen.tiny.tokenizer())
    with pytest.raises(lr.LoraregError, match="its weights are a pickle") as caught:
        lr.load(folder, base=base)
    assert "lorareg convert" in caught.value.hint


def test_load_on_another_base_takes_one_s_word_and_warns(kitchen, told):
    edit_config(kitchen / "loras/plain", base_model_name_or_path="me/other-1b")
    assert lr.load(kitchen / "loras/plain", base="./tiny-llama", progress=told).generate("ab")
    assert told.warned == ["plain was made for me/other-1b, not for tiny-llama"]


def test_load_of_what_is_not_here_says_how_to_get_it(hub):
    hub.add_repo("me/one", adapter() | {"README.md": card()})
    lr.sync(BASE)
    with pytest.raises(lr.LoraregError, match="me/one is not on this machine") as caught:
        lr.load("me/one")
    assert caught.value.hint == "lorareg pull me/one"


def test_add_push_and_card(hub, logged_in, kitchen):
    with lr.Registry() as registry:
        assert len(lr.add([kitchen / "loras"], registry=registry).added) == 2
    made = lr.compose(kitchen.recipe())
    done = lr.push(made.path, "me/blend")
    assert done.changed
    assert done.commit == hub.sha("me/blend")
    assert lr.card("blend", repo="me/other") == made.path / "README.md"
    assert "me/other" in (made.path / "README.md").read_text()


def test_those_who_watch_are_told(kitchen, told):
    lr.compose(kitchen.recipe(), progress=told)
    titles = [title for title, *_ in told.tasks]
    assert "Learning coefficients" in titles
    assert "Proving" in titles
    for _, total, done in told.tasks:
        assert total is None or done == pytest.approx(total)
