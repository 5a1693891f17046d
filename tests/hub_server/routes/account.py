"""Who is asking, and the few endpoints that belong to no repo."""

from __future__ import annotations

from ..access import signed_in
from ..card import problems
from ..wire import Call, Response, as_json, route


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Response:
    user = signed_in(call)
    token = {"displayName": "tests", "role": user.role}
    orgs = [{"type": "org", "name": org, "fullname": org} for org in user.orgs]
    who = {"type": "user", "id": user.name, "name": user.name, "fullname": user.name}
    return as_json({**who, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}})


@route("GET", "/api/agent-harnesses")
def agent_harnesses(call: Call) -> Response:
    """The client asks this once a day, to name in its user agent what runs it."""
    return as_json({"standardEnvVars": [], "harnesses": {}})


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Response:
    """Asked before a README is committed. Errors answer 400, warnings do not."""
    errors, warnings = problems(str(call.json().get("content", "")))
    body = {
        "errors": [{"message": text} for text in errors],
        "warnings": [{"message": text} for text in warnings],
    }
    return as_json(body, 400 if errors else 200)
