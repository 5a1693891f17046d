import pytest

from lorahub_registry.errors import DataError, RecipeError
from lorahub_registry.recipes import Row, render
from lorahub_registry.recipes.template import check_template

ROW = Row(
    input="Sort it",
    output="secret",
    columns={
        "instruction": "Sort it",
        "response": "secret",
        "input": "3 1 2",
        "context": None,
        "tags": ["a", "b"],
        "n": 3,
        "a column": "spaced",
    },
    output_column="response",
    place="rows.jsonl, line 7",
)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{{ input }} ", "Sort it "),
        ("{{ instruction }}: {{ row.input }}\n", "Sort it: 3 1 2\n"),
        ("{{ row['a column'] }}", "spaced"),
        ("{{ n }} {{ n + 1 }}", "3 4"),
        ("{% if context %}{{ context }}{% else %}none{% endif %}", "none"),
        ("{{ context | default('-', true) }}", "-"),
        ("{{ tags | join(', ') }}", "a, b"),
        ("{% for t in tags %}{{ loop.index }}{{ t }}{% endfor %}", "1a2b"),
        ("{{ tags | tojson }}", '["a", "b"]'),
        ("{{ '<é>' | tojson }}", '"<é>"'),
        ("{{ input.upper() }}", "SORT IT"),
        ("{{ input | replace('it', 'them') }}", "Sort them"),
        ("<b>{{ input }}</b>\n\n", "<b>Sort it</b>\n\n"),
    ],
)
def test_a_prompt_is_what_the_template_says(template: str, prompt: str) -> None:
    assert render(check_template(template), ROW) == prompt


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("{{ input", "is not a Jinja template"),
        ("a\n{% if x %}", "its line 2"),
        ("{{ input | shout }}", "No filter named 'shout'"),
        ("{{ input | center(1000000000) }}", "No filter named 'center'"),
        ("{{ input | random }}", "No filter named 'random'"),
        ("{{ output }}", "shows the answer"),
        ("{% include 'x' %}", "uses include"),
        ("{% import 'x' as x %}", "uses import"),
        ("{% extends 'x' %}", "uses extends"),
        ("{% macro m() %}{{ m() }}{% endmacro %}", "uses macro"),
        ("{% set a = input ~ input %}{{ a }}", "uses set"),
        ("{% with a = input %}{{ a }}{% endwith %}", "uses with"),
        ("{{ 'a' * 1000000000 }}", "uses the operator *"),
        ("{{ 9 ** 9 ** 9 }}", "uses the operator **"),
        ("{{ '%1000000000d' % 1 }}", "uses the operator %"),
        ("{{ range(9) }}", "calls something else"),
        ("{{ input.ljust(1000000000) }}", "calls something else"),
        ("{{ '{:>1000000000}'.format(1) }}", "calls something else"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "calls something else"),
        ("{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}", "a loop inside a loop"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("x" * 20_001, "20000 are the most"),
    ],
)
def test_a_template_that_no_prompt_needs_is_refused_when_read(template: str, told: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_template(template)
    assert told in str(caught.value)


def test_a_missing_column_is_named_with_its_neighbour_and_the_row() -> None:
    with pytest.raises(DataError, match="there is no column 'instructon', did you mean 'instru"):
        render("{{ instructon }}", ROW)
    with pytest.raises(DataError, match=r"^rows\.jsonl, line 7: ") as caught:
        render("{{ nowhere }}", ROW)
    assert caught.value.hint is not None
    assert "a column" in caught.value.hint
    assert "response" not in caught.value.hint


@pytest.mark.parametrize(
    "template", ["{{ response }}", "{{ row.response }}", "{{ row['response'] }}"]
)
def test_the_answer_is_never_in_reach(template: str) -> None:
    with pytest.raises(DataError):
        render(template, ROW)
    assert "secret" not in render("{{ row | tojson }}", ROW)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ context }}", "empty (null)"),
        ("{{ tags }}", "a list"),
        ("{{ row }}", "an object"),
        ("{{ input.upper }}", "not text"),
        ("{{ row.nowhere }}", "no attribute 'nowhere'"),
        ("{{ input + n }}", "cannot be filled"),
        ("{{ ''.__class__.__mro__ }}", "cannot be filled"),
        ("{{ 1 / 0 }}", "cannot be filled"),
        ("{{ input | replace('', 'a' ~ input) " + "| replace('', input) " * 9 + "}}", "grows over"),
    ],
)
def test_what_would_not_be_text_is_refused_for_its_row(template: str, told: str) -> None:
    with pytest.raises(DataError) as caught:
        render(template, ROW)
    assert str(caught.value).startswith("rows.jsonl, line 7: ")
    assert told in str(caught.value)


def test_rendering_what_does_not_compile_is_the_recipe_s_error() -> None:
    with pytest.raises(RecipeError, match=r"data\.template is not a Jinja template"):
        render("{{", ROW)


def test_the_chat_template_is_not_ours_to_render() -> None:
    assert check_template("chat") == "chat"
    with pytest.raises(ValueError, match="tokenizer"):
        render("chat", ROW)


WORDS = "Write a response that appropriately completes the request.\n\n### Instruction:\n"


@pytest.mark.parametrize(
    ("columns", "column", "prompt"),
    [
        ({"instruction": "add", "input": "2 2", "output": "4"}, "instruction",
         "Below is an instruction that describes a task, paired with an input that provides "
         f"further context. {WORDS}add\n\n### Input:\n2 2\n\n### Response:\n"),
        ({"instruction": "add", "input": "", "output": "4"}, "instruction",
         f"Below is an instruction that describes a task. {WORDS}add\n\n### Response:\n"),
        ({"instruction": "add", "input": "2 2", "output": "4"}, "input",
         "Below is an instruction that describes a task, paired with an input that provides "
         f"further context. {WORDS}add\n\n### Input:\n2 2\n\n### Response:\n"),
        ({"question": "2 2?", "output": "4"}, "question",
         f"Below is an instruction that describes a task. {WORDS}2 2?\n\n### Response:\n"),
        ({"input": "2 2?", "output": "4"}, "input",
         f"Below is an instruction that describes a task. {WORDS}2 2?\n\n### Response:\n"),
    ],
)  # fmt: skip
def test_alpaca_s_words_have_a_name(columns: dict[str, str], column: str, prompt: str) -> None:
    assert check_template("alpaca") == "alpaca"
    row = Row(columns[column], columns["output"], columns, "output", "a.json, row 1")
    assert render("alpaca", row) == prompt
