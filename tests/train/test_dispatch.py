"""Which micro-batches go together."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from lorahub_registry.train.dispatch import PADDING, passes


@dataclass(frozen=True)
class Unit:
    adapter: int
    rows: int
    width: int
    packed: bool = False


UNITS = st.lists(
    st.builds(Unit, st.integers(0, 6), st.integers(1, 8), st.integers(1, 300), st.booleans())
)


@given(UNITS, st.integers(1, 4000), st.integers(1, 8))
def test_every_unit_once_and_no_pass_over_its_bounds(units, tokens, together):
    groups = passes(units, tokens=tokens, together=together)
    flat = [unit for group in groups for unit in group]
    assert sorted(flat, key=repr) == sorted(units, key=repr)
    for group in groups:
        padded = sum(u.rows for u in group) * max(u.width for u in group)
        assert len({u.adapter for u in group}) == len(group) <= together
        assert len({u.packed for u in group}) == 1
        if len(group) > 1:
            assert padded <= tokens
            assert padded <= PADDING * sum(u.rows * u.width for u in group)


def test_near_lengths_lie_together():
    units = [Unit(0, 2, 100), Unit(1, 2, 20), Unit(2, 2, 96), Unit(3, 2, 19)]
    groups = passes(units, tokens=2048)
    assert [[u.adapter for u in group] for group in groups] == [[0, 2], [1, 3]]
