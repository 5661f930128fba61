"""SimulatedProvider as a child process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import msgspec
import pytest

from rxllm.errors import ConfigError
from rxllm.testing.simulated import Latency, ServerQuota, SimulatedProcess, SimulatedProvider, fingerprint

PROMPTS = [f"prompt {number}" for number in range(5)]


def ask(provider: SimulatedProcess, prompts: list[str] = PROMPTS) -> list[tuple[int, dict]]:
    connection = HTTPConnection("127.0.0.1", port_of(provider.url), timeout=20)
    seen = []
    for prompt in prompts:
        body = msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": prompt}]})
        connection.request("POST", "/v1/chat/completions", body)
        reply = connection.getresponse()
        seen.append((reply.status, msgspec.json.decode(reply.read())))
    connection.close()
    return seen


def port_of(url: str) -> int:
    return int(url.split(":")[2].split("/", maxsplit=1)[0])


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until_gone(port: int) -> None:
    for _ in range(400):
        if not is_listening(port):
            return
        time.sleep(0.02)
    raise AssertionError("the child still listens")


def test_a_child_serves_logs_changes_and_ends() -> None:
    start = time.monotonic()
    provider = SimulatedProvider(
        requests=ServerQuota(1_000, 60.0, "bucket"),
        latency=Latency(base=0.001, sigma=0.5),
        steps=[(900.0, {"knee": 1})],
    )
    with provider.start() as child:
        for prompt, (status, reply) in zip(PROMPTS, ask(child), strict=True):
            assert status == 200
            assert fingerprint(prompt) in reply["id"]
        log, statistics = child.log(), child.statistics()
        assert log.markers() == {fingerprint(prompt): 1 for prompt in PROMPTS}
        assert all(start <= row.arrived <= row.answered for row in log)
        assert (statistics.arrivals, statistics.admitted, statistics.statuses) == (5, 5, {200: 5})
        assert statistics.cpu_seconds > 0
        assert child.peak(60.0) == 5

        child.set(requests=4, tokens=ServerQuota(10, 1.0, "fixed"), latency=0.0, marked={"5": ["500"]})
        assert ask(child)[0][0] == 429
        with pytest.raises(ConfigError, match=r"knee .* -1"):
            child.set(knee=-1)
        port = port_of(child.url)
        assert str(child.pid) in repr(child)
    assert not is_listening(port)
    child.close()
    with pytest.raises(ConfigError, match="closed"):
        child.log()


def test_a_child_imports_the_answer_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_answers.py").write_text(
        "print('noise at import')\n"
        "def shout(prompt: str, body: dict):\n    print('noise on standard output')\n    return prompt.upper()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_answers  # type: ignore[import-not-found]

    with SimulatedProvider(answer=my_answers.shout).start() as child:
        assert ask(child, ["abc"])[0][1]["choices"][0]["message"]["content"] == "ABC"
        child.set(answer="echo")
        assert ask(child, ["abc"])[0][1]["choices"][0]["message"]["content"] == "abc"
        child.set(answer="my_answers:shout")
        assert ask(child, ["abc"])[0][1]["choices"][0]["message"]["content"] == "ABC"
        with pytest.raises(ConfigError, match="cannot be imported by a child"):
            child.set(answer=lambda prompt, body: prompt)
    with pytest.raises(ConfigError, match="cannot be imported by a child"):
        SimulatedProvider(answer=lambda prompt, body: prompt).start()


def test_a_taken_port_is_an_os_error_that_names_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=str(port)):
            SimulatedProvider(port=port).start()


def test_a_dead_child_is_an_os_error_and_still_closes() -> None:
    with SimulatedProvider().start() as child:
        os.kill(child.pid, signal.SIGKILL)
        wait_until_gone(port_of(child.url))
        with pytest.raises(OSError):  # noqa: PT011 - refused or reset
            child.statistics()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_the_child_does_not_outlive_a_killed_parent() -> None:
    script = (
        "import sys\n"
        f"sys.path[:] = {sys.path!r}\n"
        "from rxllm.testing.simulated import SimulatedProvider\n"
        "child = SimulatedProvider(latency=60.0).start()\n"
        "print(child.url, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        port = port_of(parent.stdout.readline())
        assert is_listening(port)
        parent.kill()
        parent.wait()
        wait_until_gone(port)


def test_the_child_ignores_the_terminals_interrupt() -> None:
    with SimulatedProvider().start() as child:
        os.kill(child.pid, signal.SIGINT)
        assert ask(child)[0][0] == 200


def test_strangers_do_not_reach_the_control_route() -> None:
    with SimulatedProvider().start() as child:
        for path in ("/control/log", "/control//log", "/control/0123/statistics"):
            connection = HTTPConnection("127.0.0.1", port_of(child.url), timeout=20)
            connection.request("GET", path)
            assert connection.getresponse().status == 404
            connection.close()


def test_forgetting_a_child_ends_it() -> None:
    child = SimulatedProvider().start()
    port = port_of(child.url)
    del child
    wait_until_gone(port)
