"""Talk to adapters side by side."""

import pytest

from tests.cli.conftest import edit_config


def _answers(done):
    return {(row["prompt"], row["name"]): row["text"] for row in done.json}


def test_an_adapter_answers_beside_the_base_and_others(lorareg, kitchen):
    lorareg("add", "loras")
    base = ("--base", "tiny-llama", "--max-new-tokens", "12", "--json")
    done = lorareg("generate", "plain", "ab cd", "xy", "--against", "base, wide", *base)
    answers = _answers(done)
    assert list(answers) == [
        (prompt, name) for prompt in ("ab cd", "xy") for name in ("plain", "base", "wide")
    ]
    assert len({answers["ab cd", name] for name in ("plain", "base", "wide")}) == 3
    alone = _answers(lorareg("generate", "wide", "ab cd", *base))
    assert alone["ab cd", "wide"] == answers["ab cd", "wide"]


def test_a_mixture_knows_its_base_and_its_template(lorareg, kitchen):
    lorareg("compose", kitchen.recipe(
        adapters=[{"ref": "./loras/plain", "coefficient": 1}],
        method={"type": "linear"},
        data={"template": "Q: {{ input }} A:"},
    ))  # fmt: skip
    options = ("--max-new-tokens", "8", "--json")
    own = lorareg("generate", "blend", "ab", *options).json
    same = lorareg("generate", "blend", "ab", "--template", "Q: {{ input }} A:", *options).json
    other = lorareg("generate", "blend", "ab", "--template", "{{ input }}", *options).json
    assert own == same
    assert own != other


def test_what_no_sum_expresses_answers_through_peft(lorareg, kitchen):
    import lorahub_registry as lr

    for kind in ("dora", "modules_to_save"):
        kitchen.lora(kind)
        base = ("--base", "./tiny-llama", "--max-new-tokens", "6", "--json")
        said = lorareg("generate", f"loras/{kind}", "ab cd", "--against", "base", *base)
        answers = _answers(said)
        loaded = lr.load(f"loras/{kind}", base="./tiny-llama")
        assert answers["ab cd", kind] == loaded.generate("ab cd", max_new_tokens=6)


def test_prompts_come_from_stdin_line_by_line(lorareg, kitchen):
    lorareg("add", "loras")
    done = lorareg("generate", "plain", "--base", "./tiny-llama", "--max-new-tokens", "2", "--json",
                   input="one\n\ntwo\n")  # fmt: skip
    assert [row["prompt"] for row in done.json] == ["one", "two"]


def test_no_prompt_at_all(lorareg):
    said = lorareg.fails("generate", "plain", code=2)
    assert "Error: there is no prompt" in said
    assert 'lorareg generate REF "Once upon a time"' in said


def test_sampling_takes_a_seed(lorareg, kitchen):
    lorareg("add", "loras")
    options = ("--base", "tiny-llama", "--temperature", "2", "--max-new-tokens", "12", "--json")
    first, again, other = (
        lorareg("generate", "plain", "ab", *options, "--seed", seed).out for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_name_twice(lorareg, kitchen):
    lorareg("add", "loras")
    said = lorareg.fails("generate", "plain", "x", "--against", "plain", code=2)
    assert "Error: 'plain' is named twice" in said


def test_an_adapter_of_another_base_is_not_asked(lorareg, kitchen):
    edit_config(kitchen / "loras/wide", base_model_name_or_path="me/other-1b")
    lorareg("add", "loras")
    lorareg("compose", kitchen.recipe(
        adapters=["./loras/plain"], data={"train": {"path": "train.jsonl"}}
    ))  # fmt: skip
    said = lorareg.fails("generate", "blend", "x", "--against", "wide")
    assert "Error: wide was made for me/other-1b, not for tiny-llama" in said


def test_an_unknown_base_is_asked_for(lorareg, kitchen):
    edit_config(kitchen / "loras/plain", base_model_name_or_path=None)
    lorareg("add", "loras")
    said = lorareg.fails("generate", "plain", "x")
    assert "Error: plain does not say which base it was made for" in said
    assert "Hint: name it: --base ID" in said


@pytest.mark.parametrize("option", [("--temperature", "-1"), ("--max-new-tokens", "0")])
def test_numbers_that_make_no_sense(option, lorareg):
    said = lorareg.fails("generate", "plain", "x", *option, code=2)
    assert f"Invalid value for '{option[0]}'" in said


def test_long_answers_stand_below_their_prompt_and_steer_nothing(lorareg, kitchen, monkeypatch):
    lorareg("add", "loras")
    monkeypatch.setattr("lorahub_registry.api.talk._answer", lambda *_: "first\nsecond\x1b[31m")
    asked = ("generate", "plain", "ab", "--against", "base", "--base", "tiny-llama")
    assert lorareg(*asked).lines == [
        "ab",
        "  plain  first",
        "         second\N{REPLACEMENT CHARACTER}[31m",
        "  base   first",
        "         second\N{REPLACEMENT CHARACTER}[31m",
    ]
    assert lorareg(*asked, "-q").lines == ["first second\N{REPLACEMENT CHARACTER}[31m"] * 2
    assert lorareg(*asked, "--json").json[0]["text"] == "first\nsecond\x1b[31m"
