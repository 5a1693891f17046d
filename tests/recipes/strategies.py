"""Recipes of every shape that is valid."""

from hypothesis import strategies as st

from lorahub_registry.recipes import (
    Data,
    Learn,
    Linear,
    LoraHub,
    Output,
    OutputRank,
    Publish,
    Recipe,
    RefEntry,
    Search,
    SearchEntry,
    Split,
)
from lorahub_registry.recipes.learned import Screen
from lorahub_registry.recipes.static import (
    DareLinear,
    DareTies,
    Entrywise,
    Factor,
    MagnitudePrune,
    Ties,
)

words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1
).filter(lambda t: t == t.strip())
# What some reader of YAML takes for something else.
tricky = st.sampled_from(
    "no yes on off null ~ 1e3 1e-3 .5 0x10 010 1_000 12:30 2024-01-01 true .inf .nan << &x *x !t "
    "%d @a ' \" [ ${HOME} 1. - ? a: #c |".split()
)
text = tricky | words
names = st.sampled_from(["no", "1e3", "0x1", "a.b-c_d+e", "null", "2024-01-01"]) | st.from_regex(
    r"[A-Za-z][a-z0-9_]{0,12}", fullmatch=True
).filter(lambda n: n.lower() not in {"con", "prn", "aux", "nul"})
finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
licenses = st.none() | st.sampled_from(["apache-2.0", "mit", "no", "llama3.1"])
parallel = st.sampled_from(["NGOpt", "CMA", "DE", "PSO", "OnePlusOne", "RandomSearch"])
counts = st.integers(1, 1000)

common = {
    "budget": st.integers(1, 100_000),
    "l1": st.floats(min_value=0, allow_infinity=False),
    "patience": st.none() | counts,
    "tolerance": st.floats(min_value=0, allow_infinity=False),
    "target": st.none() | finite,
    "screen": st.none() | st.builds(Screen, keep=counts),
}
searched = {"optimizer": parallel, "num_workers": st.integers(1, 1024), **common}
learning = st.one_of(
    st.builds(
        Learn,
        optimizer=st.sampled_from(["gradient", "Cobyla"]),
        per=st.sampled_from(["model", "module"]),
        folds=st.none() | st.integers(2, 100),
        **common,
    ),
    st.builds(
        Learn,
        optimizer=st.just("gradient"),
        gradient=st.sampled_from(["lbfgs", "adam"]),
        per=st.just("layer_group"),
        layer_groups=st.integers(2, 256),
        folds=st.none() | st.integers(2, 100),
        **common,
    ),
    st.builds(
        Learn,
        form=st.sampled_from(["delta", "factor"]),
        bounds=st.floats(1, 1e9),
        init=st.floats(-1, 1),
        **searched,
    ),
    st.builds(LoraHub, bounds=positive, **searched),
)
density = st.floats(0, 1, exclude_min=True)
elect = st.sampled_from(["total", "frequency"])
given_ones = st.one_of(
    st.sampled_from([Linear(), Factor()]),
    st.builds(Ties, density=density, majority_sign_method=elect),
    st.builds(DareTies, density=density, majority_sign_method=elect),
    st.builds(DareLinear, density=density),
    st.builds(MagnitudePrune, density=density),
)
searches = st.builds(
    SearchEntry,
    search=st.builds(
        Search,
        text=text,
        skill=st.lists(text, max_size=3).map(tuple),
        rank=st.sampled_from([None, "8..64", "8..", "..64", "16", 16]),
        targets=st.lists(text, max_size=2).map(tuple),
        license=st.none() | text,
        peft_type=st.none() | text,
        min_score=st.dictionaries(text, finite, max_size=2),
        sort=st.sampled_from([None, "downloads", "score:no"]),
    ),
    limit=counts,
)


@st.composite
def splits(draw: st.DrawFn) -> Split:
    limit = draw(st.none() | counts)
    columns = draw(st.lists(text, min_size=2, max_size=2, unique=True))
    return Split(
        path=draw(words) + "x" + draw(st.sampled_from([".jsonl", ".json", ".csv"])),
        input="in " + columns[0],
        output="out " + columns[1],
        limit=limit,
        select=draw(st.sampled_from(["first", "random"])) if limit else "first",
    )


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    learns = draw(st.booleans())
    refs = draw(st.lists(text, min_size=1, max_size=4, unique=True))
    called = draw(st.lists(st.none() | names, min_size=len(refs), max_size=len(refs)))
    entries: list[RefEntry | SearchEntry] = [
        RefEntry(
            ref=ref,
            name=None if called.index(name) < i else name,
            coefficient=None if learns else draw(finite),
        )
        for i, (ref, name) in enumerate(zip(refs, called, strict=True))
    ]
    if learns:
        entries += draw(st.lists(searches, max_size=2))
    license = draw(licenses)
    method = draw(learning if learns else given_ones)
    ranks = st.builds(OutputRank, rank=st.integers(1, 65_536)) | st.builds(
        OutputRank, energy=st.floats(0, 1, exclude_min=True)
    )
    if not isinstance(method, Entrywise):
        ranks = st.just(OutputRank()) | ranks
    return Recipe(
        version=1,
        name=draw(names),
        base=draw(text),
        adapters=tuple(entries),
        method=method,
        data=Data(
            train=draw(splits()) if learns else None,
            test=draw(st.none() | splits()),
            template=draw(
                st.sampled_from(["{{ input }} ", "chat", "Q: {{ input }}\nA:\n", " \t{{ row.x }}"])
            ),
            max_length=draw(st.none() | counts),
            eos=draw(st.booleans()),
        ),
        evaluate=draw(st.sampled_from([("nll",), ("exact_match", "nll"), ("exact_match",)])),
        max_new_tokens=draw(counts),
        output=Output(
            path=draw(text),
            rank=draw(ranks),
            dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        ),
        publish=draw(
            st.none()
            | st.builds(
                Publish,
                repo=st.just("me/mix"),
                private=st.booleans(),
                create_pr=st.booleans(),
                license=st.sampled_from([None, license]),
            )
        ),
        license=license,
        seed=draw(st.integers(0, 2**32 - 1)),
        device=draw(st.sampled_from(["auto", "cpu", "cuda", "mps"])),
        dtype=draw(st.sampled_from(["auto", "float32", "bfloat16", "float16"])),
        allow_base=draw(st.booleans()),
    )
