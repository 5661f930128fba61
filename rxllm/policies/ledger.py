"""All quotas of one key as one: a cost is booked in all of them, or in none."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, TypeVar

import msgspec

from rxllm.errors import ConfigError, InvalidRequestError, QuotaExhaustedError, check_number
from rxllm.policies.accounting import GENERIC
from rxllm.policies.jitter import PathJitter
from rxllm.policies.quota import SHORTEST, Quota
from rxllm.policies.sharing import kept_beside, part_of
from rxllm.policies.window import WindowGuess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rxllm.policies.accounting import Accounting, Ending
    from rxllm.policies.headers import Limits, Truth
    from rxllm.policies.meters import Meter
    from rxllm.policies.sliding import Ticket

__all__ = ["Ledger", "QuotaStatistics"]

UNPAID = ("unsent", "refused")  # what may cost less than was reserved although the provider says nothing
NUMBERS = frozenset({float, int})
FULL = 0.05  # of the limit: with less than that left a quota may be what refused
NEAR = 0.02  # a window that is found to be so near to the one that is held changes nothing
T = TypeVar("T")
LEARNED = frozenset({"requests", "tokens", "input_tokens", "output_tokens"})  # units of which costs are known


class QuotaStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """How full one quota is."""

    quota: Quota
    available: float  # in its unit; below zero it is a debt
    learned: bool  # from the headers of replies: nobody stated it


class Ledger:
    """The quotas of a key, their meters, and what the provider's headers say of them.

    Amounts are tuples in the order of the quotas. Quotas that headers state come at the end; amounts that were made
    before are shorter then, and cost nothing there.

    Args:
        quotas: what the user states, each in full.
        share: the part of each that is ours.
        accounting: how the provider counts.
        make: quota, most -> its meter, as `policies.meter`.
    """

    __slots__ = (
        "_accounting",
        "_always",
        "_guesses",
        "_jitter",
        "_make",
        "_matches",
        "_paths",
        "malformed",
        "meters",
        "names",
        "quotas",
        "stated",
        "units",
    )

    def __init__(
        self,
        quotas: Iterable[Quota],
        *,
        share: float,
        accounting: Accounting,
        make: Callable[[Quota, float | None], Meter],
    ) -> None:
        self._accounting = accounting
        self._make = make
        self.quotas = tuple(part_of(one, share) for quota in quotas for one in accounting.quotas(quota))
        self.meters = tuple(make(quota, None) for quota in self.quotas)
        self.units = tuple(quota.unit for quota in self.quotas)
        self.names = tuple(quota.name for quota in self.quotas)
        self.stated = len(self.quotas)  # those after them were learned from headers
        self._always = bool(accounting.cells) or any(quota.charged_at == "end" for quota in self.quotas)
        self._matches: dict[tuple[str, float | None], int | None] = {}  # what a header says -> which quota it is about
        self._guesses: dict[int, WindowGuess] = {}  # of learned quotas whose seconds nobody states
        self._paths = PathJitter()
        self._jitter = 0.0  # seconds, as the meters have it
        self.malformed = 0

    @property
    def rate(self) -> float:
        """Requests per second that the quotas of requests allow; infinity without one."""
        return min((quota.limit / quota.per for quota in self.quotas if quota.unit == "requests"), default=math.inf)

    def renew(self) -> None:
        """Begin anew, with nothing booked."""
        self.meters = tuple(
            self._make(quota, None if number < self.stated else math.inf) for number, quota in enumerate(self.quotas)
        )

    def keep(self, path: str) -> None:
        """Begin anew, with long quotas kept in files beside `path`."""
        self.quotas = tuple(kept_beside(quota, path) for quota in self.quotas)
        self.renew()

    def statistics(self, now: float) -> tuple[QuotaStatistics, ...]:
        """Return how full the quotas are; from any thread."""
        return tuple(
            QuotaStatistics(quota=quota, available=gauge.available(now), learned=number >= self.stated)
            for number, (quota, gauge) in enumerate(zip(self.quotas, self.meters, strict=False))
        )

    def fill(self, now: float) -> dict[str, float]:
        """Return which share of each quota is used, by name; from any thread."""
        found: dict[str, float] = {}
        for name, quota, gauge in zip(self.names, self.quotas, self.meters, strict=False):
            holds = gauge.limit if quota.burst is None else quota.burst
            found[name] = 1.0 - gauge.available(now) / holds if holds else 1.0
        return found

    # an attempt

    def amounts(self, cost: Mapping[str, float]) -> tuple[float, ...]:
        """Return what `cost` (unit -> amount; one request unless it says otherwise) takes of each quota.

        Raises:
            ConfigError: a quota counts a unit that the cost does not name, so it could not be kept; or a bad amount.
            InvalidRequestError: more than a quota can ever admit.
        """
        found: list[float] = []
        for unit, gauge, name in zip(self.units, self.meters, self.names):  # noqa: B905  made together; this is hot
            amount = cost.get(unit, 1.0 if unit == "requests" else None if len(found) < self.stated else 0.0)
            if amount is not None and type(amount) in NUMBERS and amount >= 0 and not gauge.too_large(amount):
                found.append(amount)
                continue
            if amount is None:
                msg = f"the quota {name} counts {unit}, and the cost names only {', '.join(cost) or 'nothing'}"
                error = ConfigError(msg)
                error.halts = True  # no cost will name it
                raise error
            if type(amount) not in NUMBERS or not 0 <= amount <= sys.float_info.max:
                check_number(f"the cost in {unit}", amount, least=0)
            if gauge.too_large(amount):
                msg = f"needs {amount:,g} {unit}, and the quota {name} never admits more than {gauge.limit:,g}"
                raise InvalidRequestError(msg)
            found.append(amount)
        return tuple(found)

    def full(self, amounts: tuple[float, ...], now: float) -> int | None:
        """Return the number of the first quota that has no room for `amounts` now."""
        for gauge, amount in zip(self.meters, amounts):  # noqa: B905  some may be learned since; this is hot
            if amount and not gauge.fits(amount, now):
                return self.meters.index(gauge)
        return None

    def refusal(self, number: int, amount: float, now: float) -> InvalidRequestError | QuotaExhaustedError | None:
        """Return the error of who does not fit into quota `number` now and shall not wait for it; None: it waits."""
        gauge, quota = self.meters[number], self.quotas[number]
        if gauge.too_large(amount):  # the server has lowered it
            msg = f"needs {amount:,g} {quota.unit}, and the server now admits at most {gauge.limit:,g} at a time"
            return InvalidRequestError(msg)
        if quota.on_exhausted == "wait":
            return None
        seconds = gauge.ready_at(amount, now) - now
        if seconds == math.inf:  # a store is asked, or an attempt must end first
            return None
        return QuotaExhaustedError(f"the quota {self.names[number]} is used up for {seconds:,.1f} s", None, seconds)

    def book(self, amounts: tuple[float, ...], now: float) -> list[Ticket]:
        """Book `amounts`, whether they fit or not; return a ticket for each quota."""
        return [gauge.book(amount, now) for gauge, amount in zip(self.meters, amounts)]  # noqa: B905  as above

    def settle(
        self,
        amounts: tuple[float, ...],
        tickets: list[Ticket],
        ending: Ending,
        used: Mapping[str, float] | None,
        now: float,
        *,
        sent: float,
    ) -> None:
        """Make the bookings what the attempt really cost.

        Args:
            amounts: what was booked.
            tickets: what `book` returned.
            ending: how the attempt ended.
            used: unit -> what the provider says it used; a unit that is missing is unknown.
            now: when it ended.
            sent: when it was admitted.
        """
        if ending == "refused":
            self._refused(amounts, now, sent)
        for unit, gauge, amount, ticket in zip(self.units, self.meters, amounts, tickets):  # noqa: B905  as above
            actual = None if used is None else used.get(unit)
            if actual is not None or ending in UNPAID or self._always:
                actual = self._accounting.charge(ending, unit, amount, actual)
                if actual != amount or self._always:
                    gauge.settle(ticket, actual, now)

    def _refused(self, amounts: tuple[float, ...], now: float, sent: float) -> None:
        """Learn from a refusal although there was room: if nobody else uses a quota, its requests came too close.

        Or it was refused for another reason, which nobody tells: so this does little more than double the margin.
        """
        for quota, gauge, amount in zip(self.quotas, self.meters, amounts):  # noqa: B905  as above
            available = gauge.available(now)
            alone = gauge.limit - available <= gauge.booked(now)
            margin = max(quota.grace, self._jitter)
            wide = quota.margin is not None or margin >= 2 * quota.grace
            if not wide and amount and alone and available < FULL * gauge.limit:
                self._reckon(self._paths.refused(margin, now, sent=sent))

    def _reckon(self, jitter: float) -> None:
        """Have the quotas whose margin nobody has stated keep it as large as the jitter."""
        if self._jitter < jitter or jitter < self._jitter / 2:
            self._jitter = jitter
            for quota, gauge in zip(self.quotas, self.meters, strict=True):
                if quota.margin is None:
                    gauge.widen(jitter)

    def weigh(self, amounts: tuple[float, ...]) -> float:
        """Return how many seconds of the scarcest quota `amounts` take; 1.0 without a quota."""
        if not amounts:
            return 1.0
        rows = zip(self.quotas, self.meters, amounts)  # noqa: B905  some may be learned since
        return max(amount * quota.per / gauge.limit if gauge.limit else 0.0 for quota, gauge, amount in rows)

    # what the server says

    def observe(self, limits: Limits, sent: float, now: float) -> list[Quota]:
        """Take over what the headers of a reply say; return the quotas that are new.

        Args:
            limits: what they say.
            sent: when its attempt was admitted.
            now: when the reply came.
        """
        learned: list[Quota] = []
        if limits.processing is not None:
            self._reckon(self._paths.add(now - sent - limits.processing, now))
        for truth in limits.truths:
            number = self._about(truth, learned)
            if number is not None and truth.least is not None:
                guess = self._guesses.get(number)
                if guess is not None:
                    self._measure(number, guess, truth, truth.least, learned)
                self.meters[number].rebase(truth.least, truth.reset, now, limit=truth.limit, sent=sent)
        return learned

    def _about(self, truth: Truth, learned: list[Quota]) -> int | None:
        """Return which quota a statement is about; one that is new becomes one, if its unit is that of costs."""
        key = (truth.unit, truth.window)
        if key in self._matches:
            return self._matches[key]
        same = [number for number, quota in enumerate(self.quotas) if quota.unit == truth.unit]
        wanted = self._accounting.window(truth.unit) if truth.window is None else truth.window
        fitting = [number for number in same if truth.window is None or math.isclose(self.quotas[number].per, wanted)]
        number: int | None = None
        if fitting:
            number = min(fitting, key=lambda number: abs(self.quotas[number].per - wanted))
        elif not same and truth.unit in LEARNED and truth.limit is not None:
            strategy = "bucket" if self._accounting is GENERIC else self._accounting.strategy  # no stricter than any
            if truth.window is None and strategy == "bucket" and not self._accounting.windows:
                self._guesses[len(self.quotas)] = WindowGuess()
            quota = Quota(truth.limit, per=wanted, unit=truth.unit, strategy=strategy)
            learned.append(quota)
            number = self._learn(quota)
        elif truth.limit is None:
            return None  # a later reply may say more
        self._matches[key] = number
        return number

    def _measure(self, number: int, guess: WindowGuess, truth: Truth, remaining: float, learned: list[Quota]) -> None:
        """Correct the seconds of a learned quota that the server does not state."""
        quota = self.quotas[number]
        per = guess.note(truth.limit or quota.limit, remaining, truth.reset)
        if per is not None and not math.isclose(per, quota.per, rel_tol=NEAR):
            quota = msgspec.structs.replace(quota, per=max(SHORTEST, per))
            learned.append(quota)
            self.quotas = _with(self.quotas, number, quota)
            self.meters = _with(self.meters, number, self._make(quota, math.inf))
            self.names = _with(self.names, number, quota.name)

    def _learn(self, quota: Quota) -> int:
        """Keep a quota that only the server has stated."""
        self.quotas = (*self.quotas, quota)
        self.meters = (*self.meters, self._make(quota, math.inf))
        self.units = (*self.units, quota.unit)
        self.names = (*self.names, quota.name)
        return len(self.quotas) - 1


def _with(values: tuple[T, ...], number: int, value: T) -> tuple[T, ...]:
    return (*values[:number], value, *values[number + 1 :])
