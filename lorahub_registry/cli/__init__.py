"""The command line: click, one file a group; output and errors in one place."""

import atexit
import gc

# A command lives for half a second and imports thousands of objects that all stay: collecting
# them again and again, and once more at the end, would cost a quarter of that.
gc.set_threshold(50_000, 20, 20)
atexit.register(gc.freeze)

from lorahub_registry.cli.main import cli  # noqa: E402

__all__ = ["cli"]
