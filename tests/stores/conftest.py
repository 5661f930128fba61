"""Real servers on free ports of the loopback address; where one is not installed tests skip, and in CI they fail."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest


def binary(name: str) -> str:
    """Return where a server is installed."""
    found = shutil.which(name)
    if found is None:
        reason = f"{name} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}, and CI must not skip what it tests")
        pytest.skip(reason)
    return found


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server that can be ended and started again on the same port."""

    def __init__(self, *command: str) -> None:
        self.port = free_port()
        self.command = [part.format(port=self.port) for part in command]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"redis://{self.address}"

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(500):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self.process.poll() is None, f"{self.command[0]} has ended"
            time.sleep(0.01)
        raise AssertionError(f"{self.command[0]} does not listen on {self.address}")

    def stop(self) -> None:
        """End it as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def say(self, *words: str) -> bytes:
        """Send one command of Redis; return its raw answer."""
        line = b"".join([b"*%d\r\n" % len(words), *(b"$%d\r\n%s\r\n" % (len(w.encode()), w.encode()) for w in words)])
        with socket.create_connection(("127.0.0.1", self.port), 2) as connection:
            connection.sendall(line)
            return connection.recv(65_536)


def redis_server(folder: Path, *options: str) -> Server:
    plain = ("--save", "", "--appendonly", "no", "--dir", str(folder))
    return Server(binary("redis-server"), "--bind", "127.0.0.1", "--port", "{port}", *plain, *options)


@pytest.fixture(scope="session")
def redis(tmp_path_factory):
    """A Redis for all tests that leave it as it is."""
    server = redis_server(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_redis(tmp_path):
    """A Redis of its own for a test that ends it, or begins without it."""
    server = redis_server(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def secret_redis(tmp_path):
    """A Redis that wants a password."""
    server = redis_server(tmp_path, "--requirepass", "sesame/@open")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def memcached():
    server = Server(binary("memcached"), "-l", "127.0.0.1", "-p", "{port}", "-U", "0", "-u", "nobody")
    server.start()
    yield server
    server.stop()
