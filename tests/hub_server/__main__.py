"""Serve folders as a Hub: `python -m tests.hub_server --folder DIR --port 0`.

Each folder `DIR/owner/name` is a repo. What is pushed stays in memory and ends with the process.
"""

from __future__ import annotations

import argparse
import signal
import threading
from contextlib import suppress
from pathlib import Path

from .server import HubServer


def main() -> None:
    """Start, say where, and serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m tests.hub_server", description=__doc__)
    parser.add_argument("--folder", type=Path, help="holds a folder owner/name for each repo")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--page-size", type=int, default=1000, help="entries a page")
    options = parser.parse_args()

    hub = HubServer(port=options.port, page_size=options.page_size)
    folders = sorted(options.folder.glob("*/*")) if options.folder else []
    for folder in filter(Path.is_dir, folders):
        hub.add_folder(folder, f"{folder.parent.name}/{folder.name}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), hub:
        lines = [
            hub.url,
            f"# {len(hub.store.repos)} repos; the token is that of user {hub.user!r}",
            f"export HF_ENDPOINT={hub.url} HF_TOKEN={hub.token} HF_HUB_DISABLE_XET=1",
        ]
        print("\n".join(lines), flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
