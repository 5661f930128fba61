"""What the simulated provider reads and says in the dialect of Scale's LLM Engine. Pure."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from rxllm.testing._answers import (
    JSON,
    Answer,
    Ask,
    Wish,
    check_counts,
    cut,
    decode,
    encode,
    fingerprint,
    say,
    tokens,
)
from rxllm.testing._events import Events, cut_up, event

if TYPE_CHECKING:
    from rxllm.testing._answers import AnswerFunction

LINE: Final = "\r\n"
PING: Final = b": ping - 2026-01-01 00:00:00.000000+00:00\r\n\r\n"
PROBABILITY: Final = -0.5

Penalty = Annotated[float, msgspec.Meta(ge=0, le=2)]


class CompletionBody(msgspec.Struct):
    """What the server reads and checks of a request for a completion."""

    prompt: str
    max_new_tokens: int
    temperature: Annotated[float, msgspec.Meta(ge=0, le=1)]
    return_token_log_probs: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    guided_json: JSON | None = None
    guided_choice: list[str] | None = None


_body = msgspec.json.Decoder(CompletionBody)


def read_sync(raw: bytes, mode: str | AnswerFunction) -> Ask:
    """Read the body of a request for a completion in one piece."""
    return _read(raw, mode, streamed=False)


def read_stream(raw: bytes, mode: str | AnswerFunction) -> Ask:
    """Read the body of a request for a streamed completion."""
    return _read(raw, mode, streamed=True)


def _read(raw: bytes, mode: str | AnswerFunction, *, streamed: bool) -> Ask:
    body = _body.decode(raw)
    check_counts("max_new_tokens", body.max_new_tokens)
    prompt = body.prompt
    size = tokens(prompt)
    mark = fingerprint(prompt)
    wish = None if body.guided_json is None else Wish(body.guided_json)

    def answer() -> Answer:
        said = body.guided_choice[0] if body.guided_choice else say(mode, prompt, mark, 0, raw, wish)
        text, used, _ = cut(said if isinstance(said, str) else encode(said).decode(), body.max_new_tokens)
        told = [_told(part) for part in cut_up(text, None)] if body.return_token_log_probs else None
        output = {"text": text, "num_prompt_tokens": size, "num_completion_tokens": used, "tokens": told}
        return Answer(encode({"request_id": mark, "output": output}), used)

    return Ask(mark, None, "", size, body.max_new_tokens, answer, completion_events if streamed else None)


def completion_events(reply: bytes, chunks: int | None) -> Events:
    """Return the events that say the same as the body of a completion, after a comment."""
    body = decode(reply)
    name, output = body["request_id"], body["output"]
    parts = cut_up(output["text"], chunks) or [""]
    data = partial(event, line=LINE)
    events: list[bytes] = []
    at = 0
    for number, part in enumerate(parts, 1):
        at += len(part)
        finished = number == len(parts)
        piece = {
            "text": part,
            "finished": finished,
            "num_prompt_tokens": output["num_prompt_tokens"] if finished else None,
            "num_completion_tokens": output["num_completion_tokens"] if finished else (at + 3) // 4,
            "token": None if output["tokens"] is None else _told(part),
        }
        events.append(data({"request_id": name, "output": piece, "error": None}))
    content = {"error": "Internal error occurred.", "timestamp": "2026-01-01 00:00:00 UTC"}
    error = data({"request_id": name, "output": None, "error": {"status_code": 500, "content": content}})
    return Events([PING, *events[:-1]], events[-1:], [], error)


def _told(token: str) -> JSON:
    return {"token": token, "log_prob": PROBABILITY}
