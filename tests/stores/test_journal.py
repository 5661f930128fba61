"""The file of a journal: its lines, how it is opened, what is cut off, and what is refused."""

import contextlib
import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rxllm
from rxllm import Attempt, Outcome, Reply, Request, ToolCall, Usage, chat, errors
from rxllm.errors import CallError, ConfigError, ServerError, TimeoutError, ValidationError
from rxllm.runtime import background
from rxllm.stores.journal import Compacted, JournalFile, Syncing, compact
from rxllm.stores.rows import hash_of, key_text, line_of, lines_of, mark_of, outcome_of, row_of
from rxllm.testing import VirtualScheduler

KEY = key_text(bytes(range(16)), 1)
STORE = sys.modules["rxllm.stores.journal"]


def key(number, occurrence=1):
    return key_text(number.to_bytes(8, "big") * 2, occurrence)


def row(number, text="x", *, error=None, occurrence=1, id=None):
    reply = None if error else Reply(value=text, text=text, raw=msgspec.json.encode({"text": text}))
    return line_of(Outcome(request=chat("hi", id=id), reply=reply, error=error), key(number, occurrence), 0.0)


def restore(request, route, status, body):
    return Reply(value=(route, status), raw=body)


@contextlib.contextmanager
def room_for(size_bytes):
    """Let no file of this process grow beyond that, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# lines


def test_a_line_has_the_shape_of_a_batch_output_and_what_is_ours():
    usage = Usage(input_tokens=3, output_tokens=9)
    outcome = Outcome(
        request=chat("hi", id="mine"),
        reply=Reply(value="x", id="chatcmpl-1", status=200, raw=b'{"a": 1}', usage=usage),
        attempts=(
            Attempt(number=1, started=11.0, seconds=0.5, status=500, error=ServerError("down", 500)),
            Attempt(number=2, started=12.0, seconds=0.25, waited={"backoff": 0.5}, status=200, usage=usage),
        ),
        started=10.0,
        seconds=2.25,
    )
    line = line_of(outcome, KEY, 1_000.0)
    assert row_of(outcome, KEY, 1_000.0)[1] is None
    assert line.endswith(b"}\n")
    assert msgspec.json.decode(line) == {
        "id": KEY,
        "custom_id": "mine",
        "response": {"status_code": 200, "request_id": "chatcmpl-1", "body": {"a": 1}},
        "error": None,
        "rxllm": {
            "version": 1,
            "key": KEY,
            "started": 997.75,
            "seconds": 2.25,
            "attempts": [
                {
                    "started": 1.0,
                    "seconds": 0.5,
                    "status": 500,
                    "error": {"code": "ServerError", "message": "down", "status": 500, "transient": True},
                },
                {
                    "started": 2.0,
                    "seconds": 0.25,
                    "waited": {"backoff": 0.5},
                    "status": 200,
                    "usage": {"input_tokens": 3, "output_tokens": 9},
                },
            ],
            "usage": {"input_tokens": 3, "output_tokens": 9},
        },
    }


TRIES = st.builds(
    Attempt,
    number=st.just(1),
    started=st.integers(10, 90).map(float),
    seconds=st.integers(0, 9).map(float),
    waited=st.dictionaries(st.sampled_from(["quota", "backoff"]), st.just(0.5)),
    status=st.none() | st.just(200),
    usage=st.none() | st.builds(Usage, input_tokens=st.integers(0, 5), units=st.none() | st.just({"pages": 2.0})),
    route=st.none() | st.just("b"),
    hedged=st.booleans(),
)


@given(tries=st.lists(TRIES, max_size=3), raw=st.binary(max_size=20) | st.just(b'{\n "a":\r\n [1]}'))
def test_an_outcome_comes_back_with_its_attempts_and_its_body(tries, raw):
    attempts = tuple(msgspec.structs.replace(one, number=number) for number, one in enumerate(tries, 1))
    request = chat("hi")
    given_ = Outcome(request=request, reply=Reply(value=1, raw=raw), attempts=attempts, seconds=3.0)
    line = line_of(given_, KEY, 9.0)
    assert (row_of(given_, KEY, 9.0)[1], line.count(b"\n"), b"\r" in line) == (None, 1, False)
    back = outcome_of(line, request, restore)
    assert (back.request, back.attempts, back.seconds, back.ok) == (request, attempts, 3.0, True)
    assert back.usage == given_.usage
    assert back.value == (attempts[-1].route if attempts else None, 200)
    if not raw:
        assert back.reply.raw == b"1"  # the value as JSON
    elif "encoding" in msgspec.json.decode(line)["rxllm"]:
        assert back.reply.raw == raw
    else:
        assert msgspec.json.decode(back.reply.raw) == msgspec.json.decode(raw)


@pytest.mark.parametrize(
    ("raw", "encoding"),
    [(b'{"a": 1}', None), (b'{"a"\n: 1}', None), (b"no\nJSON", "text"), (b"{}{}", "text"), (b"\xff\n", "base64")],
    ids=["json", "of-several-lines", "a-text", "two-objects", "bytes"],
)
def test_a_body_of_any_kind_is_kept_on_one_line_and_comes_back(raw, encoding):
    line = line_of(Outcome(request=chat("hi"), reply=Reply(value=1, raw=raw)), KEY, 0.0)
    assert line.count(b"\n") == 1
    assert msgspec.json.decode(line)["rxllm"].get("encoding") == encoding
    expected = raw.replace(b"\n", b" ") if encoding is None else raw
    assert outcome_of(line, chat("hi"), restore).reply.raw == expected


def test_a_value_without_a_json_is_said_and_asked_again():
    row, problem = row_of(Outcome(request=Request(body=1), reply=Reply(value=object())), KEY, 0.0)
    assert "a object has no JSON" in problem
    assert mark_of(lines_of([row])).rxllm.again is True


@pytest.mark.parametrize(
    "error",
    [
        ServerError("down", 503, 2.5, "req_1", "too busy"),
        TimeoutError("not answered", phase="deadline"),
        TimeoutError("silent", phase="idle"),
        ValidationError("too short"),
        errors.InvalidRequestError("no", 400, body=b"\xff\xfe"),
    ],
    ids=lambda error: f"{type(error).__name__}-{error.args[-1]}",
)
def test_an_error_comes_back_as_what_it_was(error):
    failed = Outcome(request=chat("hi"), error=error, attempts=(Attempt(number=1, error=error),))
    line = line_of(failed, KEY, 0.0)
    back = outcome_of(line, chat("hi"), restore)
    for again in (back.error, back.attempts[0].error):
        assert type(again) is type(error)
        assert (again.args, again.transient) == (error.args, error.transient)
    response = msgspec.json.decode(line)["response"]
    assert (response is None) is (error.status is None)


def test_an_error_that_was_made_final_comes_back_final():
    error = ServerError("it may have worked")
    error.transient = False
    back = outcome_of(line_of(Outcome(request=chat("hi"), error=error), KEY, 0.0), chat("hi"), restore)
    assert back.error.transient is False


@pytest.mark.parametrize("error", [KeyError("a"), ConfigError("wrong")], ids=["foreign", "ours"])
def test_any_other_error_comes_back_with_its_name_or_as_it_was(error):
    back = outcome_of(line_of(Outcome(request=chat("hi"), error=error), KEY, 0.0), chat("hi"), restore)
    if isinstance(error, ConfigError):
        assert (type(back.error), str(back.error)) == (ConfigError, "wrong")
    else:
        assert (type(back.error), str(back.error)) == (CallError, "KeyError: 'a'")


def test_the_text_of_an_error_that_no_file_takes_is_kept_without_what_is_wrong():
    line = line_of(Outcome(request=chat("hi"), error=ServerError("a\ud800b")), KEY, 0.0)
    assert outcome_of(line, chat("hi"), restore).error.message == "a?b"


def unsent(error):
    error.sent = False
    return error


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (unsent(errors.ConnectionError("nobody there")), True),
        (errors.ConnectionError("cut off"), False),
        (unsent(errors.InvalidRequestError("no JSON")), False),
        (errors.AuthError("no such key", 401), True),
        (errors.BillingError("empty", 402), True),
        (errors.QuotaExhaustedError("used up"), True),
        (errors.CancelledError("given up"), True),
        (ConfigError("closed"), True),
        (ServerError("down"), False),
        (errors.RateLimitedError("slow", 429), True),
        (errors.OverloadedError("too many", 529), True),
        (errors.TimeoutError("not answered"), False),
        (KeyError("a bug"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_a_failure_that_says_nothing_of_the_request_is_asked_again(error, again):
    assert mark_of(line_of(Outcome(request=chat("hi"), error=error), KEY, 0.0)).rxllm.again is again


def test_occurrences_have_different_hashes():
    assert len({hash_of(key(1, occurrence)) for occurrence in range(1, 1_000)}) == 999
    assert hash_of(key(1)) == 1
    with pytest.raises(ValueError, match="invalid literal"):
        hash_of("nonsense")


def test_a_reply_that_a_function_has_made_comes_back_with_all_it_says():
    tool = ToolCall(id="t1", name="look", arguments='{"at":1}')
    reply = Reply(
        value={"n": 5},
        text="five",
        reasoning="four and one",
        tool_calls=(tool,),
        others=("six",),
        model="m",
        id="r1",
        finish_reason="length",
        status=200,
        usage=Usage(input_tokens=3),
        raw=b"as it came",
    )
    attempts = (Attempt(number=1, usage=reply.usage),)
    given_ = Outcome(request=chat("hi"), reply=reply, attempts=attempts)
    row, problem = row_of(given_, KEY, 9.0, by_value=True)
    assert problem is None

    def by_value(request, route, status, body):
        return Reply(value=msgspec.json.decode(body))

    assert outcome_of(lines_of([row]), given_.request, by_value).reply == msgspec.structs.replace(reply, raw=b"")


@pytest.mark.parametrize(
    "value", [(1, 2), float("nan"), {1: 2}, b"x", {"a": {1, 2}}], ids=["tuple", "nan", "int-keys", "bytes", "set"]
)
def test_a_value_that_comes_back_as_something_else_is_kept_and_said(value):
    row, problem = row_of(Outcome(request=Request(body=1), reply=Reply(value=value)), KEY, 0.0)
    assert problem == f"a {type(value).__name__} comes back from it as what JSON has for that"
    assert mark_of(lines_of([row])).rxllm.again is False


@pytest.mark.parametrize(
    ("meta", "kept"), [({"line": 7}, {"line": 7}), (object(), None), (None, None)], ids=["json", "no-json", "none"]
)
def test_the_meta_of_a_request_is_in_its_row_if_it_has_a_json(meta, kept):
    line = line_of(Outcome(request=chat("hi", meta=meta), reply=Reply(value=1)), KEY, 0.0)
    assert msgspec.json.decode(line)["rxllm"].get("meta") == kept


# the file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


@pytest.mark.parametrize(
    "content",
    [
        b'{"model": "m", "temperature": 0}',
        b'{"custom_id": "1", "body": {}}',
        b"{ a text that begins so",
        b'{"id":"1","custom_id":null,"rxllm":{"version":2}}',
        row(1) + b'{"prompt": "half',
    ],
    ids=["a-config", "a-request", "a-text", "a-later-version", "a-foreign-line-at-the-end"],
)
@pytest.mark.parametrize("use", [JournalFile, compact], ids=["open", "compact"])
def test_what_is_no_row_of_ours_is_never_cut_off_though_its_last_line_has_no_end(path, content, use):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="line [12]: "):
        use(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "tail",
    [b"{", b'{"id":"', row(2)[:-40], row(2)[:-40] + b"\0\0", b"\0\0\0"],
    ids=["a-brace", "a-beginning", "half-a-row", "half-a-row-and-zeros", "zeros"],
)
def test_what_a_killed_process_or_a_disk_without_power_has_left_is_cut_off_and_said(path, tail, caplog):
    path.write_bytes(row(1) + tail)
    assert found(path, key(1), key(2)) == [row(1), None]
    assert path.read_bytes() == row(1)
    assert f"{len(tail)} bytes of it are cut off" in caplog.text


@pytest.mark.parametrize(
    ("head", "says"),
    [(b"\xef\xbb\xbf", "begins with a byte order mark"), (b"id,text\n", "begins with no object of JSON")],
    ids=["byte-order-mark", "csv"],
)
def test_another_kind_of_file_is_refused_by_its_beginning(path, head, says):
    path.write_bytes(head + row(1))
    with pytest.raises(ConfigError, match=f"line 1: it {says}"):
        JournalFile(path)


def test_empty_lines_do_no_harm_wherever_they_are(path):
    path.write_bytes(b"\n  \n" + row(1) + b"\n" + row(2) + b"  \n")
    assert found(path, key(1), key(2)) == [row(1), row(2)]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes in folders")
def test_a_pipe_or_a_device_is_refused_and_nobody_waits_for_it(path):
    os.mkfifo(path)
    for one in (path, Path(os.devnull)):
        with pytest.raises(ConfigError, match="must be a file, and is a pipe or a device"):
            JournalFile(one)
    assert not Path(f"{os.devnull}.lock").exists()


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"cannot be used: there is no folder {str(tmp_path / 'none')!r}"):
        JournalFile(tmp_path / "none" / "results.jsonl")


def test_who_does_not_want_the_file_any_more_gets_none_and_leaves_no_lock(path, monkeypatch):
    monkeypatch.setattr(STORE, "SOME", 2)
    path.write_bytes(b"".join(map(row, range(1, 9))))
    with pytest.raises(ConfigError):
        JournalFile(path, wanted=lambda: False)
    assert found(path, key(8)) == [row(8)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_fork_does_not_keep_the_file_from_the_next_run_nor_takes_it_from_this_one(path):
    file = JournalFile(path)
    ready, told = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        file.close()
        os.write(ready[1], b"x")
        os.read(told[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        with pytest.raises(ConfigError, match="in use"):
            JournalFile(path)
        file.close()
        again = JournalFile(path)  # while the fork lives
        other = os.fork()
        if not other:
            os.read(told[0], 1)
            os._exit(0)
        again.close()
        JournalFile(path).close()
    finally:
        os.write(told[1], b"xx")
        os.waitpid(child, 0)
        os.waitpid(other, 0)
        for descriptor in (*ready, *told):
            os.close(descriptor)


def found(path, *keys, **settings):
    file = JournalFile(path, **settings)
    try:
        return [file.find(one) for one in keys]
    finally:
        file.close()


def test_what_was_appended_is_found_after_the_file_is_opened_again(path):
    file = JournalFile(path)
    assert (len(file), file.find(key(1))) == (0, None)
    file.append(row(1) + row(2))
    file.append(row(3))
    assert file.size == path.stat().st_size
    file.close()
    file.close()
    assert found(path, key(1), key(2), key(3), key(4)) == [row(1), row(2), row(3), None]
    assert found(path, key(2, 2)) == [None]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 300), st.booleans()), max_size=30), st.booleans())
def test_the_last_line_of_a_key_wins(tmp_path_factory, rows, retry_failed):
    path = tmp_path_factory.mktemp("journal") / "results.jsonl"
    file, model = JournalFile(path), {}
    for number, length, good in rows:
        line = row(number, "x" * length, error=None if good else ServerError("down"))
        file.append(line)
        model[number] = line if good or not retry_failed else None
    file.close()
    assert found(path, *(key(number) for number in range(10)), retry_failed=retry_failed) == [
        model.get(number) for number in range(10)
    ]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_wherever_the_last_line_is_torn_the_others_are_whole(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "results.jsonl"
    lines = [row(number, "x" * number) for number in range(3)]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    begins = [sum(map(len, lines[:number])) for number in range(4)]
    complete = sum(cut >= end - 1 for end in begins[1:])  # without its end of line it is whole too
    file = JournalFile(path)
    assert len(file) == complete
    file.append(row(7))
    file.close()
    assert path.read_bytes() == b"".join(lines[:complete]) + row(7)


def test_a_row_is_found_after_an_editor_has_left_empty_lines(path):
    path.write_bytes(row(1) + b"\n \n" + row(2) + b"\n")
    assert found(path, key(1), key(2)) == [row(1), row(2)]


def test_a_line_of_another_layout_is_found_too(path):
    other = msgspec.json.encode({"rxllm": {"key": key(1), "version": 1}, "id": "x", "pad": "y" * 64}) + b"\n"
    path.write_bytes(other)
    assert found(path, key(1)) == [other]


def test_a_key_of_the_same_hash_is_no_proof(path):
    other = key(1)[:16] + "f" * 16 + "-1"
    path.write_bytes(row(1))
    assert hash_of(other) == hash_of(key(1))
    assert found(path, other) == [None]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"custom_id": "a"}', "line 2: Object missing required field `rxllm`"),
        (b'{"id": "a", "rxllm": {"version": 1}}', "line 2: Object missing required field `key`"),
        (b'{"rxllm": {"version": 2, "key": 5}}', "line 2: it is of version 2, and this rxllm reads version 1"),
        (b'{"rxllm": {"version": 1, "key": "mine"}}', "line 2: 'mine' is no key"),
        (b"not JSON", "line 2: JSON is malformed"),
        (b"\0\0\0", "line 2: JSON is malformed"),
    ],
    ids=["not-ours", "without-a-key", "another-version", "a-wrong-key", "no-json", "zeros"],
)
def test_a_line_that_is_none_of_a_journal_is_named_and_nothing_is_changed(path, line, said):
    data = row(1) + line + b"\n" + row(2)
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        JournalFile(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert path.read_bytes() == data
    path.write_bytes(row(1))
    JournalFile(path).close()  # nothing was left locked


def test_a_file_of_something_else_is_not_read_to_its_end(path):
    path.write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(ConfigError, match="line 1: it begins with no object of JSON"):
        JournalFile(path)


@pytest.mark.parametrize("kind", ["a-directory", "no-folder", "a-file-as-folder"])
def test_a_path_where_no_file_can_be_is_a_configuration_error(tmp_path, kind):
    (tmp_path / "file").touch()
    path = {"a-directory": tmp_path, "no-folder": tmp_path / "no" / "x", "a-file-as-folder": tmp_path / "file" / "x"}
    with pytest.raises(ConfigError, match="journal '.*' (must be a file|cannot be used)"):
        JournalFile(path[kind])


def test_a_folder_that_is_read_only_is_a_configuration_error(tmp_path):
    folder = tmp_path / "sealed"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(ConfigError, match="cannot be used: Permission denied"):
        JournalFile(folder / "x")


def test_a_file_is_for_one_at_a_time(path):
    file = JournalFile(path)
    with pytest.raises(ConfigError, match="in use by another run or process"):
        JournalFile(path)
    with pytest.raises(ConfigError, match="in use by another run or process"):
        compact(path)
    file.close()
    JournalFile(path).close()


def test_a_process_that_is_killed_leaves_the_file_to_the_next(path):
    script = f"""
import os, sys, signal
from pathlib import Path
from rxllm.stores.journal import JournalFile
file = JournalFile(Path({str(path)!r}))
file.append({row(1)!r})
print("open", flush=True)
sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(rxllm.__path__[0]).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as child:
        assert child.stdout.readline() == b"open\n"
        with pytest.raises(ConfigError, match="in use"):
            JournalFile(path)
        child.kill()
        child.wait()
    assert found(path, key(1)) == [row(1)]


def test_a_disk_that_is_full_leaves_whole_lines_and_is_written_again_when_there_is_room(path):
    file = JournalFile(path)
    file.append(row(1))
    with room_for(len(row(1)) + 50), pytest.raises(OSError, match="File too large"):
        file.append(row(2) + row(3))  # 50 bytes of it are written, and taken back
    assert path.read_bytes() == row(1)
    file.append(row(2))
    file.close()
    assert path.read_bytes() == row(1) + row(2)


def test_what_could_not_be_taken_back_is_before_the_next_line_is_written(path, monkeypatch):
    file = JournalFile(path)
    file.append(row(1))
    with monkeypatch.context() as patched:
        patched.setattr(os, "ftruncate", refuse)
        with room_for(len(row(1)) + 50), pytest.raises(OSError, match="File too large"):
            file.append(row(2))
        assert path.stat().st_size == len(row(1)) + 50
        with pytest.raises(OSError, match="Input/output error"):
            file.append(row(2))
    file.append(row(3))
    file.close()
    assert path.read_bytes() == row(1) + row(3)


def refuse(*_arguments):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


# the disk


class Disk:
    """Notes what is kept."""

    def __init__(self, monkeypatch):
        self.kept = []
        self.free = threading.Event()
        self.free.set()
        self.fails = False
        self.busy = self.most = 0
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor):
        self.busy += 1
        self.most = max(self.most, self.busy)
        self.free.wait(10)
        self.busy -= 1
        if self.fails:
            refuse()
        self.kept.append(os.fstat(descriptor).st_size)


def test_the_disk_is_asked_after_a_second_or_after_a_thousand_rows(path, monkeypatch):
    disk, scheduler, file = Disk(monkeypatch), VirtualScheduler(), JournalFile(path)
    syncing = Syncing(file, scheduler, lambda error: pytest.fail(str(error)))
    file.append(row(1))
    syncing.wrote(1)
    scheduler.run(0.9)
    assert disk.kept == []
    scheduler.run(1.1)
    assert disk.kept == [len(row(1))]
    syncing.wrote(999)
    assert len(disk.kept) == 1
    syncing.wrote(1)
    assert len(disk.kept) == 2
    syncing.wrote(1)
    syncing.close()
    assert (len(disk.kept), scheduler.pending) == (3, 0)
    syncing.close()
    assert len(disk.kept) == 3
    file.close()


def test_the_disk_is_asked_in_a_thread_one_at_a_time_and_the_end_does_not_wait(path, monkeypatch):
    disk, file, failed = Disk(monkeypatch), JournalFile(path), []
    disk.free.clear()
    done = threading.Event()

    def begin():
        syncing = Syncing(file, background(), failed.append)
        file.append(row(1))
        for _ in range(3):
            syncing.wrote(1_000)
        syncing.close()
        file.close()
        done.set()

    background().post(begin)
    assert done.wait(10)  # while the disk is busy
    threads = [thread for thread in threading.enumerate() if thread.name == "rxllm journal"]
    assert len(threads) == 2  # the first, and that of the end
    disk.free.set()
    for thread in threads:
        thread.join(10)
    assert (disk.kept, failed) == ([len(row(1))] * 2, [])


def test_what_is_written_while_the_disk_is_busy_is_kept_when_it_is_ready(path, monkeypatch):
    disk, file, ended = Disk(monkeypatch), JournalFile(path), threading.Event()
    monkeypatch.setattr("rxllm.stores.journal.SOON", 0.01)
    disk.free.clear()
    syncing = Syncing(file, background(), lambda error: pytest.fail(str(error)))

    def begin():
        file.append(row(1))
        syncing.wrote(1_000)
        syncing.wrote(1)
        background().call_later(0.03, over)  # the time of the last row is over, too

    def over():
        assert disk.most == 1
        disk.free.set()
        wait()

    def wait():
        if len(disk.kept) < 2:
            background().call_later(0.005, wait)
        else:
            ended.set()

    background().post(begin)
    assert ended.wait(10)
    assert disk.most == 1
    file.close()


def test_a_disk_that_does_not_keep_what_was_written_is_said(path, monkeypatch, caplog):
    disk, scheduler, file, failed = Disk(monkeypatch), VirtualScheduler(), JournalFile(path), []
    disk.fails = True
    syncing = Syncing(file, scheduler, failed.append)
    syncing.wrote(1_000)
    assert [error.errno for error in failed] == [errno.EIO]
    syncing.wrote(1)
    syncing.close()
    assert "may not be on the disk" in caplog.text
    file.close()


# compact


def test_compact_leaves_the_last_line_of_each_key_in_the_order_of_the_file(path):
    lines = [row(1), row(2), row(1, "longer"), row(3), row(2, error=ServerError("down")), row(1, occurrence=2)]
    path.write_bytes(b"".join(lines) + b'{"id":"torn')
    before = path.stat().st_size
    after = b"".join(lines[2:])
    assert compact(path) == Compacted(rows=4, dropped=2, before=before, after=len(after))
    assert path.read_bytes() == after
    assert compact(str(path)) == Compacted(rows=4, dropped=0, before=len(after), after=len(after))
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["results.jsonl", "results.jsonl.lock"]


def test_compact_by_id_leaves_the_last_line_of_each_id_and_all_of_those_without(path):
    rows = [row(1, id="a"), row(2, id="a"), row(2, id="a", occurrence=2), row(3), row(4), row(5, id="b"), row(3)]
    path.write_bytes(b"".join(rows))
    done = compact(path, by_id=True)
    assert path.read_bytes() == b"".join([rows[1], rows[2], rows[4], rows[5], rows[6]])
    assert (done.rows, done.dropped) == (5, 2)


@pytest.mark.skipif(sys.platform == "win32", reason="modes are others there")
def test_compact_keeps_a_private_file_private(path):
    path.write_bytes(row(1))
    path.chmod(0o600)
    compact(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_compact_keeps_two_keys_of_one_hash(path):
    twin = row(1).replace(key(1).encode(), (key(1)[:16] + "f" * 16 + "-1").encode())
    path.write_bytes(row(1) + twin)
    assert compact(path).rows == 2
    assert path.read_bytes() == row(1) + twin


def test_a_file_that_cannot_be_compacted_stays_as_it_is(path):
    with pytest.raises(ConfigError, match="there is none"):
        compact(path)
    data = row(1) + row(1, "other")
    path.write_bytes(data)
    with room_for(50), pytest.raises(ConfigError, match="cannot be used: File too large"):
        compact(path)
    assert path.read_bytes() == data
    path.write_bytes(data + b"x\n")
    with pytest.raises(ConfigError, match="line 3: JSON is malformed"):
        compact(path)
    assert path.read_bytes() == data + b"x\n"
    assert not path.with_name("results.jsonl.new").exists()


def test_compact_leaves_a_link_to_the_file_a_link(path, tmp_path):
    path.write_bytes(row(1) * 2)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    compact(link)
    assert link.is_symlink()
    assert path.read_bytes() == row(1)


def test_the_disk_has_a_compacted_file_before_it_takes_the_name(path, monkeypatch):
    kept, replaced = [], []
    path.write_bytes(row(1) * 2)
    replace, fsync = Path.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (kept.append(len(replaced)), fsync(descriptor))[1])
    monkeypatch.setattr(Path, "replace", lambda self, target: (replaced.append(target), replace(self, target))[1])
    compact(path)
    assert kept == [0, 1]  # the file, then its name in the folder
