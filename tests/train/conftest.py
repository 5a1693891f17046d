"""Who watches a run in these tests."""

from contextlib import contextmanager

import pytest


class Recorded:
    """A progress that remembers what it was told."""

    def __init__(self):
        self.warnings, self.said = [], []

    @contextmanager
    def task(self, title, total=None, unit=""):
        yield self

    def advance(self, n=1):
        pass

    def describe(self, text):
        pass

    def say(self, text):
        self.said.append(text)

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture
def recorded():
    return Recorded()
