import re
from pathlib import Path

import pytest

from lorahub_registry.errors import RecipeError
from lorahub_registry.recipes import (
    Learn,
    Linear,
    LoraHub,
    OutputRank,
    RefEntry,
    SearchEntry,
    from_mapping,
    load,
    parse,
)
from tests.recipes import GOOD, LINEAR


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    return caught.value.problems


def changed(old: str, new: str, text: str = GOOD) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


def test_a_recipe_is_read_as_it_is_written() -> None:
    recipe = parse(GOOD)
    plain, named, search = recipe.adapters
    assert isinstance(plain, RefEntry)
    assert plain.ref == "someone/many-loras/chat/v3"
    assert isinstance(named, RefEntry)
    assert (named.ref, named.name) == ("me/sql-lora@3f2a", "sql")
    assert isinstance(search, SearchEntry)
    assert search.search.skill == ("code",)
    assert search.search.rank_bounds == (8, 64)
    assert search.search.min_score == {"humaneval": 30.0}
    assert isinstance(recipe.method, Learn)
    assert (recipe.method.form, recipe.method.bounds, recipe.method.l1) == ("delta", 1.5, 0.05)
    assert recipe.data.train is not None
    assert recipe.data.train.limit == 64
    assert recipe.output.rank == OutputRank(rank=64)
    assert recipe.declared_license == "apache-2.0"


def test_what_is_left_out_has_the_documented_default() -> None:
    recipe = parse(LINEAR)
    assert isinstance(recipe.method, Linear)
    assert recipe.data.test is None
    assert recipe.data.template == "{{ input }} "
    assert recipe.evaluate == ("nll",)
    assert recipe.output.rank.full
    assert (recipe.seed, recipe.device, recipe.dtype) == (0, "auto", "auto")
    assert recipe.publish is None
    assert not recipe.allow_base


def test_lorahub_is_the_published_preset() -> None:
    method = parse(changed("type: learn, budget: 40", "type: lorahub")).method
    assert isinstance(method, LoraHub)
    assert (method.budget, method.bounds, method.l1, method.optimizer) == (40, 1.5, 0.05, "NGOpt")
    assert (method.form, method.init, method.objective) == ("factor", 0.0, "published")


def test_a_preset_does_not_take_what_it_fixes() -> None:
    (told,) = problems(changed("type: learn", "type: lorahub, form: delta"))
    assert told.startswith("line 8: method.form: unknown key")


def test_every_error_is_told_at_once_with_its_line() -> None:
    text = """\
version: 1
name: ../evil
base: mistral-7b
adapters:
  - one/a
  - {ref: one/b, name: sql, coefficient: 0.4}
  - {search: {skill: code, min_score: {humaneval: high}}}
  - {search: {skil: code}, limit: 3}
  - 5
  - {name: foo}
method: {type: learn, budgte: 40, budget: yes, optimizer: NGOp, init: 3}
data:
  train: {path: examples.txt, limit: 64}
  test: {path: heldout.jsonl, select: random}
  template: "{{ input } "
evaluate: [nll, exact]
output: {path: out, rank: 0, dtype: bf16}
publish: {repo: me/some/where, private: 1, license: apache-2.0}
seed: true
license: mit
device: gpu
trust_remote_code: true
"""
    told = problems(text)
    keys = [re.match(r"line \d+: [^:]+", t)[0] for t in told]  # type: ignore[index]
    assert keys == [
        "line 2: name",
        "line 6: adapters[1].coefficient",
        "line 7: adapters[2].search.min_score.humaneval",
        "line 7: adapters[2].limit",
        "line 8: adapters[3].search.skil",
        "line 9: adapters[4]",
        "line 10: adapters[5].ref",
        "line 11: method.optimizer",
        "line 11: method.budget",
        "line 11: method.init",
        "line 11: method.budgte",
        "line 13: data.train.path",
        "line 14: data.test.select",
        "line 15: data.template",
        "line 16: evaluate[1]",
        "line 17: output.rank",
        "line 17: output.dtype",
        "line 18: publish.repo",
        "line 18: publish.private",
        "line 18: publish.license",
        "line 19: seed",
        "line 21: device",
        "line 22: trust_remote_code",
    ]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("budget: 40", "budgte: 40", "line 8: method.budgte: unknown key, did you mean 'budget'?"),
        ("output: {", "ouput: {", "line 14: ouput: unknown key, did you mean 'output'?"),
        ("skill: code", "skil: code", "adapters[2].search.skil: unknown key, did you mean 'skill'"),
        ("limit: 3", "limt: 3", "adapters[2].limt: unknown key, did you mean 'limit'?"),
        ("limit: 64", "limits: 64", "data.train.limits: unknown key, did you mean 'limit'?"),
        ("private: true", "privat: true", "publish.privat: unknown key, did you mean 'private'?"),
        ("device: auto", "device: gpu", "device: must be one of auto, cpu, cuda, mps; got 'gpu', "),
        ("device: auto", "device: gpu", "did you mean 'cuda'?"),
        ("dtype: bfloat16", "dtype: bf16", "did you mean 'bfloat16'?"),
        (
            "type: learn",
            "type: lern",
            "line 8: method.type: no method 'lern', did you mean 'learn'",
        ),
        ("type: learn", "type: svd", "the methods are linear, factor, ties, dare_linear, dare"),
        ("type: learn, ", "", "method.type: is missing; the methods are linear, factor, ties"),
        ("version: 1", "version: 2", "line 1: version: must be 1; got 2"),
        ("budget: 40", "budget: yes", "method.budget: needs a whole number, got 'yes'"),
        ("budget: 40", "budget: true", "method.budget: needs a number, got true"),
        ("budget: 40", "budget: 0", "method.budget: must be at least 1, got 0"),
        ("budget: 40", "budget: 1.5", "method.budget: needs a whole number, got 1.5"),
        ("budget: 40", "bounds: 0", "method.bounds: must be more than 0, got 0"),
        ("budget: 40", "bounds: .inf", "method.bounds: needs a finite number, got inf"),
        ("budget: 40", "init: -2", "method.init: must lie within ± bounds (1.5), got -2"),
        ("budget: 40", "init: 1.51", "method.init: must lie within ± bounds (1.5), got 1.51"),
        ("budget: 40", "init: .nan", "method.init: needs a finite number, got nan"),
        ("budget: 40", "target: .nan", "method.target: needs a finite number, got nan"),
        ("budget: 40", "patience: 0", "method.patience: must be at least 1, got 0"),
        ("budget: 40", "tolerance: -1", "method.tolerance: must be at least 0, got -1"),
        ("budget: 40", "folds: 1", "method.folds: must be at least 2, got 1"),
        ("budget: 40", "screen: {keep: 0}", "method.screen.keep: must be at least 1, got 0"),
        ("budget: 40", "screen: {kep: 3}", "method.screen.kep: unknown key, did you mean 'keep'?"),
        ("budget: 40", "folds: 3, seeds: 3", "method: takes folds or seeds, not both"),
        ("budget: 40", "form: factor, per: module", "method: per: module needs form: delta"),
        ("budget: 40", "layer_groups: 3", "method: layer_groups is for per: layer_group"),
        ("budget: 40", "gradient: adam", "method: gradient is for optimizer: gradient"),
        ("budget: 40", "optimizer: NGOpd", "'NGOpd' is no optimizer of nevergrad, did you mean "),
        ("budget: 40", "optimizer: gradent", "did you mean 'gradient'?"),
        ("budget: 40", "optimizer: zzzzzz", "common ones are NGOpt, CMA, DE, PSO"),
        ("budget: 40", "optimizer: gradient, num_workers: 2", "and gradient does not"),
        ("budget: 40", "optimizer: Cobyla, num_workers: 2", "and Cobyla does not"),
        ("budget: 40", "optimizer: NelderMead, num_workers: 2", "and NelderMead does not"),
        ("type: learn", "type: lorahub, optimizer: gradient", "the published search uses none"),
        ("type: learn", "type: lorahub, form: delta", "method.form: unknown key"),
        ("seed: 0", "seed:", "line 16: seed: needs a whole number, it is empty"),
        ("name: code-and-chat", "name: 2024", "name: needs text, got 2024; put it in quotes"),
        ("name: code-and-chat", "name: a/b", "name: 'a/b' cannot be a name"),
        ("name: code-and-chat", "name: a\\b", "name: 'a\\\\b' cannot be a name"),
        ("name: code-and-chat", "name: ..", "name: '..' cannot be a name"),
        ("name: code-and-chat", "name: NUL", "name: 'NUL' cannot be a name"),
        ("name: code-and-chat\n", "", "line 1: name: is missing"),
        ("name: sql", 'name: "0"', "adapters[1].name: '0' is a bare number; put a letter before"),
        ("name: sql", "name: ../sql", "adapters[1].name: '../sql' cannot be a name"),
        ("rank: 8..64", "rank: 64..8", "search.rank: must be a rank or a range as 8..64"),
        ("rank: 8..64", "sort: best", "search.sort: must be one of downloads, updated, rank, name"),
        ("[nll, exact_match]", "[nll, nll]", "evaluate: names a metric twice"),
        ("[nll, exact_match]", "[]", "evaluate: needs at least one"),
        ("[nll, exact_match]", "nll", "evaluate: needs a list, got 'nll'"),
        ("rank: 64,", "rank: some,", "output.rank: must be full, a whole number, or energy 0.99;"),
        ("rank: 64,", "rank: energy 1.5,", "output.rank: energy is a share above 0 and up to 1"),
        ("private: true", "private: 1", "publish.private: needs true or false, got 1"),
        ("repo: me/code-and-chat", "repo: me/code/chat", "publish.repo: must be owner/name"),
        ("repo: me/code-and-chat", "repo: me/code@v1", "publish.repo: must be owner/name"),
        ("apache-2.0", "Apache License", "publish.license: 'Apache License' is not a licence id"),
        ("heldout.jsonl", "heldout.txt", "data.test.path: must end in one of .jsonl, .json"),
        ("heldout.jsonl", "https://x.y/z.csv", "data.test.path: must be a file on this machine"),
        ("select: random", "select: last", "data.train.select: must be one of first, random"),
        ("limit: 64, select: random", "select: diverse", "diverse takes some of the rows: say how"),
        ("limit: 64, ", "", "data.train.select: random takes some of the rows: say how many"),
        ('"{{ input }} "', "{{ input }} ", "line 12: a key must be plain text (a template that"),
        ('"{{ input }} "', '"{{ response }}"', "template: shows the answer ('response' of train)"),
        ('"{{ input }} "', '"{{ output }}"', "data.template: shows the answer (output)"),
        ("base: mistralai/Mistral-7B-v0.1", 'base: "a\\nb"', "base: holds a line break"),
        ("seed: 0", "license: mit", "publish.license: is 'apache-2.0', but license says 'mit'"),
        ("seed: 0", "seed: 1\nseed: 2", "line 17: seed: given twice (first on line 16)"),
    ],
)
def test_a_fault_is_told_in_plain_words(old: str, new: str, told: str) -> None:
    found = problems(changed(old, new))
    assert any(told in p for p in found), found


def test_an_unknown_key_is_the_only_thing_told_about_it() -> None:
    assert problems(changed("budget: 40", "budgte: 40")) == (
        "line 8: method.budgte: unknown key, did you mean 'budget'?",
    )


def test_an_unknown_key_without_a_neighbour_lists_the_known_ones() -> None:
    (told,) = problems(changed("private: true", "zzz: 1"))
    assert told.endswith("unknown key; known here: repo, private, create_pr, license")


def test_no_message_speaks_the_validator_s_jargon() -> None:
    nothing = "version: []\nname: {}\nbase: []\nadapters: 3\nmethod: []\noutput: 1\ndata: [1]\n"
    told = "\n".join(problems(nothing))
    assert not re.search(r"pydantic|Input should|valid dictionary|type=|union|tuple", told), told


def test_linear_wants_a_coefficient_for_each_adapter() -> None:
    text = changed("{ref: ./two, coefficient: 0.5}", "./two", LINEAR)
    assert problems(text) == (
        "line 6: adapters[1]: method linear needs its coefficient here (coefficient: NUMBER)",
    )


def test_linear_does_not_take_a_search() -> None:
    text = changed("{ref: ./two, coefficient: 0.5}", "{search: {skill: code}, limit: 2}", LINEAR)
    (told,) = problems(text)
    assert "a search gives none" in told


@pytest.mark.parametrize("method", ["learn", "lorahub"])
def test_a_coefficient_under_a_method_that_learns_is_an_error_that_says_so(method: str) -> None:
    text = changed("type: linear", f"type: {method}", LINEAR) + "data: {train: {path: a.csv}}\n"
    assert problems(text) == tuple(
        f"line {5 + i}: adapters[{i}].coefficient: method {method} learns the coefficients; "
        "remove this one, or use linear"
        for i in range(2)
    )


@pytest.mark.parametrize("method", ["learn", "lorahub"])
def test_methods_that_learn_want_rows_to_learn_from(method: str) -> None:
    text = changed("  train: {", "  # train: {", changed("type: learn", f"type: {method}"))
    assert f"line 9: data.train: is missing; method {method} learns from its rows" in problems(text)


def test_held_out_rows_may_be_missing() -> None:
    assert parse(changed("  test: {", "  # test: {")).data.test is None


def test_two_adapters_of_one_name_are_refused() -> None:
    text = changed("- someone/many-loras/chat/v3", "- {ref: someone/chat, name: sql}")
    assert problems(text) == ("line 6: adapters[1].name: 'sql' is the name of adapters[0] already",)


def test_one_adapter_listed_twice_is_refused() -> None:
    text = changed("- someone/many-loras/chat/v3", "- me/sql-lora@3f2a")
    (told,) = problems(text)
    assert "is the same adapter as adapters[0] already" in told


def test_an_entry_is_either_an_adapter_or_a_search() -> None:
    (told,) = problems(changed("name: sql}", "search: {skill: sql}, limit: 1}"))
    assert told.startswith("line 6: adapters[1].ref: unknown key; known here: search, limit")


def test_a_search_must_look_for_something() -> None:
    text = changed("{skill: code, rank: 8..64, min_score: {humaneval: 30}}", "{}")
    (told,) = problems(text)
    assert "adapters[2].search: says nothing to search for" in told


@pytest.mark.parametrize(
    ("written", "rank"),
    [
        ("full", OutputRank()),
        ("16", OutputRank(rank=16)),
        ('"16"', OutputRank(rank=16)),
        ("energy 0.99", OutputRank(energy=0.99)),
        ('"energy  1"', OutputRank(energy=1.0)),
        ("energy 9e-1", OutputRank(energy=0.9)),
        ("{energy: 0.99}", OutputRank(energy=0.99)),
    ],
)
def test_the_written_rank_has_three_forms(written: str, rank: OutputRank) -> None:
    assert parse(changed("rank: 64,", f"rank: {written},")).output.rank == rank


@pytest.mark.parametrize("written", ["1e-3", "1.0e-3", "0.001", "'1e-3'", '"0.001"', ".001"])
def test_numbers_are_numbers_however_they_are_written(written: str) -> None:
    method = parse(changed("budget: 40", f"l1: {written}")).method
    assert isinstance(method, Learn)
    assert method.l1 == 1e-3


def test_words_that_old_yaml_mistook_stay_words() -> None:
    text = changed("name: sql", "name: no", changed("name: code-and-chat", "name: off"))
    recipe = parse(text)
    assert recipe.name == "off"
    assert isinstance(recipe.adapters[1], RefEntry)
    assert recipe.adapters[1].name == "no"


def test_the_environment_is_never_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET", "found")
    text = changed("out/code-and-chat", "'${SECRET}/$SECRET'")
    (tmp_path / "r.yaml").write_text(text)
    file = load(tmp_path / "r.yaml")
    assert file.recipe.output.path == "${SECRET}/$SECRET"
    assert file.resolve(file.recipe.output.path) == tmp_path / "${SECRET}" / "$SECRET"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "line 1: a recipe is a mapping of keys (version, name, base, …); this is empty"),
        ("# nothing\n", "this is empty"),
        ("- a\n- b\n", "this is a list"),
        ("hello", "this is one value"),
        ("version: 1\n\tname: x\n", "line 2: a tab; YAML is indented with spaces"),
        ("version: 1\nname: [a, b\nbase: x\n", "line 3: not YAML"),
        ("version: 1\n---\nversion: 1\n", "line 2: a second document begins"),
        ("version: 1\nname: \x07\n", "line 2: holds a character that YAML does not allow"),
        ("version: 1\nname: &n x\n", "line 2: anchors and aliases (&n) are not read"),
        ("version: 1\nname: *n\n", "line 2: anchors and aliases (*n) are not read"),
        ("version: 1\nname: !!str x\n", "line 2: tags (tag:yaml.org,2002:str) are not read"),
        ("a: !!python/object/apply:os.getcwd []\n", "line 1: tags ("),
        ("[" * 100_000, "line 1: nested more than 16 levels deep"),
        ("a: " + "{b: " * 5000, "line 1: nested more than 16 levels deep"),
        ("a: " + "x" * 300_000, "line 1: larger than 256 KiB"),
    ],
)
def test_what_is_no_recipe_at_all_is_refused_with_its_line(text: str, told: str) -> None:
    (found,) = problems(text)
    assert told in found


def test_a_billion_laughs_are_not_even_started() -> None:
    lines = ["a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}]"
        for a, b in zip("abcdefg", "bcdefgh", strict=True)
    ]
    (told,) = problems("\n".join(lines))
    assert "line 1: anchors and aliases (&a) are not read" in told


def test_a_merge_key_is_a_key_like_any_other() -> None:
    (told,) = problems(GOOD + "<<: {seed: 1}\n")
    assert told.startswith("line 18: <<: unknown key")


def test_a_flood_of_problems_is_cut_and_counted() -> None:
    told = problems(GOOD + "".join(f"key{i}: 1\n" for i in range(150)))
    assert len(told) == 101
    assert told[-1] == "and 50 more"


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe") as caught:
        load(tmp_path / "absent.yaml")
    assert caught.value.hint


def test_a_folder_and_foreign_bytes_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"version: 1\nname: caf\xe9\n")
    with pytest.raises(RecipeError, match="line 2: not UTF-8 text"):
        load(tmp_path / "latin.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * 300_000)
    with pytest.raises(RecipeError, match="larger than 256 KiB"):
        load(tmp_path / "big.yaml")


def test_paths_count_from_the_recipe_s_folder(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("\ufeff" + GOOD, encoding="utf-8")
    file = load(str(tmp_path / "r.yaml"))
    assert file.text == GOOD
    assert file.folder == tmp_path
    assert file.resolve("heldout.jsonl") == tmp_path / "heldout.jsonl"
    assert file.resolve("/data/x.csv") == Path("/data/x.csv")


def test_the_message_names_the_file() -> None:
    with pytest.raises(RecipeError, match=r"^mine\.yaml: not a valid recipe:\n  line 1: ver"):
        parse(changed("version: 1", "version: one"), source="mine.yaml")


def test_plain_data_is_read_like_a_file_without_lines() -> None:
    data = {"version": 1, "name": "x", "base": "b", "output": {"path": "o"}}
    data |= {"adapters": [{"ref": "a/b", "coefficient": 1}], "method": {"type": "linear"}}
    assert from_mapping(data).name == "x"
    with pytest.raises(RecipeError) as caught:
        from_mapping({**data, "naem": 1})
    assert caught.value.problems == ("naem: unknown key, did you mean 'name'?",)


@pytest.mark.parametrize("name", ["base", "Mixture", "uniform"])
def test_an_adapter_cannot_be_called_as_a_row_of_the_proof_is(name):
    text = (
        f"version: 1\nname: m\nbase: b\nadapters: [{{ref: ./x, name: {name}, coefficient: 1}}]\n"
        "method: {type: linear}\noutput: {path: out}\n"
    )
    with pytest.raises(RecipeError, match="what the proof calls a row of its own"):
        parse(text)
