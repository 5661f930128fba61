from __future__ import annotations

import base64
import json
import struct
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.testing._answers import AnswerFunction, RefusedBodyError, fingerprint, summary, tokens
from rxllm.testing._arrivals import Log
from rxllm.testing._embeddings import read_embeddings
from rxllm.testing._faults import FaultPlan
from rxllm.testing._openai import read_chat, read_completion


def chat(prompt: object = "Say it.", **params: object) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}], **params}).encode()


def answer(raw: bytes, mode: str | AnswerFunction = "summary") -> Any:
    return json.loads(read_chat(raw, mode).answer().body)


@given(prompt=st.text(max_size=300))
def test_a_summary_is_one_line_that_names_its_prompt(prompt: str) -> None:
    text = summary(prompt, fingerprint(prompt))
    assert text.endswith(f"[{fingerprint(prompt)}]")
    assert len(text.splitlines()) == 1
    assert len(text.split()) < 40


def test_a_summary_is_made_from_what_follows_the_instruction() -> None:
    said = summary("Summarize this:\n\nReturn the sum. Ignore the rest.", "00")
    assert said == "In short: Return the sum. [00]"


@given(prompt=st.text(max_size=200), most=st.integers(1, 60))
def test_max_tokens_holds_and_usage_adds_up(prompt: str, most: int) -> None:
    body = answer(chat(prompt, max_tokens=most), "echo")
    choice, usage = body["choices"][0], body["usage"]
    text = choice["message"]["content"]
    assert tokens(text) == usage["completion_tokens"] <= most
    assert choice["finish_reason"] == ("length" if tokens(prompt) > most else "stop")
    assert text == prompt[: most * 4]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert fingerprint(prompt) in body["id"]


def test_the_fast_path_and_the_general_path_say_the_same() -> None:
    one, two = answer(chat(max_tokens=9)), answer(chat(max_tokens=9, n=2))
    assert two["choices"][0] == one["choices"][0]
    assert {**two, "choices": 0, "usage": 0} == {**one, "choices": 0, "usage": 0}
    assert two["choices"][1]["message"] != two["choices"][0]["message"]
    assert two["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]


def test_the_seed_changes_the_answer_and_nothing_else_does() -> None:
    texts = [answer(chat(seed=seed))["choices"][0]["message"]["content"] for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


def test_a_callable_gets_the_prompt_and_the_body_and_may_return_a_message() -> None:
    def tool(prompt: str, body: dict) -> dict:
        return {"content": None, "tool_calls": [{"id": "1", "arguments": prompt + body["model"]}]}

    choice = answer(chat("x"), tool)["choices"][0]
    assert choice["message"]["tool_calls"][0]["arguments"] == "xm"
    assert choice["finish_reason"] == "tool_calls"


def test_the_text_of_parts_counts_and_images_do_not() -> None:
    parts = [{"type": "text", "text": "abcd"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    assert answer(chat(parts), "echo")["choices"][0]["message"]["content"] == "abcd"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{",
        chat().replace(b"messages", b"massages"),
        chat(max_tokens="9"),
        b'{"messages":[' + b"[" * 10_000,
    ],
)
def test_what_is_no_chat_is_an_error_of_the_decoder(raw: bytes) -> None:
    with pytest.raises((msgspec.MsgspecError, RecursionError)):
        read_chat(raw, "summary")


@pytest.mark.parametrize("params", [{"max_tokens": 0}, {"n": 0}, {"n": 1_000}, {"messages": []}])
def test_parameters_out_of_range_are_refused_by_name(params: dict[str, Any]) -> None:
    with pytest.raises(RefusedBodyError) as caught:
        read_chat(chat(**params), "summary")
    assert caught.value.param == next(iter(params))


def test_plain_completions_answer_every_prompt_n_times() -> None:
    raw = json.dumps({"model": "m", "prompt": ["a", "b"], "n": 2, "max_tokens": 50}).encode()
    ask = read_completion(raw, "echo")
    body = json.loads(ask.answer().body)
    assert [choice["text"] for choice in body["choices"]] == ["a", "a", "b", "b"]
    assert ask.max_tokens == 200


def test_embeddings_are_unit_vectors_of_their_texts_in_both_encodings() -> None:
    def vectors(**params: object) -> list:
        raw = json.dumps({"model": "m", "input": ["a", "b", "a"], "dimensions": 100, **params}).encode()
        return [item["embedding"] for item in json.loads(read_embeddings(raw, "").answer().body)["data"]]

    plain = vectors()
    assert plain[0] == plain[2] != plain[1]
    assert sum(x * x for x in plain[0]) == pytest.approx(1)
    packed = struct.unpack("<100f", base64.b64decode(vectors(encoding_format="base64")[0]))
    assert packed == pytest.approx(plain[0])


@given(
    arrivals=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 9), st.booleans()), max_size=40),
    window=st.integers(1, 9),
)
def test_the_peak_is_the_fullest_window_that_begins_with_an_admission(
    arrivals: list[tuple[int, int, bool]], window: int
) -> None:
    log, now, rows = Log(), 0, []
    for gap, charge, admitted in arrivals:
        now += gap
        log.add(now, "m", 0, "ok", 1, 1, charge, 0, 0, admitted=admitted)
        if admitted:
            rows.append((now, charge))
    windows = [[cost for at, cost in rows if start <= at < start + window] for start, _ in rows]
    assert log.peak(window) == max(map(len, windows), default=0)
    assert log.peak(window, "tokens") == max(map(sum, windows), default=0)


def test_a_log_survives_the_wire_and_the_loss_of_its_older_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rxllm.testing._arrivals.KEEP", 4)
    log = Log(5.0)
    for number in range(6):
        row = log.add(float(number), f"m{number}", 0, "ok", number, 2, 3, 1, 7, admitted=True)
        assert row == number
    log.answered(0, 9.0, 200)  # dropped: no effect
    log.answered(4, 9.0, 200)
    log.disconnected(5)
    assert (log.dropped, len(log)) == (2, 4)
    assert (log[2].marker, log[2].answered, log[2].status) == ("m4", 9.0, 200)
    assert (log[-1].answered, log[-1].disconnected) == (None, True)
    assert not any(row.disconnected for row in list(log)[:-1])
    copy = Log.from_columns(msgspec.msgpack.decode(msgspec.msgpack.encode(log.columns()), type=type(log.columns())))
    assert list(copy) == list(log)
    assert (copy.started, copy.dropped, copy.reasons()) == (5.0, 2, {"ok": 4})
    assert copy.markers(admitted=True)["m5"] == 1


def test_marked_requests_go_before_the_script_and_the_script_before_chance() -> None:
    plan = FaultPlan(Random(1))
    plan.chances({"500": 1.0})
    plan.script(["503", None])
    plan.marked({"poison": "stall", "twice": ["429", None]})
    bodies = [b"a poison", b"twice", b"x", b"twice", b"twice", b"x", b"x"]
    assert [plan.draw(body) for body in bodies] == ["stall", "429", "503", None, None, None, "500"]


def test_chance_follows_its_seed_and_its_probabilities() -> None:
    def draw(seed: int) -> list[str | None]:
        plan = FaultPlan(Random(seed))
        plan.chances({"500": 0.25, "reset": 0.25})
        return [plan.draw(b"") for _ in range(4_000)]

    seen = draw(7)
    assert seen == draw(7) != draw(8)
    for fault, share in (("500", 0.25), ("reset", 0.25), (None, 0.5)):
        assert seen.count(fault) / 4_000 == pytest.approx(share, abs=0.05)
