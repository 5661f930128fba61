"""The example of a shared quota runs, and the server's log says what it claims."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rxllm

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "shared_quota.py"
PATH = str(Path(rxllm.__path__[0]).parent)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, "PYTHONPATH": PATH, **environment},
    )


@pytest.mark.slow
def test_two_processes_share_a_quota_and_no_window_of_the_servers_log_is_over_it(redis):
    done = run("--redis", redis.url, "--seconds", "2.5")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    answered = [int(number.replace(",", "")) for number in re.findall(r"process \d: ([\d,]+) answered", done.stdout)]
    assert len(answered) == 2
    assert all(answered)
    arrived, peak = re.search(r"log: ([\d,]+) requests, at most (\d+) in any 2 s", done.stdout).groups()
    assert int(peak) <= 400
    assert int(arrived.replace(",", "")) >= sum(answered)


def test_without_a_redis_server_it_says_what_to_install(tmp_path):
    done = run(PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "redis-server is not installed: install it, or give the URL of a Redis with --redis\n"
