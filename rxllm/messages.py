"""What flows through a pipeline: requests in, outcomes out, as frozen values.

    Request ──▶ Attempt, Attempt, … ──▶ Outcome
                             │             ├ reply: Reply[T], when one attempt was answered well
                             └ error       └ error: the last one, when none was
    Chunk, Restarted: a piece of a streamed answer; and that what follows is of a new try.
    ToolCall: what the model wants called.
    Usage: what was used, in tokens.
    Signal, Setting: what a controller learns of attempts, and what it wants of the gate.
    Secret: a key that does not show.

All are picklable, with the errors in them, except `Secret`, which refuses. Times are seconds. `started` is on
the pipeline's own steady clock: only differences mean something.
"""

import hmac
from typing import Any, Generic, Literal, NoReturn, SupportsIndex, TypeVar, overload

import msgspec

from rxllm.errors import ConfigError, DecodeError, ValidationError, check_number, check_text
from rxllm.values import ConfigErrorMeta

__all__ = [
    "Attempt",
    "Chunk",
    "Kind",
    "Outcome",
    "Reply",
    "Request",
    "Restarted",
    "Secret",
    "Setting",
    "Signal",
    "ToolCall",
    "Usage",
    "chat",
]

T = TypeVar("T")


class Request(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    eq=False,
    metaclass=ConfigErrorMeta,
):
    """What to ask. Two requests with the same content are two requests: equality is identity.

    >>> Request(body={"input": "hello"}, operation="embeddings").operation
    'embeddings'
    """

    body: Any  # what the operation takes; it is encoded once per try and never changed
    id: str | None = None  # the caller's name for it
    operation: str = "chat"
    meta: Any = None  # the caller's own: carried along, never sent

    def __post_init__(self) -> None:
        if type(self.operation) is str and self.operation and (self.id is None or (type(self.id) is str and self.id)):
            return
        check_text("id", self.id, optional=True)
        check_text("operation", self.operation)


def chat(prompt: str, *, system: str | None = None, id: str | None = None, meta: Any = None, **params: Any) -> Request:
    """Make the request that asks a chat model one thing.

    Args:
        prompt: What the user says.
        system: What the system says before.
        id: The caller's name for the request.
        meta: The caller's own: carried along, never sent.
        params: Sent as they are: `max_tokens`, `temperature`, …

    Raises:
        ConfigError: A wrong type, or a number that JSON does not have.

    >>> chat("Write a haiku.", max_tokens=60).body
    {'messages': [{'role': 'user', 'content': 'Write a haiku.'}], 'max_tokens': 60}
    """
    check_text("prompt", prompt, empty=True)
    check_text("system", system, empty=True, optional=True)
    if "messages" in params:
        raise ConfigError("messages: chat() makes them from the prompt; for your own use Request(body={'messages': …})")
    for name, value in params.items():
        if isinstance(value, float):  # of NaN and infinity JSON makes null, which is the server's default
            check_number(name, value)
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Request(body={"messages": messages, **params}, id=id, meta=meta)


class Usage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """What was used, in tokens and perhaps in units of the caller's own.

    >>> sum([Usage(input_tokens=9, output_tokens=5), Usage(input_tokens=1)], Usage()).total_tokens
    15
    """

    input_tokens: int = 0  # cached ones included
    output_tokens: int = 0  # reasoning included
    cached_tokens: int = 0  # input that was read from a cache
    reasoning_tokens: int = 0  # output that is not shown
    cache_write_tokens: int = 0  # input that was written to a cache
    units: dict[str, float] | None = None  # unit -> amount, for quotas that count neither requests nor these tokens

    def __post_init__(self) -> None:
        counts = (
            self.input_tokens,
            self.output_tokens,
            self.cached_tokens,
            self.reasoning_tokens,
            self.cache_write_tokens,
        )
        try:
            if min(counts) >= 0 and type(sum(counts)) is int:
                return
        except TypeError:
            pass  # said better below
        for name, count in zip(self.__struct_fields__, counts, strict=False):
            check_number(name, count, least=0, integer=True)

    @property
    def total_tokens(self) -> int:
        """Input and output together."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            cache_write_tokens=self.cache_write_tokens + other.cache_write_tokens,
            units=_summed(self.units, other.units),
        )


def _summed(one: dict[str, float] | None, other: dict[str, float] | None) -> dict[str, float] | None:
    if one is None or other is None:
        return one or other
    return {unit: one.get(unit, 0.0) + other.get(unit, 0.0) for unit in {**one, **other}}


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function that the model wants called.

    >>> ToolCall(id="call_1", name="weather", arguments='{"city": "Oslo"}').decoded()
    {'city': 'Oslo'}
    """

    id: str
    name: str
    arguments: str  # JSON as the model wrote it: it may be none

    @overload
    def decoded(self) -> Any: ...
    @overload
    def decoded(self, type: type[T]) -> T: ...
    def decoded(self, type: Any = Any) -> Any:  # noqa: A002  the name that msgspec gives it
        """Return the arguments as a `type` that msgspec knows; without one, the JSON as it is.

        Raises:
            ValidationError: They are no JSON, or do not fit the type.
        """
        try:
            return msgspec.json.decode(self.arguments or "{}", type=type)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as wrong:
            reason = str(wrong)
        raise ValidationError(f"the arguments of {self.name} do not fit: {reason}", body=self.arguments)


class Reply(msgspec.Struct, Generic[T], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One good answer."""

    value: T  # what the client or the validation made of it
    text: str = ""
    usage: Usage = Usage()
    reasoning: str = ""  # what the model thought before, if it shows that
    tool_calls: tuple[ToolCall, ...] = ()
    others: tuple[str, ...] = ()  # texts of the further answers, when more than one was asked for
    model: str | None = None  # the one that answered
    id: str | None = None  # the server's
    finish_reason: str | None = None
    status: int | None = None  # HTTP's, of the answer
    raw: bytes = b""  # the body as it came
    limits: Any = None  # `policies.Limits`: what the headers said of the key's quotas; None if nothing

    @property
    def extra(self) -> dict[str, Any]:
        """Everything the server said, decoded anew at each access; empty if there was no body.

        Raises:
            DecodeError: The body is no JSON object.

        >>> Reply(value="", raw=b'{"system_fingerprint": "fp_1"}').extra["system_fingerprint"]
        'fp_1'
        """
        return _extra(self.raw)


def _extra(raw: bytes) -> dict[str, Any]:
    if not raw:
        return {}
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        reason = str(wrong)
    raise DecodeError(f"the reply is no JSON object: {reason}", body=raw)


class Chunk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """One piece of a streamed answer."""

    text: str = ""
    reasoning: str = ""
    index: int = 0  # which of the answers, when several were asked for
    finish_reason: str | None = None  # on the last piece of an answer: the sign that it is whole
    usage: Usage | None = None
    raw: bytes = b""  # the event as it came

    @property
    def extra(self) -> dict[str, Any]:
        """Everything the server said in this piece, decoded anew at each access; as `Reply.extra`."""
        return _extra(self.raw)


class Restarted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A streamed answer broke off after pieces of it had been shown: what follows is a new try, from the beginning."""

    attempt: int  # the number of the try that begins, >= 2
    error: Exception | None = None  # what the last one ended with


class Attempt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One try on the wire, how long it waited before, and how it ended."""

    number: int  # from 1
    started: float = 0.0  # when it was sent, after all waiting
    seconds: float = 0.0  # from then to its end
    waited: dict[str, float] = {}  # seconds, by what it waited for; each attempt has its own
    status: int | None = None
    error: Exception | None = None  # None: answered
    usage: Usage | None = None  # None: unknown
    route: str | None = None  # which of several clients; None: there is one
    hedged: bool = False  # a second try beside one that was late

    def __post_init__(self) -> None:
        try:
            if self.number >= 1 and self.seconds >= 0.0:
                return
        except TypeError:
            pass  # said better below
        check_number("number", self.number, least=1, integer=True)
        check_number("seconds", self.seconds, least=0)


class Outcome(msgspec.Struct, Generic[T], frozen=True, kw_only=True, forbid_unknown_fields=True, eq=False):
    """The end of one request: its reply or its error, with every attempt. A failed request is a value too.

    >>> outcome = Outcome(request=chat("hi"), reply=Reply(value="hello", text="hello"))
    >>> outcome.ok, outcome.text
    (True, 'hello')
    """

    request: Request
    reply: Reply[T] | None = None
    error: Exception | None = None
    attempts: tuple[Attempt, ...] = ()
    started: float = 0.0  # when it was pulled
    seconds: float = 0.0  # from then to its end, with all waiting

    def __post_init__(self) -> None:
        if (self.reply is None) is (self.error is None):
            got = "neither" if self.reply is None else "both"
            raise ConfigError(f"Outcome: give either reply or error, got {got}")

    @property
    def ok(self) -> bool:
        """Whether there is a reply."""
        return self.error is None

    @property
    def text(self) -> str:
        """The text of the reply. A failed outcome raises its error."""
        return self.unwrap().text

    @property
    def value(self) -> T:
        """The value of the reply. A failed outcome raises its error."""
        return self.unwrap().value

    @property
    def usage(self) -> Usage:
        """What all attempts used together, as far as the server said."""
        return sum((attempt.usage for attempt in self.attempts if attempt.usage is not None), Usage())

    @property
    def route(self) -> str | None:
        """Which of several clients answered, or failed last; None: there is one, or nothing was sent."""
        return self.attempts[-1].route if self.attempts else None

    def unwrap(self) -> Reply[T]:
        """Return the reply, or raise the error."""
        if self.reply is not None:
            return self.reply
        assert self.error is not None  # noqa: S101 - for the type checkers: __post_init__ has seen to it
        raise self.error.with_traceback(None)  # else the tracebacks of all who asked pile up on it

    def trim(self) -> "Outcome[T]":
        """Return a copy without the request's body and the reply's raw bytes: to keep millions of them."""
        request = msgspec.structs.replace(self.request, body=None)
        reply = None if self.reply is None else msgspec.structs.replace(self.reply, raw=b"")
        return msgspec.structs.replace(self, request=request, reply=reply)


Kind = Literal["start", "ok", "refused", "overloaded", "fault", "fatal", "invalid"]


class Signal(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What an attempt tells a controller: that it started, or how it ended.

    "refused" is a 429, "overloaded" a 529 or a 503 that says so, "fault" another transient error, "fatal" one that no
    further try cures, "invalid" a good answer that a check refused.
    """

    at: float  # steady seconds
    kind: Kind
    in_flight: int  # attempts on the wire when it started, itself included
    epoch: int  # how many settings the controller had made when it started
    seconds: float = 0.0  # on the wire; 0.0 at a start
    tokens: float = 0.0  # that it used; 0.0 if unknown
    binding: bool = False  # somebody waits now, and the controller's own limit or rate is the reason
    retry_after: float | None = None  # seconds that the server asked to wait


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What a controller wants of its gate; None is no limit."""

    limit: int | None  # attempts on the wire at a time, >= 1
    rate: float | None  # starts per second, evenly spaced, > 0
    reason: str  # for a person: why it changed


class Secret:
    """A key that does not show: not in a repr, a log, a message, a pickle or a table of local variables.

    >>> key = Secret("sk-12345")
    >>> print(f"{key}", [key])
    *** [***]
    >>> key.scrub("no such key: sk-12345")
    'no such key: ***'
    """

    __slots__ = ("__value",)

    def __init__(self, value: str) -> None:
        if not isinstance(value, str):
            raise ConfigError(f"a key must be a string, got a {type(value).__name__}")
        if not value or not value.isprintable() or value != value.strip():
            raise ConfigError("a key must not be empty, nor have space at its ends or control characters in it")
        self.__value = value

    def reveal(self) -> str:
        """Return the key itself: for the header it goes into, at the last moment."""
        return self.__value

    def scrub(self, text: str) -> str:
        """Return `text` with `***` in place of the key, wherever it stands."""
        return text.replace(self.__value, "***")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self.__value.encode(), other.reveal().encode())

    def __hash__(self) -> int:
        return hash(self.__value)

    def __repr__(self) -> str:
        return "***"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise ConfigError("a key is not pickled or copied: give the name of the variable that has it instead")
