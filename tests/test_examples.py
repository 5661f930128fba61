"""The examples run as a newcomer runs them, and what they show is true."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rxllm
from rxllm.testing import SimulatedProvider

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NO_KEY = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
PATH = os.pathsep.join([str(Path(rxllm.__path__[0]).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def command(*arguments):
    return [sys.executable, "-W", "error", str(EXAMPLES / "quickstart.py"), *map(str, arguments)]


def run(folder, *arguments, **environment):
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=folder,
        env={**NO_KEY, "PYTHONPATH": PATH, **environment},
    )


def is_clean(status, errors):
    """Say whether there is nothing on stderr but progress, which a slow machine has time for."""
    return status == 0 and all(" in progress, " in line for line in errors.splitlines())


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_quickstart_asks_a_simulated_provider_and_writes_each_outcome_as_a_line_of_json(tmp_path):
    done = run(tmp_path, "--limit", 60)
    assert is_clean(done.returncode, done.stderr), done.stderr
    outcomes = lines(tmp_path / "summaries.jsonl")
    assert len({outcome["name"] for outcome in outcomes}) == len(outcomes) == 60
    for outcome in outcomes:
        assert (outcome["summary"] is None) is (outcome["error"] is not None)
        assert outcome["attempts"] >= 1
        assert sum(outcome["waited"].values()) <= outcome["seconds"] + 0.01
    assert "60 outcomes in" in done.stdout
    for said in ("answered", "failed", "retries", "refusals", "requests a minute", "tokens a minute", "waited for"):
        assert said in done.stdout
    assert int(re.search(r"(\d+)% of 600 requests in 2 s", done.stdout)[1]) <= 100


def test_the_quickstart_finds_more_than_five_thousand_texts_and_the_first_one_at_once(tmp_path):
    script = f"""
import runpy, sys
docstrings = runpy.run_path({str(EXAMPLES / "quickstart.py")!r})["docstrings"]
texts = docstrings()
next(texts)
early = "zipfile" not in sys.modules and "unittest" not in sys.modules
found = list(texts)
print(early, len(found) >= 5_000, len({{text for _, text in found}}) == len(found))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=tmp_path,
        env={**NO_KEY, "PYTHONPATH": PATH},
    )
    assert (done.stdout, done.stderr) == ("True True True\n", "")


def test_the_quickstart_asks_any_endpoint_with_the_key_of_the_environment(tmp_path):
    with SimulatedProvider(key="k-123", models=["some"]).start() as provider:
        arguments = ("--url", provider.url, "--model", "some", "--key-env", "SOME_KEY", "--output", "out.jsonl")
        done = run(tmp_path, *arguments, "--limit", 20, "--quota", "1000/second", SOME_KEY="k-123")
        assert provider.statistics().statuses == {200: 20}
        again = run(tmp_path, *arguments, SOME_KEY="k-123")
        other = run(tmp_path, *arguments[:-1], "other.jsonl", SOME_KEY="wrong")
    assert is_clean(done.returncode, done.stderr), done.stderr
    assert "k-123" not in done.stdout
    assert len(lines(tmp_path / "out.jsonl")) == 20

    assert again.returncode == 2
    assert "out.jsonl exists" in again.stderr
    assert len(lines(tmp_path / "out.jsonl")) == 20

    assert other.returncode == 1
    assert "the server does not accept the key" in other.stdout
    assert "gave up" in other.stderr
    assert not (tmp_path / "other.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(("--url", "http://127.0.0.1:9/v1", "--model", "some"), "OPENAI_API_KEY", id="a-key-is-missing"),
        pytest.param(("--url", "htp:/x", "--model", "some", "--key-env", "HOME"), "base_url", id="a-url-is-none"),
        pytest.param(("--url", "http://127.0.0.1:9/v1"), "--model", id="a-model-is-missing"),
        pytest.param(("--quota", "5 every minute"), "5 every minute", id="a-quota-cannot-be-read"),
        pytest.param(("--limit", "0"), "--limit", id="a-limit-is-zero"),
        pytest.param(("--output", "no/such/folder"), "no/such/folder", id="an-output-cannot-be-opened"),
    ],
)
def test_the_quickstart_says_in_a_line_what_is_wrong_when(tmp_path, arguments, said):
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_quickstart_gives_up_on_an_address_where_nobody_answers(tmp_path):
    done = run(tmp_path, "--url", "http://127.0.0.1:9/v1", "--model", "some", "--key-env", "HOME")
    assert done.returncode == 1
    assert "cannot reach 127.0.0.1:9" in done.stdout
    assert done.stderr.splitlines()[-1] == "quickstart: gave up after 3 failures and no answer"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_in_the_quickstart_gives_the_summary_of_what_was_done(tmp_path):
    with subprocess.Popen(
        command(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**NO_KEY, "PYTHONPATH": PATH},
    ) as process:
        seen = [process.stdout.readline() for _ in range(6)]  # two of the head, an empty one, three outcomes
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=40)
    assert process.returncode == 130
    assert is_clean(0, errors), errors
    assert ": " in seen[-1]
    outcomes = lines(tmp_path / "summaries.jsonl")
    assert f"{len(outcomes):,} outcomes in" in rest
    assert 3 <= len(outcomes) < 5_000


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
def test_the_quickstart_draws_its_progress_in_place_in_a_terminal(tmp_path):
    import pty

    ours, its = pty.openpty()
    with subprocess.Popen(
        command("--limit", 300),
        stdout=its,
        stderr=its,
        cwd=tmp_path,
        env={**NO_KEY, "PYTHONPATH": PATH, "COLUMNS": "80"},
    ) as process:
        os.close(its)
        shown = b""
        with contextlib.suppress(OSError):  # it has closed its end
            while piece := os.read(ours, 65_536):
                shown += piece
        os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    before, summary = text.split("300 outcomes in")
    assert " in progress, " in before
    assert before.endswith("\r\x1b[K\r\n")
    assert "\r\x1b[K" not in summary
    drawn = [line for piece in before.split("\r\n") for line in piece.split("\r") if "in progress" in line]
    assert len(drawn) >= 2
    assert all(len(line) <= 80 + len("\x1b[K") for line in drawn)


def test_the_endless_example_leaves_nothing_behind():
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "endless.py"), "--seconds", "0.5"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**NO_KEY, "PYTHONPATH": PATH},
    )
    assert (done.returncode, done.stderr) == (0, "")
    for said in ("calls in progress: 0", "generator open: 0", "threads besides the loop's: 0"):
        assert said in done.stdout


def test_a_controller_of_ones_own_finds_the_limit_of_the_server(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / "own_controller.py")],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=tmp_path,
        env={**NO_KEY, "PYTHONPATH": PATH},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3000 of 3000 answered, ")
    limits = [int(limit) for limit in done.stdout.split("the last limits: ")[1].split()]
    assert 6 <= min(limits) <= 12 <= max(limits) <= 18
