"""`resolve`: the content of files, whole or in part."""

from __future__ import annotations

import re
from urllib.parse import quote

from ..access import downloadable
from ..wire import Call, HubError, Response, route

RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@route("GET HEAD", "/{repo}/resolve/{rev}/{path}")
def resolve(call: Call) -> Response:
    """A file at a revision.

    `X-Repo-Commit` says which commit the revision was, `ETag` which content. The real Hub sends
    LFS files by a redirect to its storage and tells their identity in `X-Linked-*`; here they
    come directly, with the same headers. A missing file names the commit too, so that a client
    can remember the absence.
    """
    repo = downloadable(call)
    commit = repo.commit_at(call.args["rev"])
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    path = call.args["path"]
    blob = commit.files.get(path)
    if blob is None:
        raise HubError(404, "Entry not found", code="EntryNotFound", headers=headers)
    headers |= {
        "ETag": f'"{blob.etag}"',
        "Content-Type": "application/octet-stream" if blob.lfs else "text/plain; charset=utf-8",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rsplit('/', 1)[-1])}",
    }
    if blob.lfs:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
    start, stop = _range(call.headers.get("Range"), blob.size)
    status = 200
    if "Range" in call.headers:
        status = 206
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
    if call.method == "HEAD":
        headers["Content-Length"] = str(stop - start)
        return Response(status, b"", headers)
    return Response(status, blob.read(start, stop), headers)


def _range(header: str | None, size: int) -> tuple[int, int]:
    """The half-open range asked for: `bytes=a-b`, `bytes=a-` or `bytes=-n`."""
    if header is None:
        return 0, size
    match = RANGE.fullmatch(header.replace(" ", ""))
    first, last = match.groups() if match else ("", "")
    start, stop = 0, 0
    if first:
        start, stop = int(first), min(int(last) + 1, size) if last else size
    elif last:
        start, stop = max(size - int(last), 0), size
    if start >= stop:
        limits = {"Content-Range": f"bytes */{size}"}
        raise HubError(416, "Requested Range Not Satisfiable", headers=limits)
    return start, stop
