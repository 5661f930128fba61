"""The simulated provider in a process of its own: what runs there."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import msgspec

from rxllm.errors import ConfigError
from rxllm.testing._server import Server
from rxllm.testing._settings import checked, checked_steps

if TYPE_CHECKING:
    from collections.abc import Callable

PARENT_CHECK: Final = 1.0  # seconds between looks whether the parent is still there


class Hello(msgspec.Struct):
    """What the parent sends: one line of JSON."""

    path: list[str]  # its sys.path
    port: int
    seed: int
    token: str  # of the control route
    changes: dict[str, Any]
    steps: list[tuple[float, dict[str, Any]]]


class Ready(msgspec.Struct):
    """What the child answers: one line of JSON; a port or an error."""

    port: int = 0
    error: str | None = None
    is_config: bool = False


BOOT: Final = """\
import json, sys
line = sys.stdin.buffer.readline()
sys.path[:] = json.loads(line)["path"]
from rxllm.testing._child import main
main(line)
"""


def main(line: bytes) -> None:
    """Run the server until the parent closes the pipe or dies."""
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what an answer function prints must not pass for ours
    raise_file_limit()
    hello = msgspec.json.decode(line, type=Hello)
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # requests make no cycles
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(hello, answers, parent))


async def serve(hello: Hello, answers: BinaryIO, parent: int) -> None:
    """Serve until the parent has gone."""
    ready = Ready()
    server = None
    try:
        server = Server(checked(hello.changes), seed=hello.seed, steps=checked_steps(hello.steps), token=hello.token)
        ready.port = await server.open(hello.port)
    except (OSError, ConfigError) as error:
        ready = Ready(error=str(error), is_config=isinstance(error, ConfigError))
    with contextlib.suppress(BrokenPipeError), answers:
        answers.write(msgspec.json.encode(ready) + b"\n")
    if server is None or ready.error is not None:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    threading.Thread(target=watch, args=(loop, ended), daemon=True).start()
    while not ended.is_set() and os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), PARENT_CHECK)
    await server.close()


def watch(loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
    """Wait for the end of the pipe from the parent: it closes ours, or it has died."""
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    with contextlib.suppress(RuntimeError):  # the loop has ended first
        loop.call_soon_threadsafe(ended.set)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return uvloop's factory when it is installed."""
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def raise_file_limit() -> None:
    """Allow as many connections as the system does."""
    if sys.platform == "win32":
        return
    import resource  # noqa: PLC0415 - not on Windows

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS calls the hard limit infinite and refuses it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
