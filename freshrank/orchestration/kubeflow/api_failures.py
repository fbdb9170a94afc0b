"""What failures of the Kubeflow Pipelines API mean: which are transient, and a one-line message for each.

Importing this module loads neither kfp nor urllib3.
"""

import json
import re
import socket
from typing import TYPE_CHECKING, Any

from freshrank.errors import ClusterUnreachable, ConfigError, FreshrankError, PipelineFailed
from freshrank.settings import settings

if TYPE_CHECKING:
    from freshrank.orchestration.kubeflow.settings import ApiSettings

_TRANSIENT = {408, 429, 500, 502, 503, 504}
_SHOWN = 80
"""Characters of an unexpected answer that are repeated."""


def api_exception() -> type[Any]:
    """The client's exception for an answer that is not 2xx: ``status``, ``reason``, ``body``, ``headers``."""
    from kfp_server_api import ApiException

    return ApiException  # type: ignore[no-any-return]


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    import urllib3

    if isinstance(error, api_exception()):
        return error.status in _TRANSIENT  # type: ignore[attr-defined]
    final = (urllib3.exceptions.SSLError, urllib3.exceptions.LocationValueError)
    passing = (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError)
    return isinstance(error, passing) and not isinstance(_bare(error), final)


def is_unknown_name(error: BaseException) -> bool:
    """Whether a name server said that there is no such name; one that does not answer says nothing of it."""
    cause = _bare(error).__cause__
    return isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN


def require_json(answer: Any) -> None:
    """PipelineFailed where an answer, or a refusal, is not what Kubeflow Pipelines sends."""
    body = getattr(answer, "body", None) or getattr(answer, "data", None) or b""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
    try:
        json.loads(text or "{}")
    except ValueError:
        raise PipelineFailed(
            f"FRESHRANK_KFP_HOST: {settings().kfp_host} answered {answer.status} {answer.reason} with "
            f"{_excerpt(text)}, expected the Kubeflow Pipelines API, without a log-in page in front of it: set the URL "
            f"of its service ml-pipeline-ui"
        ) from None


def in_words(error: BaseException) -> str:
    """What the host did, to follow its name, in a few words."""
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError, ReadTimeoutError

    if _is_of_tls(error):
        return f"could not agree on TLS ({_innermost(_bare(error))})"
    if isinstance(error, api_exception()):
        return f"answered {error.status} {error.reason}{_message(error)}"  # type: ignore[attr-defined]
    bare = _bare(error)
    if isinstance(bare, ReadTimeoutError):
        return "did not answer in time"
    if isinstance(bare, ConnectTimeoutError) and not isinstance(bare, NewConnectionError):
        return "did not accept a connection in time"
    return f"does not answer ({_innermost(bare)})"


def explained(what: str, error: Exception, how: "ApiSettings") -> Exception:
    """``error`` as a freshrank error: what failed, what the host did, how to fix it."""
    if isinstance(error, FreshrankError):
        return error
    if isinstance(error, api_exception()) and error.status:  # type: ignore[attr-defined]
        return _refusal(what, error, how)
    sentence = f"FRESHRANK_KFP_HOST: {settings().kfp_host} {in_words(error)}"
    if is_unknown_name(error):
        return ClusterUnreachable(f"{sentence}; expected a name that this machine can look up")
    if _is_of_tls(error):
        return PipelineFailed(
            f"{sentence}; expected a certificate of a known authority: name your own in "
            "FRESHRANK_KFP_CA_CERT, or write http:// for a host without TLS"
        )
    if is_transient(error):
        return ClusterUnreachable(
            f"{what}: {settings().kfp_host} {in_words(error)}; it is away, or FRESHRANK_KFP_HOST names another"
        )
    if isinstance(error, OSError) and how.token_file() is not None:
        return ConfigError(f"FRESHRANK_KFP_TOKEN_PATH: {how.token_file()} cannot be read ({error.strerror or error})")
    return PipelineFailed(
        f"{what}: FRESHRANK_KFP_HOST: {settings().kfp_host} could not be understood ({type(error).__name__}: {error}), "
        f"expected the Kubeflow Pipelines API"
    )


def _refusal(what: str, error: Any, how: "ApiSettings") -> Exception:
    text = f"{what}: {settings().kfp_host} {in_words(error)}"
    if error.status in (401, 403):
        source = how.token_file() or ("FRESHRANK_KFP_TOKEN" if how.token.get_secret_value() else "none was sent")
        return ConfigError(
            f"{text}; the token ({source}) is expired or may not do this: renew it, give its account "
            "the rights, or set FRESHRANK_KFP_TOKEN_PATH"
        )
    if error.status == 404:
        return PipelineFailed(f"{text}; it was deleted, or FRESHRANK_KFP_HOST is not the URL of this API")
    if 300 <= error.status < 400:
        where = (error.headers or {}).get("Location", "elsewhere")
        return PipelineFailed(
            f"{text} and points to {where}; expected the Kubeflow Pipelines API itself at FRESHRANK_KFP_HOST"
        )
    return (ClusterUnreachable if is_transient(error) else PipelineFailed)(text)


def _bare(error: BaseException) -> BaseException:
    """What urllib3 gave up for."""
    import urllib3

    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason is not None:
        return error.reason
    return error


def _is_of_tls(error: BaseException) -> bool:
    import urllib3

    # The client turns some of them into an exception without a status.
    of_client = isinstance(error, api_exception()) and error.status == 0  # type: ignore[attr-defined]
    return of_client or isinstance(_bare(error), urllib3.exceptions.SSLError)


def _innermost(error: BaseException) -> str:
    """The operating system's own words where it has some."""
    inside = [each for each in (error.__cause__, error.__context__, *error.args) if isinstance(each, OSError)]
    first = inside[0] if inside else error
    return str(getattr(first, "strerror", None) or first)


def _message(error: Any) -> str:
    """What the server says beside the status, in one line."""
    try:
        body = json.loads(error.body or "{}")
        text = str(body.get("error_message") or body.get("message") or body.get("error") or "")
    except (ValueError, AttributeError):
        text = _excerpt(str(error.body))
    line = " ".join(text.split())[:300]
    return f" ({line})" if line else ""


def _excerpt(page: str) -> str:
    """The title of a page, or how a text begins, in quotation marks."""
    title = re.search(r"<title[^>]*>(.*?)</title>", page, re.IGNORECASE | re.DOTALL)
    text = " ".join((title[1] if title else re.sub(r"<[^>]*>", " ", page)).split())
    return f"{'a page' if '<' in page else 'text'} '{text[:_SHOWN]}{'…' if len(text) > _SHOWN else ''}'"
