"""`rxllm run` is killed twice and started again. RXLLM_LINES=5000 and RXLLM_LLMOCK_LINES=500 are the full size."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

import rxllm
from rxllm.testing import SimulatedProvider

LINES = int(os.environ.get("RXLLM_LINES", "200"))
LLMOCK_LINES = int(os.environ.get("RXLLM_LLMOCK_LINES", "60"))
WIDTH = 16
START_SECONDS = 40.0

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")]


def command(folder, url):
    path = os.pathsep.join([str(Path(rxllm.__path__[0]).parent), os.environ.get("PYTHONPATH", "")])
    options = ["run", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "--model", "gpt-4o-mini", "--url", url]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "rxllm", *options, "--concurrency", str(WIDTH), "--quiet"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
    )


def rows(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_twice(folder, url, count):
    """Run with two kills on the way, and to the end; return what was in the file at the kills, and the last words."""
    lines = [json.dumps({"id": f"line-{n}", "prompt": f"Say {n} in a word.", "max_tokens": 20}) for n in range(count)]
    (folder / "in.jsonl").write_text("\n".join(lines))
    output = folder / "out.jsonl"
    found = []
    for wanted in (count // 3, 2 * count // 3):
        running = command(folder, url)
        while rows(output) < wanted:
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        found.append(rows(output))
    last = command(folder, url)
    _, words = last.communicate()
    assert last.returncode == 0, words
    ids = Counter(json.loads(line)["custom_id"] for line in output.read_bytes().splitlines())
    assert ids == Counter({f"line-{n}": 1 for n in range(count)})
    return found, words


@pytest.mark.timeout(60 + LINES // 20)
def test_lines_asked_of_the_simulated_provider_with_two_kills_on_the_way_are_there_once(tmp_path):
    provider = SimulatedProvider(latency=0.02, faults={"500": 0.01, "reset": 0.005}, fault_retry_after=0.1)
    with provider.start() as server:
        found, words = killed_twice(tmp_path, server.url, LINES)
        log = server.log()
    good = sum(1 for arrival in log if arrival.reason == "ok")
    assert found[0] < found[1] < LINES
    assert f"{LINES:,} done, {found[1]:,} of them not asked in this run: {LINES:,} good, 0 failed" in words
    assert LINES <= good <= LINES + 2 * WIDTH  # what was on the way at a kill is asked again, and nothing else
    print(f"{LINES} lines, killed at {found}: {good} good answers, {len(log)} requests\n{words}")  # noqa: T201


@pytest.mark.live
@pytest.mark.timeout(60 + LLMOCK_LINES // 5)
def test_lines_asked_of_llmock_with_two_kills_on_the_way_are_there_once(tmp_path):
    if importlib.util.find_spec("llmock") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("llmock is not installed: it belongs to the extra 'test'")
        pytest.skip("llmock is not installed")
    with llmock() as address:
        found, words = killed_twice(tmp_path, f"{address}/v1", LLMOCK_LINES)
        with urllib.request.urlopen(f"{address}/_llmock/requests", timeout=10) as answer:  # noqa: S310  loopback
            seen = len(json.load(answer)["requests"])
    assert found[0] < found[1] < LLMOCK_LINES
    assert seen <= LLMOCK_LINES + 2 * WIDTH
    print(f"{LLMOCK_LINES} lines, killed at {found}: {seen} requests\n{words}")  # noqa: T201


@contextlib.contextmanager
def llmock():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    run = "import sys; from llmock.cli import app; sys.argv[0] = 'llmock'; app()"
    options = ["serve", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--log-level", "error"]
    process = subprocess.Popen(
        [sys.executable, "-c", run, *options, "--response-style", "echo"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{address}/_llmock/requests", timeout=10).close()  # noqa: S310  loopback
                break
            assert process.poll() is None, "llmock ended by itself"
            assert time.monotonic() < until, "llmock does not listen"
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(10)
