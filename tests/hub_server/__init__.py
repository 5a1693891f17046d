"""A Hugging Face Hub on loopback, for tests: real HTTP, in memory, deterministic.

```
git  card            content-addressed files and commits; what a README says
store                users, repos, history
wire                 a call, its answer, errors, pages
access  views        who may; what it looks like in JSON
routes/              the endpoints, a file a subject
faults  log          what goes wrong; what was asked
handler  server      HTTP; the thing that tests hold
```

`python -m tests.hub_server --folder DIR` serves folders `DIR/owner/name` to try clients by hand.
"""

from .faults import Fault
from .log import Request
from .server import HubServer
from .store import Repo

__all__ = ["Fault", "HubServer", "Repo", "Request"]
