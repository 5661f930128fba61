"""aiohttp's connections: where they come from, how they are kept, and what has become of them."""

from __future__ import annotations

import asyncio
import functools
import ssl
from typing import TYPE_CHECKING, Any, Protocol, cast

import aiohttp
from aiohttp import hdrs
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest
from aiohttp.helpers import TimerNoop
from multidict import CIMultiDict
from yarl import URL

from rxllm.clock import Alarm, alarms, loop_clock
from rxllm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.connector import Connection as Held

    from rxllm.policies.connection import Connection, Proxy

__all__ = ["Pool", "Route", "Sink", "Wire", "drop", "tls_of"]

READ = 120 << 10  # bytes of one read of the socket: from 128 KiB on, malloc has the kernel map the buffer each time


class Sink(Protocol):
    """What takes the body of an answer as it comes: no task is woken for a piece of it."""

    def take(self, piece: bytes) -> bool:
        """Take a piece; False: not now, so keep it."""
        ...

    def wake(self) -> None:
        """Look at the body: it has ended, or broken off."""
        ...


class Wire(ResponseHandler):
    """A connection that knows what has become of it."""

    used = False  # for a request
    heard = False  # a byte has come since the last request was written, or since the connection was kept
    sink: Sink | None = None  # of the answer that comes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        super().connection_made(transport)
        if hasattr(transport, "max_size"):  # one of asyncio's without TLS: uvloop has a buffer of its own
            cast("Any", transport).max_size = READ

    def data_received(self, data: bytes) -> None:
        """Note that something has come."""
        self.heard = True
        super().data_received(data)

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002  aiohttp's
        """Go on, if it was paused: without this test each read would run the parser over nothing."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def close(self) -> None:
        """Close. Whoever waits for more of an answer hears of it: aiohttp would leave it waiting."""
        payload = self._payload
        super().close()
        _break(payload)

    def abort(self) -> None:
        """Close at once. Whoever waits for more of an answer hears of it."""
        payload = self._payload
        super().abort()
        _break(payload)


def _break(payload: aiohttp.StreamReader | None) -> None:
    if payload is not None and not payload.is_eof():
        payload.set_exception(aiohttp.ClientConnectionError("closed"))


class Route:
    """The way to one server: what all pools of a transport have in common.

    Args:
        base: of the server.
        connection: how to get there.
        proxy: on the way; None: there is none.

    Raises:
        ConfigError: a certificate cannot be used.
    """

    def __init__(self, base: URL, connection: Connection, proxy: Proxy | None) -> None:
        self.base = base
        self.connection = connection
        self.proxy = proxy
        self.tls = tls_of(connection) if base.scheme == "https" else True
        self.where = connection.unix_socket or f"{base.host_subcomponent}:{base.port}"

    @property
    def tunnels(self) -> bool:
        """Whether the proxy is asked for a tunnel: it sees nothing of what goes through."""
        return self.proxy is not None and self.base.scheme == "https"

    def template(self, loop: asyncio.AbstractEventLoop, timer: TimerNoop) -> ClientRequest:
        """Return what a connector asks of a request: where it goes. Plain HTTP goes to the proxy as to a server."""
        url = self.base
        if self.proxy is not None and not self.tunnels:
            url = _url_of(self.proxy)
        return ClientRequest(hdrs.METH_POST, url, loop=loop, timer=timer)

    def tunnel(self, loop: asyncio.AbstractEventLoop) -> ClientRequest:
        """Return the same for a connection through the proxy."""
        assert self.proxy is not None  # noqa: S101  for the type checkers
        headers = CIMultiDict({"User-Agent": "rxllm"})
        if self.proxy.authorization is not None:
            headers["Proxy-Authorization"] = self.proxy.authorization
        return ClientRequest(hdrs.METH_POST, self.base, loop=loop, proxy=_url_of(self.proxy), proxy_headers=headers)


def _url_of(proxy: Proxy) -> URL:
    return URL.build(scheme="http", host=proxy.host, port=proxy.port)


def tls_of(connection: Connection) -> ssl.SSLContext | bool:
    """Return what to verify servers with, and to identify with; True is the system's way.

    Raises:
        ConfigError: a file cannot be read, or is not what it should be.
    """
    if connection.verify and connection.ca is None and connection.certificate is None:
        return True  # aiohttp has made one for all
    try:
        context = ssl.create_default_context(cafile=connection.ca)
    except (OSError, ssl.SSLError) as error:
        problem = f"ca {connection.ca!r} cannot be read as certificates: {_reason(error)}"
    else:
        problem = _identify(context, connection)
        if not problem:
            return _finished(context, connection)
    raise ConfigError(problem)


def _finished(context: ssl.SSLContext, connection: Connection) -> ssl.SSLContext:
    if not connection.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    return context


def _identify(context: ssl.SSLContext, connection: Connection) -> str:
    """Load the client's certificate; return what is wrong with it."""
    if connection.certificate is None:
        return ""
    try:  # with a password, so that nobody is asked for that of an encrypted key at the terminal
        context.load_cert_chain(connection.certificate, connection.certificate_key, password="")
    except (OSError, ssl.SSLError) as error:
        files = " with certificate_key ".join(
            repr(path) for path in (connection.certificate, connection.certificate_key) if path is not None
        )
        return f"certificate {files} cannot be used: {_reason(error)}; is the key in it, and not encrypted?"
    return ""


def _reason(error: OSError) -> str:
    return error.strerror or getattr(error, "reason", None) or type(error).__name__


class _Connector(aiohttp.TCPConnector):
    """A pool of connections without a limit: the gate is the only one."""

    def __init__(self, route: Route) -> None:
        super().__init__(limit=0, ssl=route.tls)  # pyright: ignore[reportUnknownMemberType]
        self._factory: Any = functools.partial(Wire, loop=self._loop)
        self._tunnel = route.tunnel(self._loop) if route.tunnels else None

    async def _create_connection(self, req: ClientRequest, traces: Any, timeout: Any) -> ResponseHandler:  # noqa: ASYNC109
        if self._tunnel is None:
            return await super()._create_connection(req, traces, timeout)
        # only here: aiohttp would make the request to the proxy anew for each call over a kept connection
        return (await self._create_proxy_connection(self._tunnel, traces, timeout))[1]


class _SocketConnector(aiohttp.UnixConnector):
    """The same to a socket in the file system."""

    def __init__(self, path: str) -> None:
        super().__init__(path, limit=0)
        self._factory: Any = functools.partial(Wire, loop=self._loop)


class Abandoned(Protocol):
    """An answer that nobody reads any more, and whose connection may still be kept."""

    def give_up(self) -> None:
        """Wait no longer."""
        ...


class Pool:
    """The connections of one loop to one server."""

    def __init__(self, route: Route) -> None:
        loop = asyncio.get_running_loop()
        path = route.connection.unix_socket
        self.route = route
        self.connector = _Connector(route) if path is None else _SocketConnector(path)
        self.timer = TimerNoop()
        self.clock = loop_clock(loop)
        self.abandoned: set[Abandoned] = set()
        self._limits = aiohttp.ClientTimeout(total=None)
        self._template = route.template(loop, self.timer)

    async def connect(self, seconds: float | None) -> Held:
        """Return a kept connection, or a new one within so many seconds."""
        if self._limits.connect != seconds:
            self._limits = aiohttp.ClientTimeout(total=None, connect=seconds)
        return await self.connector.connect(self._template, traces=[], timeout=self._limits)

    def start(self, seconds: float, action: Callable[[], object]) -> Alarm:
        """Call `action` after so many seconds."""
        return alarms(self.clock, seconds).start(action)

    async def close(self) -> None:
        """Close all connections, those in use too."""
        for answer in list(self.abandoned):
            answer.give_up()
        await self.connector.close()


def drop(held: Held) -> None:
    """Close a connection at once: a server that reads nothing must not hold it."""
    if held.protocol is not None:
        held.protocol.abort()
    held.close()
