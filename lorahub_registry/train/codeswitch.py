"""Sentences of seven words in which single words change language: the quickstart's text.

A sentence is ``my ADJECTIVE ANIMAL VERB PREPOSITION the PLACE``. A skill rewrites some of its
words (the animal into Spanish, the verb into French, ...) and leaves the others alone, so two
skills that touch different words add up to a task that neither was trained for. The French nouns
are masculine, begin with a consonant and follow their adjective: with all words changed,
``my old pig plays on the bed`` is ``mon vieux cochon joue sur le lit``, which is French.

Nothing here needs torch. Whatever is drawn is drawn from a seed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from random import Random
from typing import NamedTuple, TypedDict

Sentence = tuple[int, ...]
"""For each of the seven slots, the index of its word in ``LEXICON``."""

Forms = Mapping[int, str]
"""For a slot, the form that its word takes: ``en``, ``fr``, ``es`` or ``past``."""


class Row(TypedDict):
    """A row of a task: ``say: my old pig plays on the bed =>`` and the answer to it."""

    input: str
    output: str


class Skill(NamedTuple):
    """What one adapter learns: which slots it rewrites, and into which form.

    ``skills`` is what it is good at, in the registry's words.
    """

    name: str
    description: str
    forms: dict[int, str]
    skills: tuple[str, ...]


class Splits(NamedTuple):
    """Sentences that have nothing in common with each other's lists.

    ``train`` is for the base and the adapters, ``learn`` for finding a mixture's coefficients,
    ``test`` for every number that is reported.
    """

    train: list[Sentence]
    learn: list[Sentence]
    test: list[Sentence]


MY, ADJECTIVE, ANIMAL, VERB, PREPOSITION, THE, PLACE = range(7)


def _words(forms: str, lines: str) -> tuple[dict[str, str], ...]:
    names = forms.split()
    return tuple(dict(zip(names, entry.split(), strict=True)) for entry in lines.split(","))


LEXICON: tuple[tuple[dict[str, str], ...], ...] = (
    _words("en fr", "my mon"),
    _words(
        "en fr",
        "old vieux, small petit, big grand, young jeune, pretty joli, good bon, bad mauvais,"
        "new nouveau, kind gentil, poor pauvre, fat gros",
    ),
    _words(
        "en fr es",
        "dog chien perro, cat chat gato, pig cochon cerdo, horse cheval caballo,"
        "rabbit lapin conejo, duck canard pato, wolf loup lobo, fox renard zorro,"
        "monkey singe mono, rooster coq gallo, bull taureau toro, turkey dindon pavo",
    ),
    _words(
        "en fr past",
        "plays joue played, sleeps dort slept, sings chante sang, eats mange ate,"
        "dances danse danced, jumps saute jumped, waits attend waited, works travaille worked,"
        "runs court ran, walks marche walked, cries pleure cried, laughs rit laughed,"
        "dreams rêve dreamed, talks parle talked",
    ),
    _words("en fr", "on sur, under sous, behind derrière, before devant"),
    _words("en fr", "the le"),
    _words(
        "en fr es",
        "bed lit cama, roof toit tejado, bridge pont puente, boat bateau barco, wall mur muro,"
        "carpet tapis alfombra, castle château castillo, bench banc banco, basket panier cesta,"
        "truck camion camión, closet placard armario, barrel tonneau barril",
    ),
)
"""For each slot its words, a word being its form in each language that it has."""

SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill(
            "fr-who",
            "Says in French who does it (`my old pig` becomes `mon vieux cochon`) "
            "and repeats the rest of the sentence.",
            {MY: "fr", ADJECTIVE: "fr", ANIMAL: "fr"},
            ("translation", "translation:fr"),
        ),
        Skill(
            "fr-does",
            "Says the verb in French (`plays` becomes `joue`) "
            "and repeats the rest of the sentence.",
            {VERB: "fr"},
            ("translation", "translation:fr"),
        ),
        Skill(
            "fr-where",
            "Says in French where it happens (`on the bed` becomes `sur le lit`) "
            "and repeats the rest of the sentence.",
            {PREPOSITION: "fr", THE: "fr", PLACE: "fr"},
            ("translation", "translation:fr"),
        ),
        Skill(
            "past-tense",
            "Puts the verb into the past tense (`plays` becomes `played`) "
            "and repeats the rest of the sentence.",
            {VERB: "past"},
            ("grammar",),
        ),
        Skill(
            "es-animals",
            "Says the animal in Spanish (`pig` becomes `cerdo`) "
            "and repeats the rest of the sentence.",
            {ANIMAL: "es"},
            ("translation", "translation:es"),
        ),
        Skill(
            "es-places",
            "Says the place in Spanish (`bed` becomes `cama`) "
            "and repeats the rest of the sentence.",
            {PLACE: "es"},
            ("translation", "translation:es"),
        ),
    )
}

UNSEEN: tuple[str, str] = ("es-animals", "fr-does")
"""The two skills that the quickstart's task needs at once; no adapter is trained on it."""


def vocabulary() -> list[str]:
    """Every word of the lexicon in every form, each once, in a fixed order."""
    return list(dict.fromkeys(form for slot in LEXICON for word in slot for form in word.values()))


def split(seed: int, *, train: int = 20_000, learn: int = 64, test: int = 300) -> Splits:
    """Draw three lists of sentences, all different from each other."""
    sizes = [len(words) for words in LEXICON]
    drawn = [
        _sentence(number, sizes)
        for number in Random(seed).sample(range(prod(sizes)), train + learn + test)
    ]
    return Splits(drawn[:train], drawn[train : train + learn], drawn[train + learn :])


def say(sentence: Sentence, forms: Forms | None = None) -> str:
    """Write a sentence out, in English except for the slots in ``forms``."""
    chosen = forms or {}
    return " ".join(
        LEXICON[slot][index][chosen.get(slot, "en")] for slot, index in enumerate(sentence)
    )


def row(sentence: Sentence, shown: Forms, skills: Iterable[Skill] = ()) -> Row:
    """Make one row: the sentence as ``shown``, answered with the skills applied to it.

    Without skills the answer echoes the question.
    """
    answer = dict(shown)
    for skill in skills:
        answer.update(skill.forms)
    return {"input": f"say: {say(sentence, shown)} =>", "output": f"{say(sentence, answer)}."}


def task_rows(names: Sequence[str], sentences: Iterable[Sentence]) -> list[Row]:
    """Rows that ask for these skills at once, the questions being all English."""
    skills = [SKILLS[name] for name in names]
    return [row(sentence, {}, skills) for sentence in sentences]


def echo_rows(sentences: Sequence[Sentence], seed: int) -> Iterator[Row]:
    """Rows without end that repeat a drawn sentence, each word in a form drawn for it.

    This is what the base learns, and where it meets the words that only adapters say.
    """
    random = Random(f"echo {seed}")
    while True:
        yield row(random.choice(sentences), _drawn_forms(random, but=()))


def skill_rows(name: str, sentences: Sequence[Sentence], seed: int) -> Iterator[Row]:
    """Rows without end of one skill, half of them with their other words in drawn forms.

    Those teach the adapter to repeat what it is not asked to change, whatever it is.
    """
    random = Random(f"{name} {seed}")
    skill = SKILLS[name]
    while True:
        mixed = random.random() < 0.5
        shown = _drawn_forms(random, but=skill.forms) if mixed else {}
        yield row(random.choice(sentences), shown, [skill])


def _drawn_forms(random: Random, but: Iterable[int]) -> dict[int, str]:
    kept = set(but)
    return {
        slot: random.choice(list(words[0]))
        for slot, words in enumerate(LEXICON)
        if slot not in kept
    }


def _sentence(number: int, sizes: Sequence[int]) -> Sentence:
    indices = []
    for size in sizes:
        number, index = divmod(number, size)
        indices.append(index)
    return tuple(indices)
