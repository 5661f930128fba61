"""HTTP/1.1 over aiohttp's connections: its pool, TLS, name look-up and parser, without its session.

A session builds a request, a URL, a writer and a task for each call, and all calls of a client differ in their body
only. Here the head is built once and written with the body in one piece: half the CPU time of a tuned session, see
`benchmarks/overhead.py`.

No exception of aiohttp leaves this module: their texts can hold the Authorization header, and they do not pickle. Nor
does a frame that a traceback shows have a local variable with it.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import ipaddress
import re
import ssl
from typing import TYPE_CHECKING, Any, NoReturn, cast

import aiohttp
from aiohttp import hdrs
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest
from aiohttp.helpers import TimerNoop
from yarl import URL

from rxllm.clock import Alarm, alarms, loop_clock
from rxllm.errors import CallError, CancelledError, ConfigError, ConnectionError, DecodeError, Phase, TimeoutError
from rxllm.runtime import LoopLocal
from rxllm.transports.base import Response

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.connector import Connection

    from rxllm.policies.timeouts import Timeouts

__all__ = ["HttpTransport"]

READ_BUFFER = 1 << 20  # bytes: a long answer is not stopped and started for flow control
LARGEST_BODY = 256 << 20  # bytes of an answer; a longer one is no answer of a model
LONGEST_LINE = 32_768  # bytes of a header
PATHS = 1_024  # heads that are kept

NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # of a header: RFC 9110, 5.1
VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # of a header: RFC 9110, 5.5
PATH = re.compile(r"/[\x21-\x7e]*")
OURS = frozenset({"connection", "content-length", "expect", "host", "te", "trailer", "transfer-encoding", "upgrade"})


class HttpTransport:
    """POSTs to one base URL, over connections that are kept and reused; one pool for each loop, closed with it.

    Args:
        base_url: of the API, `http` or `https`, usually ending in `/v1`.
        headers: sent with every call; may hold a key.

    Raises:
        ConfigError: not a URL of this kind, or a header that would break the request.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        self._base = _checked(base_url)
        self._headers = _checked_headers(headers)
        self._pools: LoopLocal[_Pool] = LoopLocal(functools.partial(_Pool, self._base), _Pool.close)
        self._heads: dict[str, bytes] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"HttpTransport({str(self._base)!r})"

    def __reduce__(self) -> NoReturn:
        """Refuse: the headers may hold a key."""
        msg = f"{self!r} is not pickled: its headers may hold a key"
        raise ConfigError(msg)

    async def post(self, path: str, body: bytes, timeouts: Timeouts) -> Response:
        """Send `body` to `path` below the base URL and return the complete answer, whatever its status.

        A connection that was kept and is gone before the first byte of the answer costs one more try at once: the
        server had closed it while it was idle.

        Raises:
            ConnectionError: no connection (then `sent` is False), or it broke.
            TimeoutError: with its phase.
            DecodeError: an answer that is cut short, too large, or no HTTP.
            CancelledError: the transport was closed meanwhile.
            ConfigError: it was closed before; or not a path.
        """
        if self._closed:
            msg = f"{self!r} is closed"
            raise ConfigError(msg)
        head = self._heads.get(path) or self._head(path)
        exchange = _Exchange(self._pools.get(asyncio.get_running_loop()), timeouts, head, body)
        del head  # it may hold a key: see the module's docstring
        try:
            try:
                return await exchange.run()
            except _Gone:
                pass  # the next error must not have this one as its context
            return await exchange.run(fresh=True)
        finally:
            exchange.end()

    def _head(self, path: str) -> bytes:
        """Build what is the same in every call to `path`, up to the value of Content-Length."""
        if not PATH.fullmatch(path):
            msg = f"path must begin with a slash and have no space or control characters in it, got {path!r}"
            raise ConfigError(msg)
        base = self._base
        headers = {
            "host": ("Host", base.host_port_subcomponent),
            "accept": ("Accept", "application/json"),
            "accept-encoding": ("Accept-Encoding", "gzip, deflate"),
            "content-type": ("Content-Type", "application/json"),
            "user-agent": ("User-Agent", "rxllm"),
            **{name.lower(): (name, value) for name, value in self._headers.items()},
        }
        lines = [f"POST {base.raw_path.rstrip('/')}{path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.values())]
        head = "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"Content-Length: "
        if len(self._heads) >= PATHS:
            self._heads.clear()
        self._heads[path] = head
        return head

    async def aclose(self) -> None:
        """Close the connections of the running loop. The next call opens new ones."""
        await self._pools.close(asyncio.get_running_loop())

    def close(self) -> None:
        """Close all connections, each on its loop, and refuse further calls; from any thread."""
        self._closed = True
        self._pools.close_all()


class _Protocol(ResponseHandler):
    """A connection that knows what has become of it."""

    used = False  # for a request
    heard = False  # a byte has come since the last request was written, or since the connection was kept

    def data_received(self, data: bytes) -> None:
        self.heard = True
        super().data_received(data)


class _Connector(aiohttp.TCPConnector):
    """A pool of connections without a limit: the gate is the only one."""

    def __init__(self) -> None:
        super().__init__(limit=0)  # pyright: ignore[reportUnknownMemberType]
        self._factory: Any = functools.partial(_Protocol, loop=self._loop)


class _Pool:
    """The connections of one loop to one server."""

    def __init__(self, base: URL) -> None:
        loop = asyncio.get_running_loop()
        self.connector = _Connector()
        self.timer = TimerNoop()
        self.clock = loop_clock(loop)
        self.where = f"{base.host_subcomponent}:{base.port}"
        self._limits = aiohttp.ClientTimeout(total=None)
        self._template = ClientRequest(hdrs.METH_POST, base, loop=loop, timer=self.timer)  # what a connector asks of it

    async def connect(self, seconds: float | None) -> Connection:
        """Return a kept connection, or a new one within so many seconds."""
        if self._limits.connect != seconds:
            self._limits = aiohttp.ClientTimeout(total=None, connect=seconds)
        return await self.connector.connect(self._template, traces=[], timeout=self._limits)

    def start(self, seconds: float, exchange: _Exchange, phase: Phase) -> Alarm:
        return alarms(self.clock, seconds).start(lambda: exchange.expire(phase))

    async def close(self) -> None:
        await self.connector.close()


class _Exchange:
    """One call: its connection, and the clock that runs."""

    __slots__ = ("_body", "_expired", "_head", "_pool", "_task", "_timeouts", "_total")

    def __init__(self, pool: _Pool, timeouts: Timeouts, head: bytes, body: bytes) -> None:
        self._pool = pool
        self._timeouts = timeouts
        self._head = head
        self._body = body
        self._expired: Phase | None = None
        self._task: asyncio.Task[Any] | None = None
        self._total = None if timeouts.total is None else pool.start(timeouts.total, self, "total")

    def expire(self, phase: Phase) -> None:
        """Give up: a clock has run out."""
        if self._expired is None and self._task is not None:
            self._expired = phase
            self._task.cancel()

    def end(self) -> None:
        """Stop the clock of the whole call."""
        if self._total is not None:
            self._total.cancel()

    async def run(self, *, fresh: bool = False) -> Response:
        """Send and read.

        Raises:
            _Gone: a kept connection was closed before the first byte: try again with a fresh one.
            CallError: see `HttpTransport.post`.
        """
        self._task = task = cast("asyncio.Task[Any]", asyncio.current_task())
        cancelling = task.cancelling()
        connection: Connection | None = None
        try:
            connection = await self._connect(fresh=fresh)
            response = await self._talk(connection)
        except asyncio.CancelledError:
            # our own cancel is taken back; the one of somebody else comes first
            if self._expired is None or task.uncancel() > cancelling:
                raise
            problem: CallError = self._late(self._expired, sent=connection is not None)
        except CallError as error:
            problem = error
        else:
            cast("_Protocol", connection.protocol).heard = False
            connection.release()
            connection = None
            return response
        finally:
            self._task = None
            if connection is not None:
                _drop(connection)
        if self._pool.connector.closed:
            problem = CancelledError("the client was closed during the call")
        raise problem  # outside of the except blocks: what was caught there is no context of it

    def _late(self, phase: Phase, *, sent: bool) -> TimeoutError:
        seconds = getattr(self._timeouts, phase)
        text = {
            "connect": "no connection to {} within {:g} s; is base_url right, and is the server up?",
            "first_byte": "no answer of {} within {:g} s",
            "idle": "the answer of {} stopped for {:g} s",
            "total": "no complete answer of {} within {:g} s",
        }[phase]
        error = TimeoutError(text.format(self._pool.where, seconds), phase=phase)
        error.sent = sent
        return error

    async def _connect(self, *, fresh: bool) -> Connection:
        """Return a connection; a kept one only if it is as good as new, and none of them if `fresh`."""
        pool = self._pool
        seconds = self._timeouts.connect
        try:
            while True:
                connection = await pool.connect(seconds)
                protocol = cast("_Protocol", connection.protocol)
                if not protocol.used or not (fresh or protocol.heard):
                    return connection
                _drop(connection)  # it may be gone as the other one was, or something came that nobody asked for
        except builtin_timeout:
            problem: CallError = self._late("connect", sent=False)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            problem = _unreachable(pool.where, error)
        raise problem

    async def _talk(self, connection: Connection) -> Response:
        pool = self._pool
        protocol = cast("_Protocol", connection.protocol)
        kept, protocol.used, protocol.heard = protocol.used, True, False
        protocol.set_response_params(
            timer=pool.timer,
            skip_payload=False,
            read_until_eof=True,
            auto_decompress=True,
            read_timeout=None,
            read_bufsize=READ_BUFFER,
            timeout_ceil_threshold=5,
            max_line_size=LONGEST_LINE,
            max_field_size=LONGEST_LINE,
        )
        transport = protocol.transport
        if transport is None or transport.is_closing():
            if kept:
                raise _Gone
            raise _broken(pool.where)
        body = self._body
        transport.write(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        seconds = self._timeouts.first_byte
        alarm = None if seconds is None else pool.start(seconds, self, "first_byte")
        status: int | None = None
        try:
            message, payload = await protocol.read()
            while 100 <= message.code < 200 and message.code != 101:  # noqa: PLR2004  "early hints": the answer follows
                message, payload = await protocol.read()
            status = message.code
            if alarm is not None:
                alarm.cancel()
                alarm = None
            answer = payload.read_nowait() if payload.is_eof() else await self._read(status, payload)
        except (aiohttp.http.HttpProcessingError, aiohttp.ClientPayloadError, CallError) as error:
            problem: Exception = _unreadable(pool.where, status, error)
        except Exception:  # aiohttp's, or whatever broke the connection
            problem = _Gone() if kept and not protocol.heard else _broken(pool.where, heard=protocol.heard)
        else:
            if status != 101:  # noqa: PLR2004
                return Response(status, message.headers, answer)
            problem = DecodeError(f"{pool.where} wants another protocol than HTTP; check base_url", status)
        finally:
            if alarm is not None:
                alarm.cancel()
        raise problem

    async def _read(self, status: int, payload: aiohttp.StreamReader) -> bytes:
        """Read an answer that comes in pieces. Of an error that is cut short, what there is."""
        parts: list[bytes] = []
        size = 0
        seconds = self._timeouts.idle
        while not payload.at_eof():
            alarm = None if seconds is None else self._pool.start(seconds, self, "idle")
            try:
                part = await payload.readany()
            except aiohttp.ClientPayloadError:
                if status < 400:  # noqa: PLR2004
                    raise
                break
            finally:
                if alarm is not None:
                    alarm.cancel()
            parts.append(part)
            size += len(part)
            if size > LARGEST_BODY:
                msg = f"the answer is larger than {LARGEST_BODY >> 20} MB"
                raise DecodeError(msg, status)
        return b"".join(parts)


class _Gone(Exception):  # noqa: N818  never seen outside
    """A kept connection was closed before the first byte of the answer."""


builtin_timeout = asyncio.TimeoutError


def _drop(connection: Connection) -> None:
    """Close a connection at once: a server that reads nothing must not hold it."""
    if connection.protocol is not None:
        connection.protocol.abort()
    connection.close()


def _broken(where: str, *, heard: bool = False) -> ConnectionError:
    when = "in the middle of its answer" if heard else "without an answer"
    return ConnectionError(f"{where} closed the connection {when}")


def _unreadable(where: str, status: int | None, error: Exception) -> CallError:
    """Return the error of an answer that is no good HTTP."""
    if isinstance(error, CallError):
        return error
    if isinstance(error, aiohttp.ClientPayloadError):
        return DecodeError("the answer was cut short", status)
    if "content-encoding" in str(getattr(error, "message", "")):
        return DecodeError(f"the answer of {where} cannot be decompressed", status)
    return DecodeError(f"the answer of {where} is no HTTP; check base_url", status)


def _unreachable(where: str, error: Exception) -> ConnectionError:
    """Return the error of a connection that did not come about; it says what to check."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        text = f"no such host: {where}; check base_url"
    elif isinstance(error, aiohttp.ClientConnectorCertificateError):
        text = f"the certificate of {where} is not accepted: {error.certificate_error}"
    elif isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        text = f"no secure connection to {where}: is it http:// instead of https://?"
    elif isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
        text = f"cannot reach {where}: too many open files; raise the limit (ulimit -n), or lower concurrency"
    else:
        reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
        text = f"cannot reach {where}: {reason}; is the server running, and is base_url right?"
    problem = ConnectionError(text)
    problem.sent = False
    return problem


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


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not NAME.fullmatch(name) or name.lower() in OURS:
            msg = f"headers: {name!r} cannot be set"
            raise ConfigError(msg)
        if not VALUE.fullmatch(value):
            msg = f"headers: the value of {name!r} has a character that headers cannot have"
            raise ConfigError(msg)
    return dict(headers)
