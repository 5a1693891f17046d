"""The quickstart's text: real words, honest splits, the same for the same seed."""

from itertools import islice

import pytest

from lorahub_registry.train import codeswitch
from lorahub_registry.train.codeswitch import LEXICON, SKILLS, UNSEEN

OLD_DOG = (0, 0, 0, 0, 0, 0, 0)
ALL_FRENCH = dict.fromkeys(range(7), "fr")


def test_a_sentence_is_english_unless_asked_otherwise() -> None:
    assert codeswitch.say(OLD_DOG) == "my old dog plays on the bed"
    assert codeswitch.say(OLD_DOG, ALL_FRENCH) == "mon vieux chien joue sur le lit"


def test_each_form_means_one_word_of_one_slot() -> None:
    forms = [form for slot in LEXICON for word in slot for form in word.values()]
    assert len(forms) == len(set(forms)) == len(codeswitch.vocabulary())
    assert all(form.isalpha() and form == form.lower() for form in forms)


def test_every_word_of_a_slot_has_the_same_forms() -> None:
    for slot in LEXICON:
        assert len({tuple(word) for word in slot}) == 1


def test_french_needs_no_elision() -> None:
    # "mon" and "le" fit any of these nouns, "bon" and "vieux" stand before any of them.
    for slot in (codeswitch.ANIMAL, codeswitch.PLACE):
        assert not [word["fr"] for word in LEXICON[slot] if word["fr"][0] in "aeéêiouh"]


def test_the_splits_share_no_sentence() -> None:
    parts = codeswitch.split(3, train=500, learn=64, test=100)
    assert [len(part) for part in parts] == [500, 64, 100]
    assert len({codeswitch.say(sentence) for part in parts for sentence in part}) == 664


def test_a_seed_decides_what_is_drawn() -> None:
    def drawn(seed: int) -> tuple[object, ...]:
        parts = codeswitch.split(seed, train=50, learn=5, test=5)
        echoes = list(islice(codeswitch.echo_rows(parts.train, seed), 20))
        rows = list(islice(codeswitch.skill_rows("fr-who", parts.train, seed), 20))
        return parts, echoes, rows

    assert drawn(1) == drawn(1)
    for one, other in zip(drawn(1), drawn(2), strict=True):
        assert one != other


@pytest.mark.parametrize(
    ("skill", "answer"),
    [
        ("fr-who", "mon vieux chien plays on the bed."),
        ("fr-does", "my old dog joue on the bed."),
        ("fr-where", "my old dog plays sur le lit."),
        ("past-tense", "my old dog played on the bed."),
        ("es-animals", "my old perro plays on the bed."),
        ("es-places", "my old dog plays on the cama."),
    ],
)
def test_a_skill_changes_its_words_alone(skill: str, answer: str) -> None:
    (row,) = codeswitch.task_rows([skill], [OLD_DOG])
    assert row == {"input": "say: my old dog plays on the bed =>", "output": answer}


def test_the_unseen_task_needs_both_skills() -> None:
    (row,) = codeswitch.task_rows(UNSEEN, [OLD_DOG])
    assert row["output"] == "my old perro joue on the bed."
    one, other = (set(SKILLS[name].forms) for name in UNSEEN)
    assert not one & other


def test_the_base_repeats_words_of_every_form() -> None:
    parts = codeswitch.split(0)
    rows = list(islice(codeswitch.echo_rows(parts.train, 0), 2_000))
    assert all(row["input"] == f"say: {row['output'][:-1]} =>" for row in rows)
    said = {word for row in rows for word in row["output"][:-1].split()}
    assert said == set(codeswitch.vocabulary())


@pytest.mark.parametrize("name", SKILLS)
def test_half_of_a_skills_rows_mix_the_words_it_leaves_alone(name: str) -> None:
    parts = codeswitch.split(0)
    rows = list(islice(codeswitch.skill_rows(name, parts.train, 0), 400))
    english = {word["en"] for slot in LEXICON for word in slot}
    mixed = 0
    for row in rows:
        asked = row["input"].removeprefix("say: ").removesuffix(" =>").split()
        answered = row["output"].removesuffix(".").split()
        changed = {slot for slot in range(7) if asked[slot] != answered[slot]}
        assert changed == set(SKILLS[name].forms)
        assert all(asked[slot] in english for slot in changed)
        mixed += not set(asked) <= english
    assert 140 < mixed < 220
