"""Seeds that follow from what they are of."""

from hashlib import sha256


def seed_of(*parts: int | str) -> int:
    """A seed that follows from ``parts``: 32 bits, for a CPU's generator takes no more."""
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:4], "little")
