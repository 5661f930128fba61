"""What goes wrong on the wire, as errors of ours: they say what to check, and show nothing of aiohttp's."""

from __future__ import annotations

import errno
import ssl
from typing import TYPE_CHECKING

import aiohttp

from rxllm.errors import AuthError, CallError, ConnectionError, DecodeError, Phase, TimeoutError

if TYPE_CHECKING:
    from rxllm.policies.timeouts import Timeouts
    from rxllm.transports.connections import Route

__all__ = ["broken", "late", "too_large", "unreachable", "unreadable"]

LATE: dict[Phase, str] = {
    "connect": "no connection to {} within {:g} s; is base_url right, and is the server up?",
    "first_byte": "no answer of {} within {:g} s",
    "idle": "the answer of {} stopped for {:g} s",
    "total": "no complete answer of {} within {:g} s",
}


def late(where: str, phase: Phase, timeouts: Timeouts, *, sent: bool) -> TimeoutError:
    """Return the error of a clock that has run out."""
    error = TimeoutError(LATE[phase].format(where, getattr(timeouts, phase)), phase=phase)
    error.sent = sent
    return error


def broken(where: str, *, heard: bool = False) -> ConnectionError:
    """Return the error of a connection that ended before the head of its answer did."""
    when = "in the middle of its answer" if heard else "without an answer"
    return ConnectionError(f"{where} closed the connection {when}")


def too_large(most: int, status: int) -> DecodeError:
    """Return the error of an answer that goes beyond `body_bytes`."""
    size = f"{most >> 20} MB" if most >= 1 << 20 else f"{most} bytes"
    return DecodeError(f"the answer is larger than {size}; see Connection(body_bytes=...)", status)


def unreadable(where: str, status: int | None, error: Exception) -> CallError:
    """Return the error of an answer that is no good HTTP."""
    if isinstance(error, CallError):
        return error
    if isinstance(error, aiohttp.ClientPayloadError):
        return DecodeError("the answer was cut short", status)
    if "content-encoding" in str(getattr(error, "message", "")):
        return DecodeError(f"the answer of {where} cannot be decompressed", status)
    return DecodeError(f"the answer of {where} is no HTTP; check base_url", status)


def unreachable(route: Route, error: Exception) -> CallError:
    """Return the error of a connection that did not come about; it says what to check."""
    where, check = route.where, "base_url"
    if route.proxy is not None:
        if isinstance(error, aiohttp.ClientHttpProxyError):
            return _refused(route.proxy.where, where, error.status)
        if not route.tunnels or isinstance(error, aiohttp.ClientProxyConnectionError | aiohttp.ClientConnectorDNSError):
            where, check = f"the proxy {route.proxy.where}", "proxy (or the environment)"
    elif route.connection.unix_socket is not None:
        check = "unix_socket"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        text = f"no such host: {where}; check {check}"
    elif isinstance(error, aiohttp.ClientConnectorCertificateError):
        text = f"the certificate of {where} is not accepted: {error.certificate_error}"
    elif isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        text = f"no secure connection to {where}: is it http:// instead of https://?"
    elif isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
        text = f"cannot reach {where}: too many open files; raise the limit (ulimit -n), or lower concurrency"
    else:
        reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
        text = f"cannot reach {where}: {reason}; is the server running, and is {check} right?"
    return _unsent(ConnectionError(text))


def _refused(proxy: str, where: str, status: int) -> CallError:
    """Return the error of a proxy that makes no tunnel."""
    if status == 407:  # noqa: PLR2004
        return _unsent(AuthError(f"the proxy {proxy} wants a login, or another one", status))
    return _unsent(ConnectionError(f"the proxy {proxy} makes no connection to {where}", status))


def _unsent(error: CallError) -> CallError:
    error.sent = False
    return error
