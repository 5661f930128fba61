"""Quotas that processes and machines keep together, in Redis, Valkey, Memcached or MongoDB.

    Gate ── fits, book, settle ──▶ SharedMeter ── LocalLease (units in hand)
                                       │ one request at a time, ahead of need
                                       ▼
                                  backends: Redis or Valkey, a script of ours (`scripts`)
                                            Memcached or MongoDB, a counter of `limits`

An attempt is admitted from what is in hand, without a word to the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import uuid
from typing import TYPE_CHECKING, Any

import msgspec

from rxllm.clock import LoopClock
from rxllm.errors import ConfigError, StoreError
from rxllm.events import StoreChanged
from rxllm.policies.local_lease import Ask, LocalLease
from rxllm.policies.meters import LocalMeter, meter
from rxllm.policies.quota import Quota
from rxllm.policies.sharing import PART, at_most, kept_for, lease_life, part_of
from rxllm.policies.sliding import WIDEST, Ticket
from rxllm.runtime import LoopLocal, uniform
from rxllm.stores.backends import ANSWER, LONGEST_BACKOFF, Backend, connect, prepare

if TYPE_CHECKING:
    from collections.abc import Callable

    from rxllm.clock import Clock, Handle
    from rxllm.errors import CallError
    from rxllm.policies.store import Store

__all__ = ["SharedMeter", "shared_meter"]

BACKOFF = 0.1  # seconds after the first failure; each further one doubles it
SLOT_BITS = 40  # of a ticket, for the slot of our own meter; the others are the lease's number

_log = logging.getLogger("rxllm.stores")


def shared_meter(quota: Quota) -> SharedMeter:
    """Return the meter of a quota with a store.

    Raises:
        ConfigError: the store cannot keep that quota, or a package is missing.
    """
    store = quota.store
    if store is None:
        msg = f"store must be given for a shared quota, got {quota!r}"
        raise ConfigError(msg)
    prepare(quota, store)
    return SharedMeter(quota, store)


class SharedMeter:
    """A meter that spends leases of a store; see `Meter` and `OutsideMeter` for the methods.

    Args:
        quota: what it counts.
        store: where.
    """

    __slots__ = (
        "__weakref__",
        "_clock",
        "_closed",
        "_down",
        "_fail",
        "_failures",
        "_is_failing",
        "_lease",
        "_link",
        "_own",
        "_quota",
        "_reason",
        "_share",
        "_store",
        "_task",
        "_tell",
        "_timer",
        "_wake",
        "limit",
        "requests",
    )

    def __init__(self, quota: Quota, store: Store) -> None:
        self._quota = quota
        self._store = store
        self.limit = quota.limit
        self.requests = 0  # to the store, all of them
        self._share = None if isinstance(store.unreachable, str) else float(store.unreachable)
        self._own = None if self._share is None else _alone(quota, self._share)
        self._link: LoopLocal[Backend] = LoopLocal(lambda: connect(quota, store), _close)
        self._clock: LoopClock | None = None
        self._wake: Callable[[], object] = _nothing
        self._fail: Callable[[CallError], object] = _nothing
        self._tell: Callable[[StoreChanged], object] = _nothing
        self._task: asyncio.Task[None] | None = None
        self._timer: Handle | None = None
        self._down = False  # the last request was not answered
        self._failures = 0  # in a row
        self._reason = ""
        self._is_failing = False  # those that wait are turned away in the next turn
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        """Begin with nothing in hand, as a client that the store does not know."""
        quota = self._quota
        life = lease_life(quota)
        scripted = self._store.scripted
        self._lease = LocalLease(
            uuid.uuid4().hex[:16],
            limit=at_most(quota, self.limit),
            life=life,
            keep=kept_for(quota),
            size=self.limit * life / quota.window if scripted else max(1.0, self.limit // PART),
            returns=scripted,
            nameless=quota.strategy == "bucket",
        )

    # the bookings

    def too_large(self, cost: float) -> bool:
        """Say whether `cost` fits at no time."""
        return cost > at_most(self._quota, self.limit)

    def fits(self, cost: float, now: float) -> bool:
        """Say whether `cost` may be booked now; if not, the store is asked for more, and `wake` says when it came."""
        lease = self._lease
        if cost <= lease.hand and now < lease.until:
            return True
        own = self._own
        if own is not None and self._down:
            self._try(now)
            return own.fits(cost, now)
        lease.needed = max(lease.needed, cost)
        self._try(now)
        return False

    def book(self, cost: float, now: float) -> Ticket:
        """Book `cost`, whether it fits or not; return what `settle` or `refund` take once."""
        lease = self._lease
        own = self._own
        if own is not None:
            slot = own.book(cost, now)[0]
            number = lease.book_aside(cost, now) if self._down else lease.book(cost, now)
            number = number << SLOT_BITS | slot
        else:
            number = lease.book(cost, now)
        if lease.hand <= lease.low and lease.is_steady and not self._down:
            self._try(now)
        return (number, cost)

    def settle(self, ticket: Ticket, actual: float, now: float) -> None:
        """Make `actual` of the cost that was booked."""
        number, cost = ticket
        own = self._own
        if own is not None:
            own.settle((number & (1 << SLOT_BITS) - 1, cost), actual, now)
            number >>= SLOT_BITS
        self._lease.settle(number, actual - cost, now)

    def refund(self, ticket: Ticket, now: float) -> None:
        """Undo a booking."""
        self.settle(ticket, 0.0, now)

    def available(self, now: float) -> float:
        """Return what is in hand and what the store had left when it last answered."""
        if self._own is not None and self._down:
            return self._own.available(now)
        lease = self._lease
        return min(self.limit, lease.hand_at(now) + lease.room) - lease.debt

    def booked(self, now: float) -> float:
        """Return what was leased here and used, or not yet given back, and counts."""
        return self._lease.booked(now)

    def next_expiry(self, now: float) -> float | None:
        """Return when something that was leased here counts no more; None if nothing does."""
        ends = [entry.ends for entry in list(self._lease.entries.values()) if entry.ends > now and entry.amount]
        return min(ends, default=None)

    def ready_at(self, cost: float, now: float) -> float:
        """Return when it is worth asking again; infinity while the store is being asked, since `wake` says it then."""
        if self.too_large(cost):
            return math.inf
        lease = self._lease
        if cost <= lease.hand and now < lease.until:
            return now
        at = lease.next_ask if lease.next_ask > now and self._task is None else math.inf
        if self._own is not None and self._down:
            return min(at, self._own.ready_at(cost, now))
        return at

    @property
    def is_asking(self) -> bool:
        """Whether the store is being asked: what does not fit now may fit in a moment."""
        return self._task is not None

    def rebase(
        self,
        remaining: float,
        reset: float | None,
        now: float,
        *,
        limit: float | None = None,
        pending: float = 0.0,
        sent: float | None = None,
    ) -> None:
        """Take over what the server says; it can only make the limit smaller, and what is in hand.

        What others use of the key takes from what is in hand here: that stays booked in the store, so all who share
        see it.
        """
        lease = self._lease
        if limit is not None:
            self.limit = min(limit, self._quota.limit)
            lease.limit = at_most(self._quota, self.limit)
        lease.cut(max(0.0, remaining))
        if self._own is not None and self._share is not None:
            part = None if limit is None else limit * self._share
            self._own.rebase(remaining, reset, now, limit=part, pending=pending, sent=sent)

    def widen(self, margin: float) -> None:
        """Reckon with `margin` seconds of jitter; the store learns it with the next request."""
        self._lease.widen(max(0.0, min(margin, self._quota.per / WIDEST) - self._quota.grace))
        if self._own is not None:
            self._own.widen(margin)

    # the life on a loop

    def bind(
        self,
        clock: Clock,
        *,
        wake: Callable[[], object],
        fail: Callable[[CallError], object],
        tell: Callable[[StoreChanged], object],
    ) -> None:
        """Live on the loop of `clock` from now on, with nothing in hand; a lease of another loop expires by itself.

        Raises:
            ConfigError: virtual time, in which no store lives; or an environment variable of its URL is not set.
        """
        if not isinstance(clock, LoopClock):
            msg = f"a quota with a store needs a running loop: {self._store!r} cannot be used on {clock!r}"
            raise ConfigError(msg)
        self._store.address()  # raises
        if self._clock is not None and self._clock is not clock:
            self._leave(self._clock)
            untold = sum(amount for _, amount, _ in self._lease.untold(clock.seconds()))
            owed = self._lease.debt + untold
            self._begin()
            self._lease.debt = owed
        self._clock = clock
        self._wake, self._fail, self._tell = wake, fail, tell

    def _leave(self, clock: LoopClock) -> None:
        """Let go of the loop it was on; a request on its way there ends there, and nobody looks at its answer."""
        if self._timer is not None:
            clock.post(self._timer.cancel)
            self._timer = None
        self._task = None
        self._down = False
        self._failures = 0
        self._is_failing = False
        self._link.close_all()

    def close(self) -> None:
        """Give back what is in hand, and leave nothing open. It takes one request, for 2 s at most."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._clock is not None and self._task is None and not self._clock.loop.is_closed():
            self._start(self._farewell(self._clock, self._lease))

    def _try(self, now: float) -> None:
        """Ask for the next lease, if that is of any use now."""
        if self._task is not None or self._closed or self._clock is None:
            return
        if now >= self._lease.next_ask:
            self._send(now)
        elif self._down and self._store.unreachable == "fail":
            self._turn_away_soon(self._clock)

    def _send(self, now: float, *, stop: bool = False) -> None:
        assert self._clock is not None  # noqa: S101  it is bound
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lease = self._lease
        self._start(self._ask(self._clock, lease, lease.ask(now, stop=stop)))

    def _start(self, work: Any) -> None:
        assert self._clock is not None  # noqa: S101  it is bound
        self._task = self._clock.loop.create_task(work)

    async def _ask(self, clock: LoopClock, lease: LocalLease, ask: Ask) -> None:
        """Send one request; after that it is worth looking again, whatever the answer is."""
        error = await self._exchange(clock, lease, ask)
        if lease is not self._lease:
            return  # it lives on another loop now
        now = clock.seconds()
        if error is None:
            self._answered(clock, now)
        else:
            self._unanswered(error, clock, now)
        if self._closed:
            await self._farewell(clock, lease)
            return
        self._task = None
        if error is None and lease.returns and lease.refresh_at > now:
            self._timer = clock.call_later(lease.refresh_at - now, self._refresh)
        self._wake()

    async def _exchange(self, clock: LoopClock, lease: LocalLease, ask: Ask) -> str | None:
        """Send a request and take its answer; return what went wrong."""
        self.requests += 1
        try:
            async with asyncio.timeout(ANSWER):
                grant = await self._link.get(clock.loop).exchange(lease, ask, self.limit)
        except asyncio.CancelledError:  # the loop ends
            await self._hang_up(clock)
            if lease is self._lease:
                lease.drop()
                self._task = None
            raise
        except Exception as error:  # the clients of stores raise what they like
            reason = self._store.scrub(f"{type(error).__name__}: {error}".removesuffix(": "))
        else:
            lease.take(ask, grant, clock.seconds())
            return None
        lease.lost(ask)
        await self._hang_up(clock)  # it may be half-way through an answer
        return reason

    async def _hang_up(self, clock: LoopClock) -> None:
        with contextlib.suppress(Exception):
            await self._link.close(clock.loop)

    async def _farewell(self, clock: LoopClock, lease: LocalLease) -> None:
        """Give back what others can use, and close the connection."""
        if lease.owes and not self._down:
            await self._exchange(clock, lease, lease.ask(clock.seconds(), stop=True))
        await self._hang_up(clock)
        if lease is self._lease:
            lease.drop()
            self._task = None

    def _refresh(self) -> None:
        """Before the lease ends: take the next one, if it will be used, else give this one back."""
        self._timer = None
        if self._task is None and not self._closed and self._clock is not None:
            lease = self._lease
            if lease.is_steady and lease.hand > 0:
                self._send(self._clock.seconds())
            elif lease.owes:
                self._send(self._clock.seconds(), stop=True)

    def _answered(self, clock: LoopClock, now: float) -> None:
        self._failures = 0
        if self._down:
            self._down = False
            _log.info("%s answers again", self._store.shown)
            self._say(clock, now, reachable=True, reason="it answers again")

    def _unanswered(self, reason: str, clock: LoopClock, now: float) -> None:
        """Wait before the next request, and say so once."""
        delay = min(LONGEST_BACKOFF, BACKOFF * 2.0 ** min(self._failures, 10))
        self._failures += 1
        self._lease.next_ask = now + uniform(delay / 2, delay)
        self._reason = f"the store {self._store.shown} does not answer: {reason}"
        if not self._down:
            self._down = True
            _log.warning("%s; until it does: %s", self._reason, self._store.unreachable)
            self._say(clock, now, reachable=False, reason=self._reason)
        if self._own is not None:
            self._lease.drop()
        elif self._store.unreachable == "fail":
            self._turn_away_soon(clock)

    def _say(self, clock: LoopClock, now: float, *, reachable: bool, reason: str) -> None:
        """Tell it in a turn of its own, so that whoever listens cannot end a request of ours."""
        event = StoreChanged(at=now, quota=self._quota, reachable=reachable, reason=reason)
        clock.call_soon(lambda: self._tell(event))

    def _turn_away_soon(self, clock: LoopClock) -> None:
        if not self._is_failing:
            self._is_failing = True
            clock.call_soon(self._turn_away)

    def _turn_away(self) -> None:
        self._is_failing = False
        if self._down and not self._closed:
            self._fail(StoreError(self._reason))


def _alone(quota: Quota, share: float) -> LocalMeter:
    """Return the meter of one that goes on without the store, with its share of the quota."""
    return meter(msgspec.structs.replace(part_of(quota, share), store=None))


async def _close(backend: Backend) -> None:
    await backend.close()


def _nothing(*_: object) -> None:
    """Stand in for what `bind` brings."""
