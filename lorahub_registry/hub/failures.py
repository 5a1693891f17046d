"""The client's errors as ours: each names the repo or file, and says what to do next."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2
from huggingface_hub import errors as hf
from huggingface_hub import get_token

from lorahub_registry.errors import HubError, LoraregError, OutputError, UsageError

LOGIN = "hf auth login"


class Unreachable(HubError):
    """No answer at all: offline, no connection, or it broke off."""


class NoAccess(HubError):
    """The repo is there, but its files are only for those who were let in."""


class Busy(HubError):
    """The Hub answered that it cannot answer now (429, 5xx): the same call may work later."""


class Missing(HubError):
    """There is no such repo, revision or file, or it may not be seen."""


class Stale(HubError):
    """The repo has moved on since it was looked at."""


@dataclass(frozen=True)
class Where:
    """What a call is about, for messages."""

    endpoint: str
    repo: str
    file: str = ""
    revision: str = ""

    def __str__(self) -> str:
        path = f"{self.repo}/{self.file}" if self.file else self.repo
        return f"{path}@{self.revision}" if self.revision else path

    @property
    def page(self) -> str:
        """The repo's page."""
        return f"{self.endpoint}/{self.repo}"


@contextmanager
def explained(where: Where) -> Iterator[None]:
    """Raise what the client raises as one of our errors.

    Raises:
        HubError: of the kind above that fits.
        OutputError: the disk is full, or the cache may not be written.
        UsageError: the repo's name cannot be one.
    """
    try:
        yield
    except LoraregError:
        raise
    except Exception as error:
        known = translate(error, where)
        if known is None:
            raise
        raise known from error


def translate(error: BaseException, where: Where) -> LoraregError | None:
    """Our error for one of the client's; None for what is neither the Hub's nor the disk's."""
    if isinstance(error, hf.LocalEntryNotFoundError):
        # The client looked into its cache because of another error: that one is worth telling.
        known = translate(error.__cause__, where) if error.__cause__ else None
        return known or Unreachable(f"{where}: not in the cache", hint=_ONLINE)
    if isinstance(error, hf.OfflineModeIsEnabled):
        return offline(where)
    if isinstance(error, hf.HfHubHTTPError):
        return _by_class(error, where) or _by_status(error, where)
    if isinstance(error, hf.HFValidationError):
        return UsageError(f"{where.repo!r} is not a Hub id", hint="write owner/name")
    if isinstance(error, (httpx2.HTTPError, httpx2.InvalidURL, ConnectionError, TimeoutError)):
        return unreachable(where, error)
    if isinstance(error, OSError):
        return _by_errno(error, where)
    if type(error).__module__.partition(".")[0] == "hf_xet" or isinstance(error, RuntimeError):
        return Busy(f"{where}: the transfer failed ({_line(error)})", hint="run this again")
    if isinstance(error, ValueError) and "metadata" in str(error).lower():
        return OutputError(
            f"{where}: the Hub does not take the README's front matter ({_line(error)})",
            hint="correct the YAML between the two --- lines",
        )
    if isinstance(error, ValueError):  # JSON too
        return HubError(f"{where}: {where.endpoint} gave an answer that no Hub gives", hint=_IS_HUB)
    return None


_ONLINE = "get it while online: unset HF_HUB_OFFLINE, or check the connection"
_IS_HUB = "HF_ENDPOINT has to point to a Hugging Face Hub; a proxy may also have answered"


def offline(where: Where) -> Unreachable:
    """The error for a call that offline mode forbids."""
    return Unreachable(
        f"{where}: offline mode is on, and this is not in the cache",
        hint="unset HF_HUB_OFFLINE, or pull it where there is a connection",
    )


def unreachable(where: Where, error: BaseException) -> Unreachable:
    """The error for a connection that failed."""
    if isinstance(error, httpx2.ProxyError):
        said = f"the proxy refused ({_line(error)})"
    elif isinstance(error, (httpx2.TimeoutException, TimeoutError)):
        said = f"{where.endpoint} did not answer in time"
    elif isinstance(error, httpx2.ConnectError):
        said = f"{where.endpoint} cannot be reached ({_line(error)})"
    else:
        said = f"the connection to {where.endpoint} broke off ({_line(error)})"
    return Unreachable(
        f"{where}: {said}",
        hint="check the connection, HF_ENDPOINT and the proxy settings; "
        "HF_HUB_OFFLINE=1 uses what is in the cache",
    )


def _by_class(error: hf.HfHubHTTPError, where: Where) -> HubError | None:
    if isinstance(error, hf.GatedRepoError):
        after = "wait until its owner lets you in" if _logged_in() else LOGIN
        return NoAccess(
            f"{where}: its files are only for those who accepted its conditions",
            hint=f"accept them on {where.page}, then: {after}",
        )
    if isinstance(error, hf.DisabledRepoError):
        return NoAccess(f"{where}: the Hub has disabled this repo", hint=f"see {where.page}")
    if isinstance(error, hf.RepositoryNotFoundError):
        hint = (
            "check the spelling; if it is private, your account cannot see it (hf auth whoami)"
            if _logged_in()
            else f"check the spelling; if it is private: {LOGIN}"
        )
        return Missing(f"{where.repo}: no such repo on {where.endpoint}", hint=hint)
    if isinstance(error, hf.RevisionNotFoundError):
        return Missing(
            f"{where.repo} has no revision {where.revision!r}",
            hint=f"its branches, tags and commits are on {where.page}/commits/main",
        )
    if isinstance(error, hf.RemoteEntryNotFoundError):
        return Missing(f"{where}: there is no such file", hint=f"see {where.page}/tree/main")
    return None


def _by_status(error: hf.HfHubHTTPError, where: Where) -> HubError:
    status = error.response.status_code
    said = f": {_line(error.server_message)}" if error.server_message else ""
    if status == 401:
        return HubError(
            f"{where}: the Hub does not know the token it was given",
            hint=f"{LOGIN}; a token in HF_TOKEN comes first",
        )
    if status == 403:
        return HubError(
            f"{where}: not allowed{said}",
            hint="hf auth whoami says who you are; the token needs the right to do this",
        )
    if status == 404:
        return Missing(f"{where}: not there{said}", hint=f"see {where.page}")
    if status == 409:
        return HubError(f"{where}: in conflict with what is there{said}", hint=f"see {where.page}")
    if status == 412:
        return stale(where)
    if status == 429:
        return Busy(
            f"{where}: too many requests for now",
            hint=f"wait five minutes; those who are logged in may ask more often ({LOGIN})",
        )
    if status >= 500:
        return Busy(
            f"{where}: the Hub has a problem of its own (status {status})",
            hint="try again later; https://status.huggingface.co tells more",
        )
    return HubError(f"{where}: the Hub answered with status {status}{said}", hint=_IS_HUB)


def stale(where: Where) -> Stale:
    """The error for a push onto a commit that is no longer the newest."""
    return Stale(
        f"{where.repo} has changed on the Hub since it was looked at; nothing was pushed",
        hint=f"see {where.page}/commits/main, then push again (or with --create-pr)",
    )


def _by_errno(error: OSError, where: Where) -> LoraregError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return OutputError(
            f"{where}: the disk is full", hint="make room, or set HF_HOME to another disk"
        )
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return OutputError(
            f"{where}: the Hub's cache may not be written ({error.strerror})",
            hint="check its permissions, or set HF_HOME to a folder of yours",
        )
    if "Consistency check" in str(error):
        return Busy(f"{where}: arrived with another size than announced", hint="run this again")
    return HubError(f"{where}: {_line(error)}")


def _logged_in() -> bool:
    return get_token() is not None


def _line(said: object) -> str:
    """The first line of a message, short, without the query part of any address."""
    lines = str(said).strip().splitlines() or [type(said).__name__]
    return " ".join(word.partition("?")[0] for word in lines[0].split())[:200]
