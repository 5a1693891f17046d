"""The endpoints, a file a subject. Importing this package registers them all.

Order matters where patterns overlap: a model's own page is registered after all that lie below it.
"""

from . import account, discussions, files, listing, manage, refs, upload  # noqa: F401

from . import info  # noqa: F401  isort: skip
