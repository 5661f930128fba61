"""The command line among other programs: pipes, terminals, rights, signals."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import rxllm
from rxllm.cli import main
from rxllm.cli.progress import Screen, Tally, log_pause
from rxllm.cli.running import Interrupts, verdict
from rxllm.errors import AuthError
from rxllm.messages import Outcome, Request
from rxllm.testing import SimulatedProvider

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals, users and pipes of Unix")

ROOT = str(Path(rxllm.__path__[0]).parent)
MAIN = "import sys; from rxllm.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def server():
    with SimulatedProvider().start() as process:
        yield process


@pytest.fixture
def options(server):
    return ["--model", "any", "--url", server.url, "--concurrency", "4"]  # which are those of `check` as well


def lines(count):
    return "".join(json.dumps({"id": f"line-{n}", "prompt": f"Say {n}."}) + "\n" for n in range(count))


def rows(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def start(*arguments, script=MAIN, **settings):
    """Start the program; everything of it is a pipe unless said otherwise."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    path = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    ours = {"PYTHONPATH": path, "TERM": "xterm", "PYTHONUNBUFFERED": ""}  # the last: so that it fails at the very end
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        text=True,
        env={**os.environ, **ours},
        **{**pipes, **settings},
    )


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def pipe_in():
    """Put a text, and the end of it, into the standard input."""
    kept = os.dup(0)

    def put(text):
        out, into = os.pipe()
        os.write(into, text.encode())
        os.close(into)
        os.dup2(out, 0)
        os.close(out)

    yield put
    os.dup2(kept, 0)
    os.close(kept)


# Pipes


def test_requests_come_through_a_pipe_and_the_next_run_goes_on(options, tmp_path, pipe_in, capsys):
    output = tmp_path / "out.jsonl"
    pipe_in(lines(3) + "{\n")
    assert main(["run", "-", "-o", str(output), *options]) == 1
    assert "the standard input, line 4: not JSON" in capsys.readouterr().err
    assert len(rows(output)) == 3
    pipe_in(lines(5))
    assert main(["run", "-", "-o", str(output), *options]) == 0
    assert "5 done, 3 of them not asked in this run: 5 good" in capsys.readouterr().err
    assert len(rows(output)) == 5


def test_retry_wants_again_what_came_through_a_pipe(options, tmp_path, pipe_in, capsys):
    output = tmp_path / "out.jsonl"
    pipe_in("prompt\na\n")
    assert main(["run", "-", "-o", str(output), *options, "--format", "csv"]) == 0
    assert main(["retry", str(output)]) == 2
    assert "give them again, with --input" in capsys.readouterr().err
    pipe_in("prompt\na\nb\n")
    assert main(["retry", str(output), "--input", "-"]) == 0
    assert len(rows(output)) == 2


def test_a_named_pipe_is_read_once_from_its_beginning(options, tmp_path, capsys):
    pipe, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    os.mkfifo(pipe)
    writing = threading.Thread(target=pipe.write_text, args=(lines(3),))
    writing.start()
    assert main(["run", str(pipe), "-o", str(output), *options]) == 0
    writing.join()
    assert "3 done: 3 good, 0 failed" in capsys.readouterr().err


def test_check_reads_a_pipe_and_a_pipe_is_no_parquet_file(options, pipe_in, capsys):
    pipe_in("{\n" + lines(1))
    assert main(["check", "-", *options]) == 1
    assert "the standard input, line 1: not JSON" in capsys.readouterr().out
    assert main(["check", "-", *options, "--format", "parquet"]) == 2
    assert "give a file" in capsys.readouterr().err


def test_a_closed_input_is_said_in_a_line(options, pipe_in, capsys):
    os.close(0)
    assert main(["check", "-", *options]) == 2
    assert capsys.readouterr().err == "rxllm: cannot read the standard input: Bad file descriptor\n"


def test_ctrl_c_ends_a_run_whose_pipe_says_nothing(options, tmp_path):
    output = tmp_path / "out.jsonl"
    default = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + MAIN
    running = start("run", "-", "-o", str(output), *options, script=default)
    running.stdin.write(lines(2))
    running.stdin.flush()
    wait_for(lambda: len(rows(output)) == 2)
    running.send_signal(signal.SIGINT)
    wait_for(lambda: running.poll() is not None)  # its input is still open
    _, told = running.communicate(timeout=30)
    assert running.returncode == 130, told
    assert "Fatal" not in told
    assert "Traceback" not in told


def test_a_run_goes_on_when_nobody_reads_what_it_says(options, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("{\n" + lines(20))
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as broken:
        running = start("run", str(source), "-o", str(output), *options, stderr=broken)
        running.communicate(timeout=30)
    assert (running.returncode, len(rows(output))) == (1, 20)  # 1 is for the bad line


@pytest.mark.parametrize("broken", ["a-reader-that-left", "a-full-disk"])
def test_check_ends_in_peace_when_nobody_takes_its_report(options, tmp_path, broken):
    source = tmp_path / "in.jsonl"
    source.write_text(lines(2))
    if broken == "a-full-disk":
        if not Path("/dev/full").exists():
            pytest.skip("there is no /dev/full")
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        read, out = os.pipe()
        os.close(read)
    with os.fdopen(out, "w") as sink:
        checking = start("check", str(source), *options, stdout=sink)
        _, told = checking.communicate(timeout=30)
    expected = "" if broken == "a-reader-that-left" else "rxllm: No space left on device\n"
    assert (checking.returncode, told) == (1, expected)


# Rights


AS_NOBODY = """
import asyncio, encodings.idna, json, os, resource, sys
from rxllm.cli import main
assert main(json.loads(sys.argv[2])) == 0  # nobody may not read what is imported later
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for arguments in json.loads(sys.argv[1]):
    print(main(arguments), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become nobody")
def test_what_may_not_be_read_or_written_is_said_in_a_line_and_nothing_changes(options):
    with tempfile.TemporaryDirectory() as name:  # pytest's is for its owner alone
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "in.jsonl").write_text(lines(1))
        free, locked = folder / "free", folder / "locked"
        free.mkdir()
        free.chmod(0o777)
        (free / "kept.jsonl").touch(mode=0o444)
        (free / "told.jsonl.run.json").mkdir()
        (free / "secret.jsonl").touch(mode=0o600)
        locked.mkdir(mode=0o700)
        faults = {
            str(folder / "out.jsonl"): [],
            str(free / "kept.jsonl"): [],
            str(free / "told.jsonl"): [],
            str(locked / "out.jsonl"): [],
            str(free / "secret.jsonl"): ["--input"],
        }
        runs = [
            ["check", output, *options] if reading else ["run", str(folder / "in.jsonl"), "-o", output, *options]
            for output, reading in faults.items()
        ]
        good = ["run", str(folder / "in.jsonl"), "-o", str(locked / "good.jsonl"), *options]
        running = start(json.dumps(runs), json.dumps(good), script=AS_NOBODY)
        out, told = running.communicate(timeout=30)
        assert out.split() == ["2"] * len(runs), told
        for line, output in zip(told.splitlines()[-len(runs) :], faults, strict=True):
            assert line.startswith("rxllm: ")
            assert output in line
        left = {path.name: path.stat().st_size for path in free.iterdir() if path.is_file()}
        assert not any(left.values())


# Signals


def test_a_job_in_the_background_goes_on_ignoring_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts(*[lambda: None] * 3, grace=1.0).heeded():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


# What is shown, and where


class Stream:
    def __init__(self, *, terminal, broken=False):
        self.terminal = terminal
        self.broken = broken
        self.written = []

    def isatty(self):
        return self.terminal

    def write(self, text):
        if self.broken:
            raise BrokenPipeError
        self.written.append(text)

    def flush(self):
        pass

    def fileno(self):
        raise OSError("it is none of the system's")


def shown(stream):
    with Screen(lambda: "x" * 200, stream=stream) as screen:
        wait_for(lambda: stream.written) if stream.terminal else None
        screen.say("said")
    return stream.written


def test_a_terminal_that_knows_no_codes_gets_none(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Stream(terminal=True)
    with Screen(lambda: "status", stream=stream) as screen:
        screen.say("said")
    assert stream.written == ["said\n"]


def test_a_line_is_as_long_as_a_terminal_of_unknown_width_has_room_for(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    first, *_ = shown(Stream(terminal=True))
    assert first == "\r\x1b[K" + "x" * 79


def test_a_line_is_as_long_as_a_narrow_terminal_has_room_for(monkeypatch):
    import fcntl
    import struct
    import termios

    monkeypatch.setenv("TERM", "xterm")
    outer, inner = os.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    with os.fdopen(inner, "w") as terminal, Screen(lambda: "x" * 200, stream=terminal):
        found = os.read(outer, 1000).decode()
        with contextlib.suppress(OSError):
            os.close(outer)
    assert found == "\r\x1b[K" + "x" * 19


def test_what_nobody_reads_any_more_ends_nothing():
    stream = Stream(terminal=False, broken=True)
    assert shown(stream) == []


def test_a_log_of_a_day_has_a_hundred_lines_and_the_first_ones_come_soon():
    seconds, count = 0.0, 0
    while seconds < 86_400:
        seconds += log_pause(seconds)
        count += 1
        assert count > 3 or seconds == 10 * count
    assert 100 <= count < 200


# The last words


def ended(*, failed=0, bad=0, hopeless=False):
    tally = Tally("any")
    for number in range(failed + bad):
        operation = "line" if number < bad else "chat"
        tally.come(Outcome(request=Request(body={}, operation=operation), error=AuthError("no such key")))
    tally.hopeless = AuthError("no such key") if hopeless else None
    return tally


@pytest.mark.parametrize(
    ("tally", "interrupted", "used_up", "code", "words"),
    [
        pytest.param(ended(), False, None, 0, [], id="all-good"),
        pytest.param(ended(failed=1), False, None, 1, ["some requests failed"], id="some-failed"),
        pytest.param(ended(bad=1), False, None, 1, ["1 bad line: mend"], id="a-bad-line"),
        pytest.param(ended(failed=1, bad=2), False, None, 1, ["2 bad lines", "some requests"], id="both"),
        pytest.param(ended(), True, None, 130, ["interrupted; "], id="interrupted"),
        pytest.param(
            ended(failed=1), True, "usd", 130, ["interrupted; ", "some requests"], id="interrupted-at-its-end"
        ),
        pytest.param(ended(), False, "usd", 1, ["stopped: the budget of usd is used up"], id="a-budget"),
        pytest.param(ended(failed=9, hopeless=True), False, None, 1, ["stopped: nothing is answered"], id="hopeless"),
    ],
)
def test_the_last_words_of_a_run_say_how_to_go_on(tally, interrupted, used_up, code, words):
    found, said = verdict(tally, Path("out.jsonl"), interrupted=interrupted, used_up=used_up)
    assert found == code
    assert len(said) == len(words)
    for line, beginning in zip(said, words, strict=True):
        assert line.startswith(beginning)
        assert "out.jsonl" in line or "run the same again" in line
