"""HTTP/1.1 over aiohttp's connections: its pool, TLS, name look-up and parser, without its session.

A session builds a request, a URL, a writer and a task for each call, and all calls of a client differ in their body
only. Here the head is built once and written with the body in one piece: half the CPU time of a tuned session, see
`benchmarks/overhead.py`.

No exception of aiohttp leaves these modules: their texts can hold the Authorization header, and they do not pickle. Nor
does a frame that a traceback shows have a local variable with it.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import os
import re
from typing import TYPE_CHECKING, NoReturn, cast

from yarl import URL

from rxllm.errors import ConfigError, check_choice
from rxllm.policies.connection import Connection, check_headers
from rxllm.runtime import LoopLocal
from rxllm.transports.connections import Pool, Route
from rxllm.transports.http_exchange import Exchange, Gone

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rxllm.policies.timeouts import Timeouts
    from rxllm.providers.base import Call
    from rxllm.transports.base import Response
    from rxllm.transports.http_answer import HttpAnswer

__all__ = ["HttpTransport"]

_log = logging.getLogger("rxllm.transports")

HEADS = 1_024  # that are kept
PATH = re.compile(r"/[\x21-\x7e]*")
MEDIA = re.compile(r"[\x20-\x7e]+")  # of Accept
METHODS = {"POST": True, "PUT": True, "PATCH": True, "GET": False, "DELETE": False}  # whether there is a body
EVENTS = "text/event-stream"

_warned: set[str] = set()  # hosts whose certificate nobody looks at


class HttpTransport:
    """Calls to one base URL, over connections that are kept and reused; one pool for each loop, closed with it.

    Redirects are answers: none is followed, so that a key goes to no other host.

    Args:
        base_url: of the API, `http` or `https`, usually ending in `/v1`.
        headers: sent with every call; may hold a key.
        connection: how to get there; the proxies of the environment are looked up here and now.

    Raises:
        ConfigError: not a URL of this kind, a header that would break the request, a certificate that cannot be used,
            or an environment that names a proxy of another kind.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        connection: Connection = Connection(),  # noqa: B008  frozen
    ) -> None:
        base = _checked(base_url)
        check_headers(headers)
        if not isinstance(connection, Connection):
            msg = f"connection must be a Connection, got a {type(connection).__name__}"
            raise ConfigError(msg)
        if connection.unix_socket is not None and base.scheme != "http":
            msg = f"unix_socket needs a base_url with http://, got {base_url!r}"
            raise ConfigError(msg)
        proxy = connection.proxy_of(base.scheme, base.host or "", base.port or 0, os.environ)
        self._base = base
        self._headers = {**headers}
        self._route = Route(base, connection, proxy)
        self._pools: LoopLocal[Pool] = LoopLocal(functools.partial(Pool, self._route), Pool.close)
        self._heads: dict[tuple[str, str, str], bytes] = {}
        self._closed = False
        if base.scheme == "https" and not connection.verify and self._route.where not in _warned:
            _warned.add(self._route.where)
            _log.warning("the certificate of %s is not verified: verify=False", self._route.where)

    def __repr__(self) -> str:
        return f"HttpTransport({str(self._base)!r})"

    def __reduce__(self) -> NoReturn:
        """Refuse: the headers may hold a key."""
        msg = f"{self!r} is not pickled: its headers may hold a key"
        raise ConfigError(msg)

    async def send(self, call: Call, timeouts: Timeouts) -> Response:
        """Send `call` and return the complete answer, whatever its status.

        A connection that was kept and is gone before the first byte of the answer costs one more try at once: the
        server had closed it while it was idle.

        Raises:
            ConnectionError: no connection (then `sent` is False), or it broke.
            TimeoutError: with its phase.
            DecodeError: an answer that is cut short, too large, or no HTTP.
            AuthError: the proxy wants a login.
            CancelledError: the transport was closed meanwhile.
            ConfigError: it was closed before; or no path, method or body that can be sent.
        """
        exchange = self._exchange(call, timeouts, streamed=False)
        try:
            try:
                return cast("Response", await exchange.run())
            except Gone:
                pass  # the next error must not have this one as its context
            return cast("Response", await exchange.run(fresh=True))
        finally:
            exchange.end()

    async def open(self, call: Call, timeouts: Timeouts) -> HttpAnswer:
        """Send `call` and return its answer, whatever its status, as soon as its head is there; close it.

        Raises:
            CallError: as those of `send`; what is wrong with the body is an error of `read`.
            ConfigError: as those of `send`.
        """
        exchange = self._exchange(call, timeouts, streamed=True)
        try:
            try:
                return cast("HttpAnswer", await exchange.run())
            except Gone:
                pass  # the next error must not have this one as its context
            return cast("HttpAnswer", await exchange.run(fresh=True))
        finally:
            exchange.end()

    def _exchange(self, call: Call, timeouts: Timeouts, *, streamed: bool) -> Exchange:
        if self._closed:
            msg = f"{self!r} is closed"
            raise ConfigError(msg)
        path, body, method, accept = call.path, call.body, call.method, call.accept
        pool = self._pools.get(asyncio.get_running_loop())
        if body and not METHODS.get(method, True):
            msg = f"a {method} has no body, got one of {len(body)} bytes"
            raise ConfigError(msg)
        head = self._heads.get((path, method, accept)) or self._head(path, method, accept)
        return Exchange(pool, timeouts, head, body if METHODS[method] else None, streamed=streamed)

    def _head(self, path: str, method: str, accept: str) -> bytes:
        """Build what is the same in all such calls, up to the value of Content-Length if there is one."""
        if not PATH.fullmatch(path):
            msg = f"path must begin with a slash and have no space or control characters in it, got {path!r}"
            raise ConfigError(msg)
        if not MEDIA.fullmatch(accept):
            msg = f"accept must be a media type, got {accept!r}"
            raise ConfigError(msg)
        check_choice("method", method, METHODS)
        base, proxy = self._base, self._route.proxy
        headers = {
            "host": ("Host", base.host_port_subcomponent),
            "accept": ("Accept", accept),
            # a server or a proxy that packs what it streams may hold it back until a block is full
            "accept-encoding": ("Accept-Encoding", "identity" if accept == EVENTS else "gzip, deflate"),
            "content-type": ("Content-Type", "application/json"),
            "user-agent": ("User-Agent", "rxllm"),
        }
        if not METHODS[method]:
            del headers["content-type"]
        target = f"{base.raw_path.rstrip('/')}{path}"
        if proxy is not None and not self._route.tunnels:
            target = f"http://{base.host_port_subcomponent}{target}"
            if proxy.authorization is not None:
                headers["proxy-authorization"] = ("Proxy-Authorization", proxy.authorization)
        for given in (self._headers, self._route.connection.headers):
            headers.update({name.lower(): (name, value) for name, value in given.items()})
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.values())]
        head = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
        head += b"Content-Length: " if METHODS[method] else b"\r\n"
        if len(self._heads) >= HEADS:
            self._heads.clear()
        self._heads[path, method, accept] = head
        return head

    async def aclose(self) -> None:
        """Close the connections of the running loop. The next call opens new ones."""
        await self._pools.close(asyncio.get_running_loop())

    def close(self) -> None:
        """Close all connections, each on its loop, and refuse further calls; from any thread."""
        self._closed = True
        self._pools.close_all()


def _checked(base_url: object) -> URL:
    if not isinstance(base_url, str):
        msg = f"base_url must be a text, got {base_url!r}"
        raise ConfigError(msg)
    try:
        url = URL(base_url)
        (url.raw_host or "").encode("idna")  # name servers take no more
    except ValueError:
        url = URL()
    if url.user is not None or url.password is not None or url.query_string or url.fragment:
        msg = "base_url must have no login, query or fragment"
        raise ConfigError(msg)
    if url.scheme not in {"http", "https"} or not url.host or not _is_host(url.host):
        shown = "something with a login" if "@" in base_url else repr(base_url)
        msg = f"base_url must look like https://host/v1, got {shown}"
        raise ConfigError(msg)
    return url


def _is_host(host: str) -> bool:
    """Refuse numbers that are no address: some systems would make one of them."""
    if not re.fullmatch(r"[0-9.]+", host):
        return True
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True
