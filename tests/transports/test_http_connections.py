"""The ways to a server: proxies, TLS, sockets in the file system; and that secrets stay on them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import pickle
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from _scripted import (
    DIRECT,
    KEY,
    PATIENT,
    Close,
    Scripted,
    Stall,
    answer,
    check_clean,
    run,
    scripted,
    sent,
    streamed,
    transport_to,
    until,
)

from rxllm import Timeouts
from rxllm.errors import AuthError, CallError, ConfigError, ConnectionError, DecodeError, TimeoutError
from rxllm.policies.connection import Connection
from rxllm.providers.base import Call
from rxllm.transports import HttpTransport

pytestmark = pytest.mark.usefixtures("loops")
ways = pytest.mark.parametrize("way", [sent, streamed], ids=["in-one-piece", "streamed"])

CALL = Call("/x", b"{}")
LOGIN = "me:pass-marker-98765"


# proxies


class Proxy:
    """A proxy: it passes plain requests on to one server, whatever they ask for, and makes tunnels."""

    def __init__(self, server: Scripted, refuses: bytes) -> None:
        self.heads: list[bytes] = []
        self.where = ""
        self._port = int(server.url.removesuffix("/v1").rpartition(":")[2])
        self._refuses = refuses
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, RuntimeError, asyncio.IncompleteReadError):
            await self._serve(reader, writer)
        writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        if self._refuses:
            writer.write(self._refuses)
            await writer.drain()
            await reader.read()
            return
        to_server, from_server = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers |= {from_server, writer}
        if head.startswith(b"CONNECT"):
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            from_server.write(head)
        back = asyncio.create_task(self._pass_on(to_server, writer))
        self._tasks.add(back)
        await self._pass_on(reader, from_server)
        await back

    @staticmethod
    async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def proxy_to(server: Scripted, refuses: bytes = b"") -> AsyncIterator[Proxy]:
    proxy = Proxy(server, refuses)
    listener = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.where = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        listener.close()
        proxy.close()


def basic(login: str) -> bytes:
    return base64.b64encode(login.encode())


@ways
@pytest.mark.parametrize("login", ["", LOGIN], ids=["without-a-login", "with-a-login"])
def test_a_plain_call_names_its_target_to_the_proxy(login, way):
    async def main() -> None:
        async with scripted([answer(b"ok")]) as server, proxy_to(server) as proxy:
            connection = Connection(proxy=f"http://{login}{'@' if login else ''}{proxy.where}")
            async with transport_to("http://api.example.com:8080/v1", connection) as transport:
                for _ in range(2):
                    assert (await way(transport, CALL, PATIENT)).body == b"ok"
            (_, head, body), _ = server.requests
            assert head.startswith(b"POST http://api.example.com:8080/v1/x HTTP/1.1\r\nHost: api.example.com:8080\r\n")
            assert (b"Proxy-Authorization: Basic " + basic(login) in head) is bool(login)
            assert f"Authorization: Bearer {KEY}".encode() in head
            assert body == b"{}"
            assert len(proxy.heads) == 1  # the connection is kept

    run(main())


@ways
@pytest.mark.parametrize("login", ["", LOGIN], ids=["without-a-login", "with-a-login"])
def test_a_tunnel_shows_the_proxy_nothing_but_the_host(login, way, certificates):
    async def main() -> None:
        async with scripted([answer(b"ok")], tls=certificates.server()) as server, proxy_to(server) as proxy:
            connection = Connection(proxy=f"http://{login}{'@' if login else ''}{proxy.where}", ca=str(certificates.ca))
            async with transport_to("https://api.example.com/v1", connection) as transport:
                for _ in range(2):
                    assert (await way(transport, CALL, PATIENT)).body == b"ok"
            assert len(server.requests) == 2
            assert server.requests[0][1].startswith(b"POST /v1/x HTTP/1.1\r\nHost: api.example.com\r\n")
            assert b"proxy-authorization" not in server.requests[0][1].lower()
            (head,) = proxy.heads
            assert head.startswith(b"CONNECT api.example.com:443 HTTP/1.1\r\n")
            assert (b"Proxy-Authorization: Basic " + basic(login) in head) is bool(login)
            assert KEY.encode() not in head

    run(main())


@pytest.mark.parametrize(
    ("scheme", "variable"), [("http", "http_proxy"), ("https", "HTTPS_PROXY"), ("http", "all_proxy")]
)
def test_the_proxy_of_the_environment_is_taken_unless_it_is_not_to_be(scheme, variable, monkeypatch, certificates):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    async def main() -> None:
        tls = certificates.server() if scheme == "https" else None
        async with scripted([answer(b"ok")], tls=tls) as server, proxy_to(server) as proxy:
            monkeypatch.setenv(variable, f"http://{LOGIN}@{proxy.where}")
            ca = str(certificates.ca) if tls else None
            async with transport_to(server.url, Connection(ca=ca)) as transport:
                await transport.send(CALL, PATIENT)
            assert len(proxy.heads) == 1
            async with transport_to(server.url, Connection(ca=ca, trust_env=False)) as transport:
                await transport.send(CALL, PATIENT)
            monkeypatch.setenv("no_proxy", "example.com,127.0.0.1")
            async with transport_to(server.url, Connection(ca=ca)) as transport:
                await transport.send(CALL, PATIENT)
            assert len(proxy.heads) == 1
            assert len(server.requests) == 3

    run(main())


@ways
@pytest.mark.parametrize(
    ("refusal", "kind", "text"),
    [
        pytest.param(b"407 Proxy Authentication Required", AuthError, "wants a login", id="login"),
        pytest.param(b"502 Bad Gateway", ConnectionError, "makes no connection to api.example.com:443", id="gateway"),
    ],
)
def test_a_proxy_that_makes_no_tunnel_is_named_without_its_login(refusal, kind, text, way):
    async def main() -> None:
        refuses = b"HTTP/1.1 " + refusal + b"\r\nContent-Length: 0\r\n\r\n"
        async with scripted([answer()]) as server, proxy_to(server, refuses) as proxy:
            connection = Connection(proxy=f"http://{LOGIN}@{proxy.where}")
            async with transport_to("https://api.example.com/v1", connection) as transport:
                with pytest.raises(kind, match=text) as caught:
                    await way(transport, CALL, PATIENT)
            check_secret(caught.value)
            assert proxy.where in str(caught.value)
            assert (caught.value.sent, caught.value.transient) == (False, kind is ConnectionError)

    run(main())


def check_secret(error: BaseException) -> None:
    """Nothing of the login and the key is in an error."""
    check_clean(error, "pass-marker")
    assert b"pass-marker" not in pickle.dumps(error)


@ways
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_cannot_be_reached_is_named_not_the_server(scheme, way):
    async def main() -> None:
        async with scripted([answer()]) as server:
            where = server.url[7:-3]
        connection = Connection(proxy=f"http://{LOGIN}@{where}")
        async with transport_to(f"{scheme}://api.example.com/v1", connection) as transport:
            with pytest.raises(ConnectionError, match=f"cannot reach the proxy {where}: ") as caught:
                await way(transport, CALL, PATIENT)
            check_secret(caught.value)
            assert not caught.value.sent

    run(main())


def test_a_proxy_that_says_nothing_is_a_connect_timeout():
    async def main() -> None:
        async with scripted([Stall]) as server:
            async with transport_to(
                "https://api.example.com/v1", Connection(proxy=f"http://{server.url[7:-3]}")
            ) as there:
                with pytest.raises(TimeoutError) as caught:
                    await there.send(CALL, Timeouts(connect=0.05))
                assert (caught.value.phase, caught.value.sent) == ("connect", False)
            await until(lambda: server.open == 0)

    run(main())


@pytest.mark.parametrize("variable", ["https_proxy", "ALL_PROXY"])
def test_a_proxy_of_another_kind_in_the_environment_is_no_reason_to_go_without(variable, monkeypatch):
    monkeypatch.setenv(variable, f"socks5://{LOGIN}@localhost:1080")
    with pytest.raises(
        ConfigError, match=f"the environment variable {variable} must look like .*, got socks5://"
    ) as caught:
        HttpTransport("https://api.example.com/v1", {})
    assert "pass-marker" not in str(caught.value)
    HttpTransport("https://api.example.com/v1", {}, Connection(trust_env=False))


# redirects


@ways
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_answer_and_the_key_goes_to_no_other_server(status, way):
    async def main() -> None:
        async with scripted([answer(b"secret")]) as other:
            moved = answer(b"moved", status=status, extra=f"Location: {other.url}/x\r\n".encode())
            async with scripted([moved]) as server, transport_to(server.url) as transport:
                for method in ("POST", "GET"):
                    end = await way(transport, Call("/x", method=method), PATIENT)
                    assert (end.status, end.headers["location"], end.body) == (status, f"{other.url}/x", b"moved")
            await asyncio.sleep(0.01)
            assert other.connections == 0

    run(main())


# headers


def test_extra_headers_are_sent_and_go_before_the_clients_own():
    async def main() -> None:
        connection = Connection(trust_env=False, headers={"X-Team": "blue", "authorization": "Basic other"})
        async with scripted([answer()]) as server, transport_to(server.url, connection) as transport:
            await transport.send(CALL, PATIENT)
            head = server.requests[0][1]
            assert b"X-Team: blue\r\n" in head
            assert b"authorization: Basic other\r\n" in head
            assert KEY.encode() not in head

    run(main())


# sockets in the file system


@ways
def test_a_socket_in_the_file_system_is_a_way_too(way, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not for a socket

    async def main() -> None:
        server = Scripted([[answer(b"ok")]])
        path = str(tmp_path / "model.sock")
        listener = await asyncio.start_unix_server(server.serve, path)
        async with transport_to("http://model/v1", Connection(unix_socket=path)) as transport:
            for _ in range(2):
                assert (await way(transport, CALL, PATIENT)).body == b"ok"
            assert server.connections == 1
            assert b"POST /v1/x HTTP/1.1\r\nHost: model\r\n" in server.requests[0][1]
        listener.close()
        server.close()
        await until(lambda: server.open == 0)

    run(main())


def test_a_socket_that_does_not_exist_is_named():
    async def main() -> None:
        async with transport_to("http://model/v1", Connection(unix_socket="/no/such.sock")) as transport:
            with pytest.raises(ConnectionError, match="cannot reach /no/such.sock: .* is unix_socket right") as caught:
                await transport.send(CALL, PATIENT)
            check_clean(caught.value)
            assert not caught.value.sent

    run(main())


def test_a_socket_needs_a_base_url_with_http():
    with pytest.raises(ConfigError, match="unix_socket needs a base_url with http://"):
        HttpTransport("https://model/v1", {}, Connection(unix_socket="/x"))


# TLS


class Certificates:
    """A CA of our own, with a certificate for a server and one for a client."""

    def __init__(self, command: str, folder: Path) -> None:
        self.command = command
        self.folder = folder
        self.ca = folder / "ca.pem"
        names = "subjectAltName=IP:127.0.0.1,DNS:api.example.com\n"
        (folder / "ext").write_text(f"{names}authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n")
        new = "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256"
        usage = "-addext keyUsage=critical,keyCertSign,cRLSign"  # which a strict client asks of it, as Python 3.13 is
        self.openssl(f"{new} -x509 -days 2 {usage} -subj /CN=ca -keyout ca.key -out ca.pem")
        for name in ("server", "client"):
            self.openssl(f"{new} -subj /CN={name} -keyout {name}.key -out {name}.csr")
            signed = "-CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -sha256 -extfile ext"
            self.openssl(f"x509 -req -in {name}.csr {signed} -out {name}.pem")
        (folder / "both.pem").write_text((folder / "client.key").read_text() + (folder / "client.pem").read_text())
        self.openssl("ec -in client.key -aes128 -passout pass:word -out locked.key")

    def openssl(self, command: str) -> None:
        subprocess.run([self.command, *command.split()], cwd=self.folder, check=True, capture_output=True)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def server(self, *, asks: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.path("server.pem"), self.path("server.key"))
        if asks:
            context.load_verify_locations(self.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    command = shutil.which("openssl")
    if command is None:
        pytest.skip("the command openssl makes the certificates")
    return Certificates(command, tmp_path_factory.mktemp("certificates"))


@ways
def test_a_server_with_a_certificate_of_the_own_ca_is_trusted(way, certificates):
    async def main() -> None:
        connection = Connection(trust_env=False, ca=str(certificates.ca))
        async with scripted([answer(b"ok")], tls=certificates.server()) as server:
            async with transport_to(server.url, connection) as transport:
                for _ in range(2):
                    assert (await way(transport, CALL, PATIENT)).body == b"ok"
            await until(lambda: server.open == 0)
            assert server.connections == 1

    run(main())


@pytest.mark.parametrize(
    ("of_ours", "host"), [(False, "127.0.0.1"), (True, "localhost")], ids=["unknown-ca", "another-host"]
)
def test_a_server_that_cannot_prove_who_it_is_gets_nothing(of_ours, host, certificates):
    async def main() -> None:
        connection = Connection(trust_env=False, ca=str(certificates.ca)) if of_ours else DIRECT
        async with scripted([answer()], tls=certificates.server()) as server:
            async with transport_to(server.url.replace("127.0.0.1", host), connection) as transport:
                with pytest.raises(ConnectionError, match="certificate of .* is not accepted: ") as caught:
                    await transport.send(CALL, PATIENT)
            check_clean(caught.value)
            assert not caught.value.sent
            assert not server.requests

    run(main())


def test_verify_false_takes_any_certificate_and_warns_once(certificates, caplog):
    async def main() -> None:
        connection = Connection(trust_env=False, verify=False)
        async with scripted([answer(b"ok")], tls=certificates.server()) as server:
            for _ in range(2):
                async with transport_to(server.url.replace("127.0.0.1", "localhost"), connection) as transport:
                    assert (await transport.send(CALL, PATIENT)).body == b"ok"

    with caplog.at_level(logging.WARNING, "rxllm"):
        run(main())
    (record,) = [record for record in caplog.records if record.name == "rxllm.transports"]
    assert "is not verified: verify=False" in record.getMessage()
    HttpTransport("http://plain.example", {}, Connection(verify=False))
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("certificate", "key"), [("client.pem", "client.key"), ("both.pem", None)], ids=["two-files", "one-file"]
)
def test_a_server_that_asks_gets_the_clients_certificate(certificate, key, certificates):
    async def main() -> None:
        named = Connection(
            trust_env=False,
            ca=str(certificates.ca),
            certificate=certificates.path(certificate),
            certificate_key=key and certificates.path(key),
        )
        async with scripted([answer(b"ok")], tls=certificates.server(asks=True)) as server:
            async with transport_to(server.url, named) as transport:
                assert (await transport.send(CALL, PATIENT)).body == b"ok"
            async with transport_to(server.url, Connection(trust_env=False, ca=str(certificates.ca))) as transport:
                with pytest.raises(CallError) as caught:
                    await transport.send(CALL, PATIENT)
                assert isinstance(caught.value, ConnectionError | DecodeError)
                check_clean(caught.value)
            assert len(server.requests) == 1

    run(main())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        pytest.param(
            {"ca": "nothing.pem"}, "ca .*nothing.pem' cannot be read as certificates: No such file", id="no-ca"
        ),
        pytest.param({"ca": "client.key"}, "ca .*client.key' cannot be read as certificates", id="a-key-as-a-ca"),
        pytest.param({"certificate": "nothing.pem"}, "certificate .*nothing.pem' cannot be used", id="no-certificate"),
        pytest.param({"certificate": "client.pem"}, "is the key in it, and not encrypted", id="no-key-in-it"),
        pytest.param(
            {"certificate": "client.pem", "certificate_key": "server.key"}, "cannot be used", id="the-key-of-another"
        ),
        pytest.param(
            {"certificate": "client.pem", "certificate_key": "locked.key"}, "not encrypted", id="an-encrypted-key"
        ),
    ],
)
def test_certificates_that_cannot_be_used_are_refused_at_once(fields, text, certificates):
    connection = Connection(trust_env=False, **{name: certificates.path(file) for name, file in fields.items()})
    with pytest.raises(ConfigError, match=text) as caught:
        HttpTransport("https://127.0.0.1", {}, connection)
    assert caught.value.__context__ is None
    HttpTransport("http://127.0.0.1", {}, connection)  # not needed there


def test_a_connection_that_is_none_is_refused():
    connection: Any = {"proxy": f"http://{LOGIN}@host"}
    with pytest.raises(ConfigError, match="connection must be a Connection, got a dict"):
        HttpTransport("http://host", {}, connection)


def test_a_tls_connection_that_is_cut_is_cut_short(certificates):
    async def main() -> None:
        connection = Connection(trust_env=False, ca=str(certificates.ca))
        half = b"HTTP/1.1 200 X\r\nContent-Length: 20\r\n\r\nhalf"
        async with (
            scripted([half, 0.01, Close], tls=certificates.server()) as server,
            transport_to(server.url, connection) as transport,
        ):
            reading = await transport.open(CALL, PATIENT)
            assert await reading.read() == b"half"
            with pytest.raises(DecodeError, match="cut short"):
                await reading.read()

    run(main())
