"""What the simulated model says, whatever the dialect it is asked in. Pure and deterministic."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import msgspec

from rxllm.testing._schemas import example

if TYPE_CHECKING:
    from rxllm.testing._events import Events

JSON = dict[str, Any]
AnswerFunction = Callable[[str, JSON], str | JSON]

CREATED: Final = 1_767_225_600  # every reply is from 2026-01-01, so that replies are the same in every run
SUMMARY_WORDS: Final = 24
OPENINGS: Final = ("In short", "Briefly", "In one sentence", "To sum up")

SENTENCE_END: Final = re.compile(r"[.!?](?=\s)|\n\s*\n")


def fingerprint(text: str) -> str:
    """Return 12 hexadecimal digits that tell one prompt from another.

    A "summary" ends with the fingerprint of its prompt in brackets, and the `id` of every reply has it: so a
    test sees whether an answer belongs to its request.

    Example:
        >>> fingerprint("Say hello.")
        '7e088bc3ec97'
    """
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def tokens(text: str) -> int:
    """Return about how many tokens a text has: one for each four characters begun.

    Example:
        >>> tokens("four"), tokens("fives"), tokens("")
        (1, 2, 0)
    """
    return (len(text) + 3) >> 2


def summary(prompt: str, mark: str, variant: int = 0) -> str:
    """Return one sentence made from the prompt: the first sentence of what follows its instruction."""
    text = prompt
    for separator in ("\n\n", ":\n", ": "):
        instruction, found, rest = prompt.partition(separator)
        if found and instruction.strip() and rest.strip():
            text = rest
            break
    text = text.strip()
    end = SENTENCE_END.search(text)
    words = (text[: end.start()] if end else text).rstrip(".!?").split(None, SUMMARY_WORDS)
    if not words:
        words = ["nothing", "was", "asked"]
    elif len(words) > SUMMARY_WORDS:
        words[SUMMARY_WORDS:] = ["and", "so", "on"]
    opening = OPENINGS[(int(mark[:2], 16) + variant) % len(OPENINGS)]
    return f"{opening}: {' '.join(words)}. [{mark}]"


class Ask(NamedTuple):
    """A request as the server judges it, and how to answer it."""

    mark: str  # fingerprint of the prompt
    user: str | None
    model: str
    prompt_tokens: int
    max_tokens: int | None  # for all answers together
    answer: Callable[[], Answer]
    stream: Callable[[bytes, int | None], Events] | None = None  # body of the answer, chunks -> events; None: unasked


class Answer(NamedTuple):
    """The body of a reply but for its id, which begins with the fingerprint."""

    body: bytes
    completion_tokens: int
    failed: bool = False  # the caller's `answer` raised; the body is an error
    events: Events | None = None  # that say the same; None: nobody asked for a stream


class Wish(NamedTuple):
    """What is wanted other than a text: JSON of a schema, as the answer or as the arguments of a tool."""

    schema: Any
    tool: str | None = None  # its name


class ToolUse(NamedTuple):
    """The model wants a tool called."""

    name: str
    arguments: str  # JSON


class RefusedBodyError(Exception):
    """The body is no request for this route; `param` names what is wrong."""

    def __init__(self, text: str, param: str | None = None) -> None:
        super().__init__(text, param)
        self.text = text
        self.param = param


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(JSON).decode


def text_of(content: object) -> str:
    """Return the text of a message's content; parts that are no text count for nothing."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        items = cast("list[JSON | str]", content)
        parts = [part.get("text", part.get("content")) for part in items if isinstance(part, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    return ""


STOP: Final = b'"stop"'
LENGTH: Final = b'"length"'


def cut(text: str, most: int | None) -> tuple[str, int, bytes]:
    """Return the text within `most` tokens, its tokens, and the finish reason as JSON."""
    used = tokens(text)
    return (text[: most * 4], most, LENGTH) if most is not None and used > most else (text, used, STOP)


def say(  # noqa: PLR0917 - what all dialects need
    mode: str | AnswerFunction, prompt: str, mark: str, variant: int, raw: bytes, wish: Wish | None = None
) -> str | ToolUse | JSON:
    """Return the answer: a text, a call, or what a caller's function makes of the message."""
    if not isinstance(mode, str):
        said: object = mode(prompt, decode(raw))
        if not isinstance(said, str | Mapping):
            raise TypeError(f"answer must return a str or a dict (a message), got {said!r}")
        return said if isinstance(said, str) else dict(said)
    if wish is not None:
        text = encode(example(wish.schema)).decode()
        return text if wish.tool is None else ToolUse(wish.tool, text)
    return prompt if mode == "echo" else summary(prompt, mark, variant)


def wish_of(schema: object, tools: Iterable[tuple[str, object]], choice: str | bool | None) -> Wish | None:  # noqa: FBT001
    """Return what is wanted of an answer.

    Args:
        schema: of the answer; None if a text will do.
        tools: name and schema of all that the model may call.
        choice: a tool's name, True for any of them; else none has to be called.
    """
    for name, parameters in tools:
        if choice is True or name == choice:
            return Wish(parameters, name)
    return None if schema is None else Wish(schema)


def check_counts(name: str, each: int | None, n: int | None = None) -> int:
    """Check the most tokens of an answer and the number of answers; return the latter.

    Raises:
        RefusedBodyError: one is out of its range.
    """
    if each is not None and each < 1:
        raise RefusedBodyError(f"{name!r} must be at least 1, got {each}.", name)
    if n is not None and not 1 <= n <= 128:  # noqa: PLR2004 - the vendor's bound
        raise RefusedBodyError(f"'n' must be between 1 and 128, got {n}.", "n")
    return 1 if n is None else n


def log_probabilities(text: str) -> list[JSON]:
    """Return what OpenAI tells of each token of a text: all are equally probable here."""
    parts = [text[at : at + 4] for at in range(0, len(text), 4)]
    return [{"token": part, "logprob": -0.5, "bytes": list(part.encode()), "top_logprobs": []} for part in parts]
