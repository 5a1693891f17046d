"""`GET /api/models`: search, filters, order, pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..git import iso
from ..store import Repo
from ..views import BRIEF, FULL, LISTABLE, model
from ..wire import Call, HubError, Response, as_json, page_of, route

ORDERS: dict[str, Callable[[Repo], Any]] = {
    "createdAt": lambda repo: iso(repo.created),
    "downloads": lambda repo: repo.downloads,
    "lastModified": lambda repo: repo.last_modified,
    "likes": lambda repo: repo.likes,
    "trendingScore": lambda repo: repo.trending,
}


@route("GET", "/api/models")
def list_models(call: Call) -> Response:
    """The models that match everything asked for, the highest of the order first.

    `limit` bounds a page, not the whole: a `Link` to the next page comes as long as there is one.
    """
    order = call.first("sort", "trendingScore")
    if order not in ORDERS:
        raise HubError(400, f"Invalid sort: {order}")
    limit = call.first("limit", str(call.store.page_size))
    if not limit.isdigit() or int(limit) == 0:
        raise HubError(400, f"Invalid limit: {limit}")
    fields = _fields(call)

    def key(repo: Repo) -> list[Any]:
        return [ORDERS[order](repo), repo.id]

    found = sorted((r for r in call.store.repos.values() if _listed(call, r)), key=key)
    found.reverse()
    size = min(int(limit), call.store.page_size)
    page, link = page_of(call, found, key, size, descending=True)
    return as_json([model(repo, repo.head, fields) for repo in page], headers=link)


def _fields(call: Call) -> list[str]:
    """What to show. The Hub refuses some expands here that it grants for a single model."""
    expand = call.query.get("expand", []) + call.query.get("expand[]", [])
    for name in expand:
        if name not in LISTABLE:
            raise HubError(400, f'"expand" must be one of {sorted(LISTABLE)}, got "{name}"')
    if expand:
        return expand
    fields = list(FULL if call.flag("full") else BRIEF)
    return fields + [name for name in ("cardData", "config") if call.flag(name)]


def _listed(call: Call, repo: Repo) -> bool:
    if repo.disabled or (repo.private and not (call.user and call.user.owns(repo.id))):
        return False
    card = repo.card(repo.head) or {}
    tags = repo.tags_at(repo.head)
    wanted = [part for value in call.query.get("filter", []) for part in value.split(",")]
    checks = [
        all(tag in tags for tag in wanted),
        call.first("search").lower() in repo.id.lower(),
        "author" not in call.query or repo.id.startswith(call.first("author") + "/"),
        "pipeline_tag" not in call.query or card.get("pipeline_tag") == call.first("pipeline_tag"),
        "gated" not in call.query or bool(repo.gated) == call.flag("gated"),
    ]
    return all(checks)
