"""What calls of well-known APIs use, as resources of a `Runner`: they fit what the vendors' own clients take.

    runner = rxllm.Runner(client.chat.completions.create, rxllm.presets.openai_chat_resources(
        requests_per_minute=500, tokens_per_minute=200_000, model_max_len=128_000))

The function may be another one too, if it has the same names for what it is given (`messages`, `max_tokens`, …) and
returns the answer as the vendor writes it, as an object or as a dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

from rxllm.errors import check_number
from rxllm.runner.calls import Call, Resource

__all__ = ["anthropic_resources", "openai_chat_resources", "openai_embeddings_resources"]

MINUTE = 60.0
SAFE = 0.95  # of a limit for tokens: nobody counts quite as the server does
PER_WORD = 2  # tokens, at most, of a word of a language with spaces between them
PER_TOKEN = 3  # bytes of UTF-8, at least, of a token of the others
MEDIA = frozenset({"image_url", "input_audio", "file", "source"})  # what holds data or an address, in a part


def openai_chat_resources(requests_per_minute: float, tokens_per_minute: float, model_max_len: int) -> list[Resource]:
    """Return what calls of OpenAI's chat completions use, and of the many APIs that are like it.

    A call reserves its prompt and its longest answer, for each of its `n` answers, and is settled to the `usage` of
    its result; a result without one is an error, so the call is tried again. 95 % of the tokens are used: there are
    refusals nearer to the limit, since the server counts a bit differently.

    Pictures, sounds and files in a prompt are not reckoned with before they are in the `usage`.

    rate_limited 0.4 has the same resources. What differs: `n=0` and `max_tokens=0` are taken as they are said,
    `max_completion_tokens` counts too, texts inside of lists of parts are seen, texts without spaces are not one
    word, nothing is reserved above what the model can take, and a result may be an object as well as a dict.

    Args:
        requests_per_minute: the limit, >= 1.
        tokens_per_minute: the limit, >= 1.
        model_max_len: tokens of prompt and answer together that the model takes, >= 1.

    Raises:
        ConfigError: an argument out of range.
    """
    check_number("model_max_len", model_max_len, least=1, integer=True)
    return [
        _requests(requests_per_minute),
        _tokens(
            "tokens_per_minute",
            tokens_per_minute,
            estimate=partial(_chat_tokens, model_max_len),
            used=partial(_used, "total_tokens"),
        ),
    ]


def openai_embeddings_resources(requests_per_minute: float, tokens_per_minute: float) -> list[Resource]:
    """Return what calls of OpenAI's embeddings use: their `input`, settled to the `usage` of the result.

    Args:
        requests_per_minute: the limit, >= 1.
        tokens_per_minute: the limit, >= 1.

    Raises:
        ConfigError: an argument out of range.
    """
    return [
        _requests(requests_per_minute),
        _tokens(
            "tokens_per_minute",
            tokens_per_minute,
            estimate=_embedding_tokens,
            used=partial(_used, "total_tokens"),
        ),
    ]


def anthropic_resources(
    requests_per_minute: float, input_tokens_per_minute: float, output_tokens_per_minute: float
) -> list[Resource]:
    """Return what calls of Anthropic's messages use: input and output have limits of their own.

    Input that is read from a cache does not count, what is written to one does (docs.anthropic.com: api/rate-limits).
    Of the output a call reserves its `max_tokens`.

    Args:
        requests_per_minute: the limit, >= 1.
        input_tokens_per_minute: the limit, >= 1.
        output_tokens_per_minute: the limit, >= 1.

    Raises:
        ConfigError: an argument out of range.
    """
    return [
        _requests(requests_per_minute),
        _tokens(
            "input_tokens_per_minute",
            input_tokens_per_minute,
            estimate=partial(_texts_tokens, ("system", "messages", "tools")),
            used=_uncached,
        ),
        _tokens(
            "output_tokens_per_minute",
            output_tokens_per_minute,
            estimate=_longest,
            used=partial(_used, "output_tokens"),
        ),
    ]


def _requests(limit: float) -> Resource:
    check_number("requests_per_minute", limit, least=1)
    return Resource("requests_per_minute", limit, MINUTE, arguments_usage_extractor=lambda _: 1)


def _tokens(
    name: str, limit: float, *, estimate: Callable[[Call], float], used: Callable[[Call, Any], float]
) -> Resource:
    check_number(name, limit, least=1)
    return Resource(
        name,
        max(1, int(SAFE * limit)),
        MINUTE,
        max_results_usage_estimator=estimate,
        results_usage_extractor=used,
    )


def _chat_tokens(model_max_len: int, call: Call) -> float:
    """Return the most tokens that a chat may take."""
    answer = _number(call, "max_completion_tokens")
    answer = _number(call, "max_tokens") if answer is None else answer
    each: float = model_max_len
    if answer is not None:
        each = min(each, _texts_tokens(("messages", "functions", "tools"), call) + answer)
    answers = _number(call, "n")
    return each if answers is None else each * answers


def _embedding_tokens(call: Call) -> float:
    given: object = call.get_argument("input")
    if isinstance(given, list | tuple):
        rows = cast("list[object]", given)
        if all(isinstance(row, int) for row in rows):  # one text, as tokens
            return len(rows)
        return sum(len(cast("list[int]", row)) if isinstance(row, list) else _text_tokens(row) for row in rows)
    return _text_tokens(given)


def _texts_tokens(names: tuple[str, ...], call: Call) -> int:
    return sum(_text_tokens(call.get_argument(name)) for name in names)


def _text_tokens(given: object) -> int:
    """Return the most tokens that all texts in `given` may be."""
    return sum(
        max(PER_WORD * len(text.split()), math.ceil(len(text.encode("utf-8", "replace")) / PER_TOKEN))
        for text in _texts(given)
    )


def _texts(given: object) -> Iterable[str]:
    """Find all texts: of a message, of the parts of one, of a tool and its schema; pictures and the like are none."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, Mapping):
        for name, inner in cast("Mapping[str, object]", given).items():
            if name not in MEDIA:
                yield from _texts(inner)
    elif isinstance(given, list | tuple):
        for inner in cast("list[object]", given):
            yield from _texts(inner)


def _number(call: Call, name: str) -> float | None:
    """Return an argument that is a number; else None: clients have signs of their own for what is not given."""
    value: object = call.get_argument(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _longest(call: Call) -> float:
    return _number(call, "max_tokens") or 0


def _uncached(call: Call, result: object) -> float:
    written = _usage(result, "cache_creation_input_tokens")
    return _used("input_tokens", call, result) + (0 if written is None else written)


def _used(name: str, _call: Call, result: object) -> float:
    value = _usage(result, name)
    if value is None:
        msg = f"the result has no usage.{name}: {str(result)[:200]}"
        raise ValueError(msg)
    return value


def _usage(result: object, name: str) -> float | None:
    value = _get(_get(result, "usage"), name)
    return value if isinstance(value, int | float) else None


def _get(thing: object, name: str) -> object:
    if isinstance(thing, Mapping):
        return cast("Mapping[str, object]", thing).get(name)
    return getattr(thing, name, None)
