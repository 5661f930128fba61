"""How much of what in how much time: the value, and the text that says it."""

import math
import os
import re
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn, get_args

import msgspec

from rxllm.errors import ConfigError, check_choice, check_number, check_text
from rxllm.policies.store import Store
from rxllm.values import ConfigErrorMeta

__all__ = ["ChargedAt", "OnExhausted", "Quota", "Strategy", "parse_quotas"]

Strategy = Literal["sliding", "fixed", "bucket"]
ChargedAt = Literal["start", "end"]
OnExhausted = Literal["wait", "fail"]


class _Limited(msgspec.Struct, frozen=True, metaclass=ConfigErrorMeta):
    """The one field of a quota that is given by position."""

    limit: float


class Quota(_Limited, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """At most `limit` of `unit` in any `per` seconds.

    Args:
        limit: A number, or a text that says the unit and the seconds too, see `parse_quotas`.
        per: Seconds.
        unit: What is counted: "requests", "tokens", or a word of the caller's own.
        strategy: How the provider counts. "sliding": the sum over any `per` seconds. "fixed": a counter that falls to
            zero every `per` seconds. "bucket": what was used comes back by and by, `limit` every `per` seconds.
        margin: Seconds by which the window is kept longer than `per`, because requests arrive at the server
            at other distances than they left; None is 0.05 s, or a twentieth of a window below 1 s, and more when
            replies show that there is more jitter on the way, up to a quarter of the window.
        burst: What a bucket holds at most; None is `limit`. Only with the strategy "bucket".
        charged_at: When the provider counts an attempt: at its "start", or at its "end", when it knows what it used.
            With "end" an attempt on the wire holds what was reserved for it, however long it takes.
        on_exhausted: What happens to an attempt that does not fit: "wait" for as long as it takes, or "fail" with a
            `QuotaExhaustedError`, which ends the stream: those on the wire end as they do, nothing more is pulled.
        state: A file that keeps what was booked, so that a restart goes on where the last run ended. For one process:
            a second one is refused, by a lock that is a file beside it.
        store: Where several processes and machines keep it together: a `Store`, or its URL.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds, a text cannot be read or says what
            `per` or `unit` say already.

    >>> Quota("90_000 tokens/minute") == Quota(90_000, per=60.0, unit="tokens")
    True
    >>> print(Quota("10/0.1 seconds"))
    10 requests per 0.1 seconds
    """

    per: float = 0.0  # not given
    unit: str = ""  # not given: "requests", unless a text says another
    strategy: Strategy = "sliding"
    margin: float | None = None
    burst: float | None = None
    charged_at: ChargedAt = "start"
    on_exhausted: OnExhausted = "wait"
    state: str | None = None
    store: Store | None = None

    if TYPE_CHECKING:  # msgspec makes the constructor; a text is taken there but never stays in the field

        def __init__(
            self,
            limit: float | str,
            /,
            *,
            per: float = ...,
            unit: str = ...,
            strategy: Strategy = ...,
            margin: float | None = ...,
            burst: float | None = ...,
            charged_at: ChargedAt = ...,
            on_exhausted: OnExhausted = ...,
            state: str | os.PathLike[str] | None = ...,
            store: Store | str | None = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        limit, per, unit = self._given()
        if unit == "requests" and 0 < limit < 1:
            raise ConfigError(
                f"limit must be >= 1 for requests, got {limit!r}: no request would ever fit; "
                f"say 1 per {per / limit:g} seconds"
            )
        check_choice("strategy", self.strategy, get_args(Strategy))
        check_number("margin", self.margin, least=0, optional=True)
        if unit == "requests":
            check_number("burst", self.burst, least=1, optional=True)
        check_number("burst", self.burst, above=0, optional=True)
        if self.burst is not None and self.strategy != "bucket":
            raise ConfigError(f"burst must not be given without strategy='bucket', got {self.burst!r}")
        check_choice("charged_at", self.charged_at, get_args(ChargedAt))
        check_choice("on_exhausted", self.on_exhausted, get_args(OnExhausted))
        state, store = self._kept()
        fields = (("limit", limit), ("per", per), ("unit", unit), ("state", state), ("store", store))
        for name, value in fields:
            msgspec.structs.force_setattr(self, name, value)

    def __str__(self) -> str:
        """Return a text that reads back as the same limit, seconds and unit."""
        return f"{_written(self.limit)} {self.unit} per {_written(self.per)} seconds"

    @property
    def name(self) -> str:
        """A text for people, which says too what tells it apart from others of the same limit, seconds and unit.

        >>> Quota("500/minute", strategy="bucket", burst=10).name
        '500 requests per 60 seconds (bucket of 10)'
        """
        if self.strategy == "sliding":
            return str(self)
        burst = "" if self.burst is None else f" of {_written(float(self.burst))}"
        return f"{self} ({self.strategy}{burst})"

    @property
    def window(self) -> float:
        """Seconds for which a booking counts: `per` and the margin."""
        return self.per + self.grace

    @property
    def grace(self) -> float:
        """Seconds: the margin, or what it is if none is given."""
        return min(0.05, self.per / 20) if self.margin is None else self.margin

    def _kept(self) -> tuple[str | None, Store | None]:
        """Return the file and the store in which the bookings are kept; at most one of them."""
        state = os.fspath(self.state) if isinstance(self.state, os.PathLike) else self.state
        check_text("state", state, optional=True)
        store: object = Store(self.store) if isinstance(self.store, str) else self.store
        if store is not None and not isinstance(store, Store):
            raise ConfigError(f"store must be a Store or its URL, got {store!r}")
        if store is not None and state is not None:
            raise ConfigError("state must not be given besides a store, which keeps what was booked by itself")
        if store is not None and self.charged_at == "end":
            raise ConfigError(
                "charged_at must be 'start' with a store, which does not know what is on the wire elsewhere"
            )
        return state, store

    def _given(self) -> "_Rate":
        given: object = self.limit
        if not isinstance(given, str):
            check_number("limit", given, least=0)
            if self.per == 0 and not isinstance(self.per, bool):
                raise ConfigError(f"per must be given: Quota({given!r}, per=60.0), or a text: Quota('{given}/minute')")
            check_number("per", self.per, least=SHORTEST)
            return _Rate(float(self.limit), float(self.per), _counted(self.unit) or "requests")
        rates = _rates(given)
        if len(rates) > 1:
            raise ConfigError(f"limit must be one quota, got {given!r}: use parse_quotas for several")
        (rate,) = rates
        unit = _counted(self.unit)
        if self.per != 0:
            raise ConfigError(f"per must not be given besides a text, got {self.per!r} and {given!r}")
        if unit and rate.unit and unit != rate.unit:
            raise ConfigError(f"unit must not be given besides a text that says it, got {self.unit!r} and {given!r}")
        return rate._replace(unit=rate.unit or unit or "requests")


SHORTEST = 0.001  # seconds: no timer is finer


def parse_quotas(text: str) -> tuple[Quota, ...]:
    """Read quotas: `amount [unit] (/ | per) [number] period`, several of them separated by `;`, `,` or `|`.

    The amount and the number may have underscores, a fraction and an exponent. The unit is one word,
    "requests" if there is none; "request" and "token" are taken as plurals. The period is a second (sec), minute
    (min), hour, day, week, month (30 days) or year (360 days), or the plural. Capital letters and spaces do not
    matter. All that the `limits` package reads is read here, and means the same.

    Raises:
        ConfigError: The text cannot be read; the message says from where on.

    >>> [str(quota) for quota in parse_quotas("500/minute; 1_000 tokens per 10 seconds")]
    ['500 requests per 60 seconds', '1000 tokens per 10 seconds']
    >>> parse_quotas("500 every minute")
    Traceback (most recent call last):
    rxllm.errors.ConfigError: cannot read quota '500 every minute': expected '/' or 'per' at 'every minute'
    """
    if not isinstance(text, str):
        raise ConfigError(f"a quota's text must be a string, got {text!r}")
    return tuple(Quota(rate.limit, per=rate.per, unit=rate.unit) for rate in _rates(text))


class _Rate(NamedTuple):
    limit: float
    per: float
    unit: str  # "" if the text does not say


_PERIODS = {
    "second": 1,
    "sec": 1,
    "minute": 60,
    "min": 60,
    "hour": 3600,
    "day": 86_400,
    "week": 7 * 86_400,
    "month": 30 * 86_400,  # as in `limits`
    "year": 360 * 86_400,
}
_PLURALS = {
    "req": "requests",
    "reqs": "requests",
    "request": "requests",
    "token": "tokens",
}  # else the quota would count something that nobody books

_NUMBER = r"[0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?"
_AMOUNT = re.compile(rf"\s*({_NUMBER})", re.IGNORECASE)
_UNIT = re.compile(r"\s+(?!per\b)([a-z][a-z0-9_]*)(?=\s*/|\s+per)", re.IGNORECASE)  # "200k/minute" is no 200 of k
_EVERY = re.compile(r"\s*(?:/|per)\s*", re.IGNORECASE)
_PERIOD = re.compile(rf"({_NUMBER})?\s*([a-z]+)\s*", re.IGNORECASE)
_BETWEEN = re.compile(r":?[,;|]")  # `limits` takes the colon, by accident
_WORD = re.compile(r"[a-z][a-z0-9_]*")


def _rates(text: str) -> list[_Rate]:
    """Return what the text says, part by part."""
    ends = [found.span() for found in _BETWEEN.finditer(text)]
    starts = [0, *(after for _, after in ends)]
    stops = [*(before for before, _ in ends), len(text)]
    return [_rate(text, start, stop) for start, stop in zip(starts, stops, strict=True)]


def _rate(text: str, start: int, stop: int) -> _Rate:
    amount = _AMOUNT.match(text, start, stop)
    if amount is None:
        _refuse(text, "a number", start)
    named = _UNIT.match(text, amount.end(), stop)
    unit, end = (_counted(named[1].lower()), named.end()) if named else ("", amount.end())
    every = _EVERY.match(text, end, stop)
    if every is None:
        _refuse(text, "'/' or 'per'", end)
    period = _PERIOD.match(text, every.end(), stop)
    name = period[2].lower() if period else ""
    seconds = _PERIODS.get(name) or _PERIODS.get(name.removesuffix("s"))
    if period is None or seconds is None:
        _refuse(text, "second, minute, hour, day, week, month or year", period.start(2) if period else every.end())
    if period.end() != stop:
        _refuse(text, "the end, or ';'", period.end())
    limit = float(amount[1])
    if math.isinf(limit):
        _refuse(text, "a finite number", amount.start(1))
    # `limits` reads 0 periods as 1
    per = seconds * (float(period[1] or 1) or 1.0)
    if not SHORTEST <= per < math.inf:
        _refuse(text, f"at least {SHORTEST} seconds, and finitely many,", every.end())
    return _Rate(limit, per, unit)


def _refuse(text: str, wanted: str, at: int) -> NoReturn:
    at += len(text[at:]) - len(text[at:].lstrip())
    rest = text[at : at + 20]
    place = repr(f"{rest}..." if at + 20 < len(text) else rest) if rest else "the end"
    raise ConfigError(f"cannot read quota {text!r}: expected {wanted} at {place}")


def _counted(unit: object) -> str:
    """Return the unit as quotas name it; "" stays."""
    if not isinstance(unit, str) or (unit and _WORD.fullmatch(unit) is None):
        raise ConfigError(f"unit must be a word of small letters, digits and underscores, got {unit!r}")
    return _PLURALS.get(unit, unit)


def _written(number: float) -> str:
    return str(int(number)) if number.is_integer() else repr(number)
