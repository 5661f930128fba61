import csv
import datetime as dt
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rxllm
from rxllm import Outcome, Request, Usage
from rxllm.cli import main
from rxllm.cli.checking import Estimate, least_seconds
from rxllm.cli.inputs import Input, Shape, Template
from rxllm.cli.progress import HOPELESS, Screen, Tally
from rxllm.cli.settings import Settings
from rxllm.errors import AuthError, ConfigError, InvalidRequestError
from rxllm.messages import Attempt, Reply
from rxllm.policies.prices import Price, Prices
from rxllm.testing import SimulatedProvider


@pytest.fixture(scope="module")
def running():
    with SimulatedProvider(marked={"always fails": "400"}).start() as process:
        yield process


@pytest.fixture
def server(running, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "any-key-at-all")
    running.set(latency=0.0, key=None, faults={})
    return running


@pytest.fixture
def write(tmp_path):
    """Write a file: text as it is, other things as lines of JSON; return its path."""

    def write_file(name, *lines):
        path = tmp_path / name
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return str(path)

    return write_file


def prompts(count, **fields):
    return [{"id": f"line-{n}", "prompt": f"Say {n}.", "max_tokens": 9, **fields} for n in range(count)]


def rows(path):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def ids(path):
    return Counter(row["custom_id"] for row in rows(path))


# what rows become


NAMES = st.text(st.characters(exclude_characters="{}[].!:", exclude_categories=["Cs"]), min_size=1, max_size=5)


@given(pieces=st.lists(st.tuples(st.text(max_size=5), NAMES), min_size=1, max_size=4), end=st.text(max_size=5))
def test_a_template_is_filled_with_the_columns_and_nothing_else_changes(pieces, end):
    def plain(text):
        return text.replace("{", "{{").replace("}", "}}")

    fields = {name: f"<{name}{{}}>" for _, name in pieces}
    text = "".join(f"{plain(before)}{{{name}}}" for before, name in pieces) + plain(end)
    assert Template(text).fill(fields) == "".join(f"{before}{fields[name]}" for before, name in pieces) + end


@pytest.mark.parametrize(
    "text", ["no name", "{}", "{a!r}", "{a:>9}", "{a", "a}"], ids=["none", "empty", "turned", "spec", "open", "shut"]
)
def test_a_template_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="template: .*got"):
        Template(text)


def test_a_column_that_a_row_has_not_makes_it_bad():
    with pytest.raises(InvalidRequestError, match="text is missing, there is only id"):
        Template("{text}").fill({"id": 1})
    with pytest.raises(InvalidRequestError, match="text is null"):
        Template("{text}").fill({"text": None})


def test_values_that_are_no_text_come_as_json():
    assert Template("{a} {b}").fill({"a": 1.5, "b": ["x", True]}) == '1.5 ["x",true]'


def test_a_row_gets_the_system_and_the_parameters_that_it_does_not_say_itself():
    shape = Shape(system="Be brief.", params={"max_tokens": 5, "top_p": 0.5})
    request = shape.of_line(b'{"prompt": "Hi", "max_tokens": 9, "id": "a"}')
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (request.id, request.body) == ("a", {"messages": said, "max_tokens": 9, "top_p": 0.5})
    own = {"messages": [{"role": "system", "content": "Be long."}]}
    assert shape.of_line(json.dumps(own).encode()).body["messages"] == own["messages"]


def test_a_dialect_without_chats_gets_the_prompt_alone_and_no_conversation():
    shape = Shape(operation="completions", params={"max_new_tokens": 7})
    request = shape.of_line(b'{"prompt": "Hi", "temperature": 1}')
    assert (request.operation, request.body) == (
        "completions",
        {"prompt": "Hi", "temperature": 1, "max_new_tokens": 7},
    )
    with pytest.raises(InvalidRequestError, match="no chats"):
        shape.of_line(b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')


def test_lines_of_json_are_numbered_as_an_editor_does(write):
    path = write("in.jsonl", {"prompt": "a"}, "", "{", {"prompt": "b"}, {"nothing": 1})
    source = Input(Path(path), Shape())
    assert [(row.line, row.request is not None) for row in source.rows()] == [
        (1, True),
        (3, False),
        (4, True),
        (5, False),
    ]
    assert source.count() == 4
    bad = [item for item in source if isinstance(item, Outcome)]
    assert [f"{path}, line {line}: " in str(item.error) for line, item in zip((3, 5), bad, strict=True)] == [True, True]


def test_a_csv_file_gives_a_request_for_each_record_under_its_own_id(tmp_path):
    path = tmp_path / "in.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(
            [["id", "text"], ["one", 'a, "quoted"\nbreak'], ["two"], ["", "no id"], ["four", "last"]]
        )
    source = Input(path, Shape(template=Template("Say: {text}")))
    found = list(source.rows())
    assert [None if row.request is None else row.request.id for row in found] == ["one", None, None, "four"]
    assert found[0].request.body["messages"][0]["content"] == 'Say: a, "quoted"\nbreak'
    assert source.where(found[1]) == f"{path}, line 4: expected 2 fields, as the first line has, got 1"
    assert source.count() == 4


def test_a_file_with_tabs_is_read_as_such(write):
    source = Input(Path(write("in.tsv", "prompt\tnumber", "Hello, you\t7")), Shape(id_column="number"))
    (row,) = source.rows()
    assert (row.request.id, row.request.body["messages"][0]["content"]) == ("7", "Hello, you")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        pytest.param(Shape(template=Template("{body}")), "no column 'body', only id, text", id="of-the-template"),
        pytest.param(Shape(), "no column 'prompt', only id, text; say with a template", id="no-template"),
        pytest.param(Shape(template=Template("{text}"), id_column="key"), "no column 'key'", id="of-the-id"),
    ],
)
def test_a_column_that_is_not_there_is_said_before_anything_else(write, shape, message):
    with pytest.raises(ConfigError, match=message):
        Input(Path(write("in.csv", "id,text", "1,a")), shape)


def test_two_columns_of_a_name_that_is_needed_are_refused(write):
    with pytest.raises(ConfigError, match="there are 2 columns 'text', and nobody knows"):
        Input(Path(write("in.csv", "id,text,text", "1,a,b")), Shape(template=Template("{text}")))
    assert Input(Path(write("in.csv", "prompt,text,text", "1,a,b")), Shape()).count() == 1


def test_a_line_of_a_csv_file_that_does_not_end_is_not_read_into_memory(write, monkeypatch):
    monkeypatch.setattr("rxllm.cli.inputs.LINE", 1000)
    source = Input(Path(write("in.csv", "prompt", "a", "b" * 5000, "c")), Shape())
    with pytest.raises(ConfigError, match="in.csv, line 3: longer than 1,000 characters: is this CSV?"):
        list(source.rows())


def test_a_parquet_file_that_is_damaged_within_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.parquet"
    table = pyarrow.table({"prompt": [f"{n:01000}" for n in range(200)]})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 3000)
    with pytest.raises(ConfigError, match="in.parquet: its Parquet is damaged"):
        list(Input(path, Shape()).rows())


def test_a_csv_file_of_another_encoding_is_refused_with_the_line(tmp_path):
    path = tmp_path / "in.csv"
    path.write_bytes(b"prompt\nfine\n\xff\n")
    with pytest.raises(ConfigError, match=r"in.csv, after line \d: not UTF-8"):
        list(Input(path, Shape()).rows())


def test_a_parquet_file_gives_a_request_for_each_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.parquet"
    parts, days = [{"x": [1, None], "y": "z"}, None], [dt.date(2026, 1, 31)] * 2
    columns = {"id": [1, 2], "text": ["a", None], "other": [0.5, 1.5], "parts": parts, "day": days}
    parquet.write_table(pyarrow.table(columns), path)
    source = Input(path, Shape(template=Template("Say {text} of {parts} on {day}")))
    first, second = source.rows()
    said = 'Say a of {"x":[1,null],"y":"z"} on 2026-01-31'
    assert (first.request.id, first.request.body["messages"][0]["content"]) == ("1", said)
    assert source.where(second) == f"{path}, row 2: text is null"
    assert source.count() == 2


def test_a_parquet_file_without_pyarrow_says_what_to_install(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"install rxllm\[cli\]"):
        Input(Path(write("in.parquet", "PAR1")), Shape())


# what is counted


def outcome(*, error=None, tokens=10, model=None, operation="chat"):
    usage = Usage(input_tokens=tokens, output_tokens=tokens)
    attempts = (Attempt(number=1, usage=usage, error=error),) if operation == "chat" else ()
    reply = None if error else Reply(value="", usage=usage)
    body = {"messages": [], **({} if model is None else {"model": model})}
    return Outcome(request=Request(body=body, operation=operation), reply=reply, error=error, attempts=attempts)


def test_a_tally_counts_what_was_asked_apart_from_what_came_out():
    tally = Tally("small", Prices({"small": Price(input=1.0, output=2.0)}, per=10))
    tally.total = 40
    for _ in range(20):
        tally.ask(outcome())
        tally.come(outcome())
    tally.come(outcome())
    tally.ask(outcome(error=InvalidRequestError("line 7"), operation="line"))
    tally.come(outcome(error=InvalidRequestError("line 7"), operation="line"))
    tally.ask(outcome(model="unknown"))
    tally.come(outcome(model="unknown"))
    assert tally.status(10.0, 3) == (
        "23/40 done, 1 failed, 3 in flight, 2.1/s, 420 tokens, $60.0000 and 1 without a price, 8.1 s left"
    )
    first, second = tally.summary(10.0).splitlines()
    assert first.startswith("23 done, 2 of them not asked in this run: 22 good, 1 failed; 10.0 s, 420 tokens, $60")
    assert second == "  1 InvalidRequestError: line 7"


def test_only_failures_in_a_row_that_say_nothing_of_the_request_are_hopeless():
    tally = Tally("any")
    for _ in range(HOPELESS - 1):
        tally.ask(outcome(error=AuthError("no such key")))
    tally.ask(outcome())
    for _ in range(HOPELESS):
        tally.ask(outcome(error=InvalidRequestError("too long")))
    assert tally.hopeless is None
    for _ in range(HOPELESS):
        tally.ask(outcome(error=AuthError("no such key")))
    assert isinstance(tally.hopeless, AuthError)


def test_the_rate_is_that_of_the_last_half_minute():
    tally = Tally("any", began=100.0)
    for second in range(101, 161):
        tally.asked += 1 if second <= 120 else 3
        rate = tally.rate(second)
    assert rate == pytest.approx(3.0)


class Terminal:
    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_terminal_has_one_line_that_is_rewritten_and_gone_at_the_end():
    terminal = Terminal()
    with Screen(lambda: "status", stream=terminal) as screen:
        while "status" not in terminal.text:
            time.sleep(0.01)
        screen.say("something")
    assert "\r\x1b[Kstatus" in terminal.text
    assert "\r\x1b[Ksomething\n" in terminal.text
    assert not terminal.text.endswith("status")


@given(
    amounts=st.dictionaries(st.sampled_from(["requests", "tokens"]), st.floats(0, 1e9)),
    quotas=st.lists(st.tuples(st.sampled_from(["requests", "tokens"]), st.floats(1, 1e6), st.floats(0.1, 1e4))),
)
def test_the_least_time_is_that_of_the_slowest_quota(amounts, quotas):
    seconds = least_seconds(amounts, quotas)
    assert seconds >= 0
    for unit, limit, per in quotas:
        needed = amounts.get(unit, 0.0)
        assert needed <= limit or seconds >= per * (needed / limit - 1)
    needed = [per for unit, limit, per in quotas if amounts.get(unit, 0.0) > int(limit)]
    assert needed or seconds == 0


def test_an_estimate_of_a_model_without_a_price_says_so():
    estimate = Estimate()
    prices = Prices({"small": Price(input=1.0, output=2.0)}, per=1)
    estimate.add({"input_tokens": 3.0, "output_tokens": 4.0}, "small", prices, limited=True)
    estimate.add({"input_tokens": 3.0, "output_tokens": 4.0}, "big", prices, limited=False)
    assert (estimate.usd, estimate.unpriced, estimate.unlimited) == (11.0, {"big": 1}, 1)
    assert estimate.amounts()["tokens"] == 14


# the commands


def test_a_run_asks_all_and_a_second_one_asks_nothing(server, write, tmp_path, capsys):
    source, output = write("in.jsonl", *prompts(30)), str(tmp_path / "out.jsonl")
    options = ["run", source, "-o", output, "--model", "any", "--url", server.url, "--concurrency", "8"]
    before = server.statistics().arrivals
    assert main(options) == 0
    assert ids(output) == Counter({f"line-{n}": 1 for n in range(30)})
    assert server.statistics().arrivals - before == 30
    assert "30 done: 30 good, 0 failed" in capsys.readouterr().err
    assert main(options) == 0
    assert server.statistics().arrivals - before == 30
    assert "30 done, 30 of them not asked in this run: 30 good" in capsys.readouterr().err


def test_more_lines_in_the_input_are_what_the_next_run_asks(server, write, tmp_path):
    output = str(tmp_path / "out.jsonl")
    options = ["-o", output, "--model", "any", "--url", server.url, "--concurrency", "8", "-q"]
    assert main(["run", write("in.jsonl", *prompts(5)), *options]) == 0
    before = server.statistics().arrivals
    assert main(["run", write("in.jsonl", *prompts(8)), *options]) == 0
    assert server.statistics().arrivals - before == 3
    assert ids(output) == Counter({f"line-{n}": 1 for n in range(8)})


def test_bad_lines_and_refused_requests_fail_and_the_others_are_asked(server, write, tmp_path, capsys):
    lines = [*prompts(3), "{", {"prompt": "This always fails.", "id": "bad"}]
    source, output = write("in.jsonl", *lines), str(tmp_path / "out.jsonl")
    assert main(["run", source, "-o", output, "--model", "any", "--url", server.url]) == 1
    told = capsys.readouterr().err
    assert f"{source}, line 4: not JSON" in told
    assert "5 done, 1 of them not asked in this run: 3 good, 2 failed" in told
    assert "1 bad line:" in told
    assert f"rxllm retry {output}" in told
    assert {row["custom_id"]: row["error"] is None for row in rows(output)} == {
        "line-0": True,
        "line-1": True,
        "line-2": True,
        "bad": False,
    }


def test_retry_asks_failed_ones_only_with_the_settings_of_the_run_before(server, write, tmp_path, capsys):
    source, output = write("in.jsonl", *prompts(6)), str(tmp_path / "out.jsonl")
    server.set(faults={"400": 1.0})
    options = ["--model", "any", "--url", server.url, "--param", "temperature=0.5", "--concurrency", "4"]
    assert main(["run", source, "-o", output, *options]) == 1
    server.set(faults={})
    before = server.statistics().arrivals
    assert main(["run", source, "-o", output, *options]) == 1  # failed ones are done
    assert server.statistics().arrivals == before
    assert main(["retry", output]) == 0
    assert server.statistics().arrivals - before == 6
    assert main(["compact", output]) == 0
    assert ids(output) == Counter({f"line-{n}": 1 for n in range(6)})
    assert f"{output}: 6 lines, 6 dropped" in capsys.readouterr().out


def test_a_budget_ends_a_run_and_the_next_one_goes_on(server, write, tmp_path, capsys):
    source, output = write("in.jsonl", *prompts(12)), str(tmp_path / "out.jsonl")
    options = ["run", source, "-o", output, "--model", "any", "--url", server.url, "--concurrency", "4"]
    assert main([*options, "--budget", "requests=5"]) == 1
    assert "the budget of requests is used up" in capsys.readouterr().err
    assert len(rows(output)) == 5
    assert main(options) == 0
    assert ids(output) == Counter({f"line-{n}": 1 for n in range(12)})


def test_what_was_spent_is_told_by_the_prices_of_the_user(server, write, tmp_path, capsys):
    prices = write("prices.toml", "[models.any]", "input = 1000000", "output = 1000000")
    source, output = write("in.jsonl", *prompts(3)), str(tmp_path / "out.jsonl")
    assert main(["run", source, "-o", output, "--model", "any", "--url", server.url, "--prices", prices]) == 0
    told = capsys.readouterr().err
    used = sum(row["rxllm"]["usage"]["input_tokens"] + row["rxllm"]["usage"]["output_tokens"] for row in rows(output))
    assert f"{used:,} tokens, ${used:,.4f}" in told


def test_a_budget_that_suffices_is_no_failure(server, write, tmp_path, capsys):
    source, output = write("in.jsonl", *prompts(4)), str(tmp_path / "out.jsonl")
    options = ["run", source, "-o", output, "--model", "any", "--url", server.url]
    assert main([*options, "--budget", "requests=4"]) == 0
    assert "stopped" not in capsys.readouterr().err


def test_a_budget_of_seconds_ends_what_waits_and_says_what_was_not_asked(server, write, tmp_path, capsys):
    source, output = write("in.jsonl", *prompts(6)), str(tmp_path / "out.jsonl")
    options = ["run", source, "-o", output, "--model", "any", "--url", server.url]
    assert main([*options, "--rpm", "2", "--budget", "seconds=0.5"]) == 1
    told = capsys.readouterr().err
    assert "2 good, 0 failed, 4 not asked" in told
    assert "the budget of seconds is used up; run the same again to go on" in told
    assert "retry" not in told
    assert main(options) == 0
    assert len({row["id"] for row in rows(output) if row["response"] is not None}) == 6


def test_results_of_rows_without_an_id_tell_their_line(server, write, tmp_path):
    source, output = write("in.csv", "text", "one", "two", '"a', 'b"', "three"), str(tmp_path / "out.jsonl")
    options = ["--model", "any", "--url", server.url, "--template", "Echo {text}."]
    for _ in range(2):
        assert main(["run", source, "-o", output, *options]) == 0
    assert sorted(row["rxllm"]["meta"]["line"] for row in rows(output)) == [2, 3, 5, 6]


def test_a_template_asks_for_each_row_of_a_csv_file(server, write, tmp_path):
    source, output = write("in.csv", "id,text", "a,one", "b,two"), str(tmp_path / "out.jsonl")
    prompt = write("prompt.txt", "Echo {text}.").strip()
    server.set(answer="echo")
    options = ["--model", "any", "--url", server.url, "--template", f"@{prompt}", "--stream"]
    try:
        assert main(["run", source, "-o", output, *options]) == 0
    finally:
        server.set(answer="summary")
    said = {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"] for row in rows(output)}
    assert {name: text.strip() for name, text in said.items()} == {"a": "Echo one.", "b": "Echo two."}


@pytest.mark.parametrize(("dialect", "base"), [("anthropic", "/v1"), ("llm-engine", "")])
def test_other_dialects_are_asked_in_their_own_form(server, write, tmp_path, dialect, base):
    source, output = write("in.jsonl", *[{"prompt": "Hello", "id": "a"}]), str(tmp_path / "out.jsonl")
    url = server.url.removesuffix("/v1") + base
    options = ["--model", "any", "--dialect", dialect, "--url", url, "--api-key-env", "SOME_KEY"]
    assert main(["run", source, "-o", output, *options]) == 0
    assert rows(output)[0]["response"]["status_code"] == 200


def test_a_config_file_says_where_and_how_and_options_go_before_it(server, write, tmp_path):
    config = write("remote.toml", f'api_url = "{server.url}/chat/completions"', "num_workers = 4", "max_retries = 2")
    source, output = write("in.jsonl", *prompts(4)), str(tmp_path / "out.jsonl")
    assert main(["run", source, "-o", output, "--model", "any", "--config", config]) == 0
    settings = Settings(input=source, model="any", config=config, max_retries=0, rpm=500, concurrency=3)
    assert settings.backoff().attempts == 1
    assert repr(settings.gate()) == "Gate('500 requests per 60 seconds', concurrency=3)"
    assert Settings(input=source, model="any", config=config).backoff().attempts == 3


def test_limits_that_are_given_stand_in_the_place_of_those_of_the_config(write):
    limits = ("requests_per_minute = 500", "input_tokens_per_minute = 1000", "output_tokens_per_minute = 100")
    config = write("remote.toml", *limits, "num_workers = 3", "use_adaptive_concurrency = false")

    def quotas(**given):
        with Settings(input="in.jsonl", model="any", config=config, **given).gate() as gate:
            rows = [found.quota for found in gate.statistics().quotas]
            return {row.unit: (row.limit, row.per) for row in rows}

    assert quotas() == {"requests": (500, 60), "input_tokens": (1000, 60), "output_tokens": (100, 60)}
    assert quotas(rpm=0.5) == {"requests": (1, 120), "input_tokens": (1000, 60), "output_tokens": (100, 60)}
    assert quotas(tpm=9000) == {"requests": (500, 60), "tokens": (9000, 60)}
    assert quotas(rpm=7, tpm=0.25) == {"requests": (7, 60), "tokens": (1, 240)}


def test_a_key_that_is_not_accepted_ends_the_run_and_nothing_shows_it(server, write, tmp_path, monkeypatch, capsys):
    server.set(key="the-good-key")
    source, output = write("in.jsonl", *prompts(500)), str(tmp_path / "out.jsonl")
    options = ["--model", "any", "--url", server.url, "--api-key-env", "MY_KEY", "--concurrency", "2"]
    monkeypatch.setenv("MY_KEY", "sentinel-a-bad-key")
    assert main(["run", source, "-o", output, *options]) == 1
    told = capsys.readouterr()
    assert f"nothing is answered any more; when that is mended, rxllm retry {output} asks the rest" in told.err
    assert len(rows(output)) < 500
    monkeypatch.setenv("MY_KEY", "the-good-key")
    assert main(["run", source, "-o", output, *options, "-q"]) == 0
    files = "".join(path.read_text() for path in tmp_path.iterdir())
    for key in ("sentinel-a-bad-key", "the-good-key"):
        assert key not in files + told.err + told.out + capsys.readouterr().err


def test_check_finds_bad_lines_and_estimates_what_a_run_takes(write, capsys):
    prices = write("prices.json", '{"models": {"any": {"input": 1, "output": 2}}, "per": 1}')
    lines = [*prompts(3), "{", {"prompt": "again", "id": "line-1"}, {"prompt": 7}]
    source = write("in.jsonl", *lines)
    options = ["--model", "any", "--url", "http://localhost/v1", "--rpm", "2", "--prices", prices]
    assert main(["check", source, *options]) == 1
    told = capsys.readouterr().out
    assert f"{source}, line 4: not JSON" in told
    assert f"{source}, line 5: the id 'line-1' is that of line 2 too" in told
    assert f"{source}, line 6: prompt must be a text, got int" in told
    assert "4 requests, about" in told
    assert "1 request does not limit its output" in told
    assert "at least 1 min 0 s" in told
    assert "3 bad lines" in told
    assert main(["check", write("good.jsonl", *prompts(3)), "--model", "any"]) == 0
    assert "at most 27 of output" in capsys.readouterr().out


def test_compact_by_id_leaves_the_last_answer_of_a_prompt_that_was_changed(server, write, tmp_path, capsys):
    output = str(tmp_path / "out.jsonl")
    options = ["-o", output, "--model", "any", "--url", server.url, "-q"]
    for prompt in ("Say one.", "Say two."):
        assert main(["run", write("in.jsonl", {"id": "a", "prompt": prompt}), *options]) == 0
    assert main(["compact", output]) == 0
    assert ids(output) == {"a": 2}
    assert main(["compact", output, "--by-id"]) == 0
    assert ids(output) == {"a": 1}
    assert f"{output}: 1 line, 1 dropped" in capsys.readouterr().out


def test_requests_that_name_their_models_need_no_other(server, write, tmp_path, capsys):
    batch = {"method": "POST", "url": "/v1/chat/completions"}
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    lines = [
        {**batch, "custom_id": "a", "body": {"model": "one", **body}},
        {"prompt": "Hi", "id": "b", "model": "two"},
        {"prompt": "Hi", "id": "c"},
    ]
    source, output = write("in.jsonl", *lines), str(tmp_path / "out.jsonl")
    assert main(["run", source, "-o", output, "--url", server.url]) == 1
    assert f"{source}, line 3: it names no model" in capsys.readouterr().err
    assert {row["custom_id"]: row["response"]["body"]["model"] for row in rows(output)} == {"a": "one", "b": "two"}
    before = server.statistics().arrivals
    assert (
        main(["run", source, "-o", output, "--url", server.url, "--model", "three"]) == 0
    )  # the others stay as they are
    assert server.statistics().arrivals - before == 1
    assert main(["check", source]) == 1
    assert main(["check", source, "--model", "three"]) == 0


def test_check_tells_the_time_that_a_number_at_a_time_takes(write, capsys):
    source = write("in.jsonl", *prompts(17))
    assert main(["check", source, "--model", "any", "--concurrency", "4", "--latency", "30"]) == 0
    assert "4 at a time, each 30.0 s, take about 2 min 30 s" in capsys.readouterr().out
    config = write("c.toml", "num_workers = 2", "use_adaptive_concurrency = false")
    assert main(["check", source, "--model", "any", "--config", config, "--latency", "1"]) == 0
    assert "2 at a time, each 1.0 s, take about 9.0 s" in capsys.readouterr().out
    assert main(["check", source, "--model", "any", "--latency", "1"]) == 2
    assert "latency: how long it takes depends on --concurrency" in capsys.readouterr().err


BAD = {
    "no-such-input": (["run", "nope.jsonl", "-o", "out.jsonl", "--model", "m"], "cannot read nope.jsonl"),
    "no-key": (["run", "in.jsonl", "-o", "out.jsonl", "--model", "m"], "set the environment variable OPENAI_API_KEY"),
    "no-model": (["run", "in.jsonl", "-o", "out.jsonl"], "give --model"),
    "output-is-the-input": (["run", "in.jsonl", "-o", "in.jsonl", "--model", "m", "--url", "http://x/v1"], "output"),
    "no-journal": (["run", "in.jsonl", "-o", "other.jsonl", "--model", "m", "--url", "http://x/v1"], "line 1"),
    "no-folder": (
        ["run", "in.jsonl", "-o", "no/out.jsonl", "--model", "m", "--url", "http://x/v1"],
        "no/out.jsonl' cannot be used: ",
    ),
    "budget": (["run", "in.jsonl", "-o", "out.jsonl", "--model", "m", "--budget", "time=3"], "budget must be"),
    "usd-without-prices": (["run", "in.jsonl", "-o", "o", "--model", "m", "--budget", "usd=3"], "prices: "),
    "config": (
        ["run", "in.jsonl", "-o", "out.jsonl", "--model", "m", "--config", "c.toml"],
        "c.toml: there is no field",
    ),
    "key-in-config": (["run", "in.jsonl", "-o", "out.jsonl", "--model", "m", "--config", "k.toml"], "k.toml: api_key"),
    "template-file": (["check", "in.jsonl", "--model", "m", "--template", "@nope"], "cannot read nope"),
    "rate": (["check", "in.jsonl", "--model", "m", "--rpm", "-1"], "rpm must be a finite number > 0"),
    "price": (["check", "in.jsonl", "--model", "m", "--prices", "p.json"], "there is none for the model 'm'"),
    "nothing-to-retry": (["retry", "nope.jsonl"], "there is no file nope.jsonl"),
    "nothing-to-compact": (["compact", "nope.jsonl"], "there is none"),
    "output-to-nowhere": (
        ["run", "in.jsonl", "-o", "-", "--model", "m", "--url", "http://x/v1"],
        "they need a file, got '-'",
    ),
    "output-is-a-folder": (
        ["run", "in.jsonl", "-o", ".", "--model", "m", "--url", "http://x/v1"],
        "must be a file, got .",
    ),
    "input-is-a-folder": (["run", ".", "-o", "out.jsonl", "--model", "m"], "cannot read .: Is a directory"),
    "format": (["check", "in.jsonl", "--model", "m", "--format", "parquet"], "in.jsonl: not Parquet"),
    "fault": (["serve-fake", "--fault", "nonsense=0.5"], "nonsense"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_usage_is_said_in_a_line_and_changes_nothing(name, write, tmp_path, monkeypatch, capsys):
    arguments, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    write("in.jsonl", *prompts(2))
    write("other.jsonl", *prompts(1))
    write("c.toml", "request_per_minute = 5")
    write("k.toml", 'api_key = "sentinel-key"')
    write("p.json", '{"models": {}}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("rxllm: ")
    assert told.count("\n") == 1 or name == "no-journal"
    assert "Traceback" not in told
    assert "sentinel-key" not in told
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: after[name] for name in before} == before
    assert "out.jsonl" not in after
    assert not any(name.endswith(".run.json") for name in after)  # what an earlier run was told stays


def test_debug_shows_where_an_error_comes_from(capsys):
    assert main(["compact", "nope.jsonl", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_what_argparse_does_not_know_is_wrong_usage(capsys):
    for arguments in ([], ["run"], ["check", "in.jsonl", "--rpm", "many"], ["run", "a", "-o", "b", "--budget", "5"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "expected NAME=VALUE, got '5'" in capsys.readouterr().err


# as processes


def child(*arguments, before=""):
    """Start the program as a module, after a line of Python."""
    heeding = (
        "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a job in the background of a shell ignores it
    )
    script = f"import runpy, signal; {heeding}\n{before}\nrunpy.run_module('rxllm', run_name='__main__')"
    path = os.pathsep.join([str(Path(rxllm.__path__[0]).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
    )


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_one_interrupt_finishes_what_is_in_flight_and_nothing_more(server, write, tmp_path, number):
    server.set(latency=0.05)
    source, output = write("in.jsonl", *prompts(2000)), tmp_path / "out.jsonl"
    before = server.statistics()
    options = ["run", source, "-o", str(output), "--model", "any", "--url", server.url, "--concurrency", "4", "-q"]
    running = child(*options)
    wait_for(lambda: output.exists() and output.read_bytes().count(b"\n") >= 8)  # the last line may be half there
    running.send_signal(number)
    _, told = running.communicate(timeout=30)
    assert running.returncode == 130, told
    assert "interrupted; what was answered is in" in told
    after = server.statistics()
    assert 8 <= len(rows(output)) < 2000
    assert len(rows(output)) == after.arrivals - before.arrivals  # nothing was cut off
    assert "Traceback" not in told


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_second_interrupt_ends_at_once(server, write, tmp_path):
    server.set(latency=60.0)
    output = tmp_path / "out.jsonl"
    before = server.statistics().arrivals
    options = ["-o", str(output), "--model", "any", "--url", server.url, "--concurrency", "4", "-q"]
    running = child("run", write("in.jsonl", *prompts(20)), *options)
    wait_for(lambda: server.statistics().arrivals - before >= 4)
    running.send_signal(signal.SIGINT)
    assert running.stderr.readline().startswith("stopping: 4 in flight are finished")
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=30)
    assert (running.returncode, rows(output)) == (130, [])
    assert "Traceback" not in told


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_what_is_not_finished_within_the_grace_is_cancelled(server, write, tmp_path):
    server.set(latency=60.0)
    before = server.statistics().arrivals
    options = ["-o", str(tmp_path / "out.jsonl"), "--model", "any", "--url", server.url, "--grace", "0.1", "-q"]
    running = child("run", write("in.jsonl", *prompts(20)), *options)
    wait_for(lambda: server.statistics().arrivals > before)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "interrupted" in told


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_what_waits_for_a_quota_is_not_waited_for_after_an_interrupt(server, write, tmp_path):
    output = tmp_path / "out.jsonl"
    options = ["-o", str(output), "--model", "any", "--url", server.url, "--rpm", "3", "--grace", "1000", "-q"]
    running = child("run", write("in.jsonl", *prompts(20)), *options)
    wait_for(lambda: output.exists() and len(rows(output)) == 3)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=30)
    assert (running.returncode, len(rows(output))) == (130, 3)
    assert "3 done: 3 good" in told


@pytest.mark.skipif(os.name == "nt", reason="no such limit")
def test_a_full_disk_is_said_in_a_line_and_the_next_run_goes_on(server, write, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))"
    output = tmp_path / "out.jsonl"
    options = ["run", write("in.jsonl", *prompts(60)), "-o", str(output), "--model", "any", "--url", server.url, "-q"]
    options += ["--concurrency", "4"]
    running = child(*options, before=limit)
    _, told = running.communicate(timeout=30)
    assert running.returncode == 1
    assert "out.jsonl' cannot be written: File too large" in told.splitlines()[-1]
    assert "Traceback" not in told
    assert 0 < len(rows(output)) < 60
    assert main(options) == 0
    assert ids(output) == Counter({f"line-{n}": 1 for n in range(60)})


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_serve_fake_prints_its_url_and_serves_until_it_is_told_to_end(write, tmp_path):
    serving = child("serve-fake", "--latency", "0.01", "--fault", "400=1")
    url = serving.stdout.readline().strip()
    source, output = write("in.jsonl", *prompts(3)), tmp_path / "out.jsonl"
    assert main(["run", source, "-o", str(output), "--model", "any", "--url", url, "-q"]) == 1
    serving.send_signal(signal.SIGINT)
    _, told = serving.communicate(timeout=30)
    assert (serving.returncode, told) == (0, "3 requests came, 0 were answered well\n")
