"""Everything about a simulated provider that can change while it runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypedDict, TypeVar, cast

import msgspec

from rxllm.errors import ConfigError, check_number
from rxllm.testing._answers import AnswerFunction
from rxllm.testing._faults import NAMED, STREAMED, is_fault
from rxllm.testing._quotas import ServerQuota

T = TypeVar("T")

Hint = Literal["both", "seconds", "date", "off"]
Charge = Literal["reserved", "actual", "settled"]
MODES: Final = ("summary", "echo")  # tuples: what is asked for may not be hashable
HINTS: Final = ("both", "seconds", "date", "off")
CHARGES: Final = ("reserved", "actual", "settled")


class Latency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long an answer takes: `(base + per_token * completion tokens) * jitter` seconds.

    Args:
        base: seconds, at least 0.
        per_token: seconds for each token of the answer, at least 0.
        sigma: spread of the jitter, lognormal with mean 1; 0 means none.

    Raises:
        ConfigError: a field out of its range.
    """

    base: float = 0.0
    per_token: float = 0.0
    sigma: float = 0.0

    def __post_init__(self) -> None:
        check_number("base", self.base, least=0)
        check_number("per_token", self.per_token, least=0)
        check_number("sigma", self.sigma, least=0, most=5)


class Changes(TypedDict, total=False):
    """The fields that `SimulatedProvider` and `set` take; their meaning is told in `SimulatedProvider`."""

    answer: str | AnswerFunction
    latency: float | Latency
    path_jitter: float | Sequence[float]
    knee: int | None
    chunks: int | None
    chunk_seconds: float | None
    max_in_flight: int | None
    overload_status: int
    requests: float | ServerQuota | None
    tokens: float | ServerQuota | None
    charge: Charge
    default_max_tokens: int
    charge_refused: bool
    retry_after: bool | Hint
    limit_headers: bool
    faults: Mapping[str, float]
    script: Sequence[str | None]
    marked: Mapping[str, str | Sequence[str | None]]
    fault_retry_after: float
    max_stall: float
    requests_per_connection: int | None
    hang_up: Literal["idle", "reuse"]
    key: str | None
    models: Sequence[str]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The checked form of `Changes`."""

    answer: str = "summary"  # a mode or "module:function"
    latency: Latency = Latency()
    path_jitter: tuple[float, float] = (0.0, 0.0)
    knee: int | None = None
    chunks: int | None = None
    chunk_seconds: float | None = None
    max_in_flight: int | None = None
    overload_status: int = 429
    requests: ServerQuota | None = None
    tokens: ServerQuota | None = None
    charge: Charge = "reserved"
    default_max_tokens: int = 16
    charge_refused: bool = False
    retry_after: Hint = "both"
    limit_headers: bool = True
    faults: dict[str, float] = {}
    script: tuple[str | None, ...] = ()
    marked: dict[str, str | tuple[str | None, ...]] = {}
    fault_retry_after: float = 1.0
    max_stall: float = 60.0
    requests_per_connection: int | None = None
    hang_up: Literal["idle", "reuse"] = "idle"
    key: str | None = None
    models: tuple[str, ...] = ("simulated",)


FIELDS: Final = frozenset(Settings.__struct_fields__)


def checked(changes: Mapping[str, object]) -> dict[str, Any]:
    """Check changes and bring them into the form of `Settings`; `answer` may stay a callable.

    Raises:
        ConfigError: an unknown field, a wrong type or a value out of its range; it names both.
    """
    return {name: _check(name, value) for name, value in changes.items()}


def split_answer(changes: dict[str, Any]) -> AnswerFunction | None:
    """Replace a callable `answer` in `changes` by its name; return what to call, None for a mode."""
    answer = changes.get("answer")
    if answer is None or answer in MODES:
        return None
    if isinstance(answer, str):
        return find_answer(answer)
    changes["answer"] = answer_name(answer)
    return cast("AnswerFunction", answer)


def answer_name(answer: Callable[..., object]) -> str:
    """Return "module:function" for a callable, as far as it has one."""
    return f"{getattr(answer, '__module__', '?')}:{getattr(answer, '__qualname__', type(answer).__qualname__)}"


def find_answer(name: str) -> AnswerFunction:
    """Import what "module:function" names.

    Raises:
        ConfigError: there is no such module or function.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"answer={name!r} cannot be imported: {error}") from None
    if not callable(found):
        raise ConfigError(f"answer={name!r} is not callable, got {found!r}")
    return cast("AnswerFunction", found)


def checked_steps(steps: object) -> tuple[tuple[float, dict[str, Any]], ...]:
    """Check a schedule: pairs of seconds after the start and changes.

    Raises:
        ConfigError: not pairs, a negative time, or changes that `checked` refuses.
    """
    if not isinstance(steps, Sequence) or isinstance(steps, str | bytes):
        raise ConfigError(f"steps must be a sequence of (seconds, changes), got {steps!r}")
    done: list[tuple[float, dict[str, Any]]] = []
    for step in cast("Sequence[object]", steps):
        pair = tuple(cast("Sequence[object]", step)) if isinstance(step, tuple | list) else ()
        if len(pair) != 2 or not isinstance(pair[1], Mapping):  # noqa: PLR2004 - a pair
            raise ConfigError(f"steps: each must be (seconds, changes), got {step!r}")
        check_number("steps: seconds", pair[0], least=0)
        done.append((float(cast("float", pair[0])), checked(cast("Mapping[str, object]", pair[1]))))
    return tuple(sorted(done, key=lambda step: step[0]))


def _check(name: str, value: object) -> Any:
    if name not in FIELDS:
        raise ConfigError(f"unknown field {name!r}, got {value!r}; known: {', '.join(sorted(FIELDS))}")
    if name in CHOICES:
        value = RENAMED.get(value, value) if name == "retry_after" and isinstance(value, bool) else value
        if value not in CHOICES[name]:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}, got {value!r}")
        return value
    if name in BOOLEANS:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, got {value!r}")
        return value
    if name in COUNTS:
        check_number(name, value, least=1, integer=True, optional=name != "default_max_tokens")
        return value
    return OTHERS[name](name, value)


RENAMED: Final = {True: "both", False: "off"}
CHOICES: Final[dict[str, tuple[object, ...]]] = {
    "charge": CHARGES,
    "retry_after": HINTS,
    "hang_up": ("idle", "reuse"),
    "overload_status": (429, 503, 529),
}
BOOLEANS: Final = frozenset({"charge_refused", "limit_headers"})
COUNTS: Final = frozenset({"chunks", "knee", "max_in_flight", "default_max_tokens", "requests_per_connection"})


def _answer(name: str, value: object) -> object:
    if callable(value) or value in MODES:
        return value
    if not isinstance(value, str) or not all(value.partition(":")):
        raise ConfigError(f"{name} must be 'summary', 'echo', 'module:function' or a callable, got {value!r}")
    return value


def _latency(name: str, value: object) -> Latency:
    if isinstance(value, Latency):
        return value
    if isinstance(value, Mapping):
        return _struct(name, Latency, cast("Mapping[str, Any]", value))
    check_number(name, value, least=0)
    return Latency(float(cast("float", value)))


def _span(name: str, value: object) -> tuple[float, float]:
    pair = tuple(cast("Sequence[object]", value)) if isinstance(value, tuple | list) else (0.0, value)
    if len(pair) != 2:  # noqa: PLR2004 - a pair
        raise ConfigError(f"{name} must be seconds or a pair of them, got {value!r}")
    low, high = pair
    check_number(f"{name}: the least", low, least=0)
    check_number(f"{name}: the most", high, least=cast("float", low))
    return float(cast("float", low)), float(cast("float", high))


def _quota(name: str, value: object) -> ServerQuota | None:
    if value is None or isinstance(value, ServerQuota):
        return value
    if isinstance(value, Mapping):
        return _struct(name, ServerQuota, cast("Mapping[str, Any]", value))
    check_number(name, value, above=0)
    return ServerQuota(cast("float", value))


def _struct(name: str, kind: Callable[..., T], fields: Mapping[str, Any]) -> T:
    try:
        return kind(**fields)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}, got {fields!r}") from None
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _faults(name: str, value: object) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must map faults to probabilities, got {value!r}")
    faults = cast("Mapping[object, object]", value)
    for fault, chance in faults.items():
        _known(name, fault)
        check_number(f"{name}[{fault!r}]", chance, least=0, most=1)
    chances = cast("dict[str, float]", dict(faults))
    if sum(chances.values()) > 1 + 1e-9:
        raise ConfigError(f"{name}: the probabilities sum to {sum(chances.values()):g}, need at most 1: {chances!r}")
    return chances


def _script(name: str, value: object) -> tuple[str | None, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ConfigError(f"{name} must be a sequence of faults and None, got {value!r}")
    faults = tuple(cast("Sequence[object]", value))
    for fault in faults:
        if fault is not None:
            _known(name, fault)
    return cast("tuple[str | None, ...]", faults)


def _marked(name: str, value: object) -> dict[str, str | tuple[str | None, ...]]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must map markers to faults, got {value!r}")
    done: dict[str, str | tuple[str | None, ...]] = {}
    for marker, faults in cast("Mapping[object, object]", value).items():
        if not isinstance(marker, str) or not marker:
            raise ConfigError(f"{name}: a marker must be a text, got {marker!r}")
        if isinstance(faults, str):
            done[marker] = _known(f"{name}[{marker!r}]", faults)
        else:
            done[marker] = _script(f"{name}[{marker!r}]", faults)
    return done


def _known(name: str, fault: object) -> str:
    if not is_fault(fault):
        known = ", ".join((*NAMED, *STREAMED))
        raise ConfigError(f"{name}: a fault is a status from '400' to '599' or {known}; got {fault!r}")
    return cast("str", fault)


def _seconds(name: str, value: object) -> float:
    check_number(name, value, least=0)
    return cast("float", value)


def _gap(name: str, value: object) -> float | None:
    check_number(name, value, least=0, optional=True)
    return cast("float | None", value)


def _key(name: str, value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or not value.isascii() or not value.strip()):
        raise ConfigError(f"{name} must be an ASCII text or None, got a {type(value).__name__}")  # the value is secret
    return value


def _models(name: str, value: object) -> tuple[str, ...]:
    models = tuple(cast("Sequence[object]", value)) if isinstance(value, tuple | list) else ()
    if not models or not all(isinstance(model, str) and model for model in models):
        raise ConfigError(f"{name} must be a sequence of at least one text, got {value!r}")
    return cast("tuple[str, ...]", models)


OTHERS: Final[dict[str, Callable[[str, object], Any]]] = {
    "answer": _answer,
    "chunk_seconds": _gap,
    "latency": _latency,
    "path_jitter": _span,
    "requests": _quota,
    "tokens": _quota,
    "faults": _faults,
    "script": _script,
    "marked": _marked,
    "fault_retry_after": _seconds,
    "max_stall": _seconds,
    "key": _key,
    "models": _models,
}
