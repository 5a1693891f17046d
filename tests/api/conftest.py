"""The same folder, registry and Hub that the command line's tests have."""

from tests.cli.conftest import (  # noqa: F401  (fixtures)
    alone,
    database,
    empty_file,
    hub,
    kitchen,
    logged_in,
    told,
    waits,
)
