"""How a client reaches its server: through which proxy, whom it trusts, what it sends along, how much it takes."""

import base64
import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from rxllm.errors import ConfigError, check_number, check_text
from rxllm.values import ConfigErrorMeta

__all__ = ["Connection", "Proxy", "check_headers"]

NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # of a header: RFC 9110, 5.1
VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # of a header: RFC 9110, 5.5
OURS = frozenset({
    "connection",
    "content-length",
    "expect",
    "host",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
})  # fmt: skip
SECRET = re.compile("auth|cookie|credential|key|passw|secret|session|token", re.IGNORECASE)  # in the name of a header


class Proxy(msgspec.Struct, frozen=True):
    """An HTTP proxy. Its login does not show."""

    host: str  # without the brackets of an IPv6 address
    port: int
    login: str | None = None  # user:password

    @property
    def where(self) -> str:
        """The address, for a person and for a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def authorization(self) -> str | None:
        """The value of Proxy-Authorization; None without a login."""
        return None if self.login is None else f"Basic {base64.b64encode(self.login.encode()).decode()}"

    def __repr__(self) -> str:
        return f"Proxy({self.where!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("where", self.where)]


class Connection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=ConfigErrorMeta):
    """How a client reaches its server.

    Values of headers and the login of a proxy do not show. A connection that holds a secret does not pickle: neither
    one with a login, nor one with a header whose name speaks of a key, a token, a cookie or the like. Leave the login
    to the environment instead.

    Args:
        proxy: URL of an HTTP proxy, `http://host:port` or `http://user:password@host:port`. It sees all of a plain
            `http` call, and the name of the host of an `https` one.
        trust_env: Without `proxy` take the one that the environment names: `https_proxy` or `http_proxy`, by the
            address of the server, else `all_proxy`, but none for hosts in `no_proxy`; in capitals too. `HTTP_PROXY` is
            not taken when `REQUEST_METHOD` is set: in a CGI script a visitor sets it.
        ca: PEM file with the certificates to trust in place of the system's.
        certificate: PEM file with the client's own certificate, and with its key unless there is `certificate_key`.
        certificate_key: PEM file with the key, not encrypted.
        verify: False: take any certificate for good. Whoever is on the way can then read the key.
        unix_socket: Path of a socket to connect to, for a base URL with `http`; its host is what the server is told.
        headers: Sent with every call; one of the client's own of the same name is replaced.
        body_bytes: The largest answer that is taken, unpacked; of a streamed one it is the sum of its pieces.
        header_bytes: The longest line of a header that is taken. There are at most 128 of them.

    Raises:
        ConfigError: A value is of the wrong type, out of its bounds, or contradicts another.

    >>> Connection(proxy="http://me:secret@proxy.example:3128", headers={"X-Team": "blue"})
    Connection(proxy='http://proxy.example:3128', headers={'X-Team': ...})
    """

    proxy: str | None = None
    trust_env: bool = True
    ca: str | None = None
    certificate: str | None = None
    certificate_key: str | None = None
    verify: bool = True
    unix_socket: str | None = None
    headers: dict[str, str] = {}
    body_bytes: int = 256 << 20
    header_bytes: int = 32_768

    def __post_init__(self) -> None:
        for name in ("ca", "certificate", "certificate_key", "unix_socket"):
            check_text(name, getattr(self, name), optional=True)
        for name in ("trust_env", "verify"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        check_number("body_bytes", self.body_bytes, least=1, integer=True)
        check_number("header_bytes", self.header_bytes, least=1_024, integer=True)
        check_headers(self.headers)
        if self.proxy is not None:
            _proxy("proxy", self.proxy)
        if self.certificate_key is not None and self.certificate is None:
            raise ConfigError("certificate_key is the key of a certificate: give that too")
        if self.proxy is not None and self.unix_socket is not None:
            raise ConfigError("proxy and unix_socket are two ways to the server: give one of them")
        if self.ca is not None and not self.verify:
            raise ConfigError("ca says whom to trust and verify=False that nobody is checked: give one of them")

    def proxy_of(self, scheme: str, host: str, port: int, environ: Mapping[str, str]) -> Proxy | None:
        """Return the proxy on the way to a server; None: there is none.

        Args:
            scheme: "http" or "https".
            host: Without the brackets of an IPv6 address.
            port: Of the server.
            environ: The variables of the process.

        Raises:
            ConfigError: the environment names a proxy of a kind that is not supported.
        """
        if self.unix_socket is not None:
            return None
        if self.proxy is not None:
            return _proxy("proxy", self.proxy)
        if not self.trust_env:
            return None
        name, url = next(_variables(scheme, environ), ("", ""))
        if not url or _is_direct(host, port, environ.get("no_proxy", environ.get("NO_PROXY", ""))):
            return None
        return _proxy(f"the environment variable {name}", url)

    def _shown(self) -> Iterator[tuple[str, str]]:
        """Yield the names of what was given, and what may be seen of it."""
        for field in msgspec.structs.fields(self):
            value = getattr(self, field.name)
            if field.name == "headers":
                shown = ", ".join(f"{name!r}: ..." for name in value)
                yield from [("headers", f"{{{shown}}}")] if value else []
            elif value != field.default:
                yield field.name, repr(f"http://{_proxy('proxy', value).where}" if field.name == "proxy" else value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in self._shown())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return list(self._shown())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what is no secret."""
        if self.proxy is not None and _proxy("proxy", self.proxy).login is not None:
            msg = "proxy has a login, which must not be pickled: leave it to the environment (http_proxy, https_proxy)"
            raise ConfigError(msg)
        for name in self.headers:
            if SECRET.search(name):
                raise ConfigError(f"headers: the value of {name!r} may be a secret, which must not be pickled")
        return _remade, (type(self), msgspec.structs.asdict(self))


def _remade(kind: type[Connection], fields: dict[str, Any]) -> Connection:
    return kind(**fields)


def check_headers(headers: Mapping[str, str]) -> None:
    """Refuse what would break a request, or is not the caller's to say. The message shows no value.

    Raises:
        ConfigError: there is such a header.
    """
    if not isinstance(headers, Mapping):
        raise ConfigError(f"headers must map names to values, got a {type(headers).__name__}")
    for name, value in headers.items():
        if not isinstance(name, str) or not NAME.fullmatch(name) or name.lower() in OURS:
            raise ConfigError(f"headers: {name!r} cannot be set")
        if not isinstance(value, str) or not VALUE.fullmatch(value):
            raise ConfigError(f"headers: the value of {name!r} is no text, or has a character that headers cannot have")


def _proxy(name: str, url: object) -> Proxy:
    """Read the URL of a proxy; a missing scheme is `http`, as everywhere.

    Raises:
        ConfigError: It is of another kind. The message shows its scheme only: a login may stand anywhere.
    """
    if not isinstance(url, str):
        raise ConfigError(f"{name} must be a text like http://host:port, got a {type(url).__name__}")
    text = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        parts, host, port = urlsplit(""), None, 80
    if parts.scheme != "http" or not host or not url.isprintable() or parts.path.strip("/") or parts.query:
        kind = re.match(r"[\w+.-]{1,20}://|", text)
        wanted = "http://host:port or http://user:password@host:port"
        raise ConfigError(f"{name} must look like {wanted}, got {kind[0] if kind else ''}...")
    login = None if parts.username is None else f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return Proxy(host, port, login)


def _variables(scheme: str, environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the variables that name a proxy, the one that holds first. An empty one names none, and holds too."""
    for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper(), "all_proxy", "ALL_PROXY"):
        if name in environ and not (name == "HTTP_PROXY" and "REQUEST_METHOD" in environ):
            yield name, environ[name].strip()


def _is_direct(host: str, port: int, no_proxy: str) -> bool:
    """Say whether `no_proxy` names a host: by its name or that of a domain around it, address, network, or "*".

    >>> [_is_direct("api.example.com", 443, text) for text in ("example.com", ".example.com:443", "ample.com", "*")]
    [True, True, False, True]
    >>> [_is_direct("10.1.2.3", 80, text) for text in ("10.0.0.0/8", "10.1.2.3", "a, 10.1.2.3:80", "10.1.2.3:81")]
    [True, True, True, False]
    """
    host = host.lower().rstrip(".")
    for entry in re.split(r"[\s,]+", no_proxy.lower()):
        name, only = _host_and_port(entry)
        if only not in {None, port}:
            continue
        name = name.removeprefix("*").removeprefix(".").rstrip(".") if name != "*" else name
        if name and (name in {"*", host} or host.endswith(f".{name}") or _is_inside(host, name)):
            return True
    return False


def _host_and_port(entry: str) -> tuple[str, int | None]:
    """Split an entry of no_proxy: "host", "host:port", "[address]", "[address]:port", or an address of IPv6."""
    bare = re.fullmatch(r"\[([^]]*)\](?::(\d+))?|([^:]*):(\d+)", entry)
    if bare is None:
        return entry, None
    port = bare[2] or bare[4]
    return bare[1] or bare[3] or "", int(port) if port else None


def _is_inside(host: str, network: str) -> bool:
    """Say whether an address is the other one, or in its network."""
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except (ValueError, TypeError):  # a name; or IPv4 and IPv6
        return False
