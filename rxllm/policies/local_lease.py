"""What one process holds of a quota that it shares: a state machine without I/O.

    store ──grant──▶ units in hand ──book──▶ attempts
      ▲                   │ what is left, when its time is over or the next grant comes
      └──────close────────┘ and what settlements gave back since

A lease is units that may be spent until its time is over. The store counts them from that moment on, so it never counts
them before they were spent. When the process has spent the last one it tells the store when that was, with its next
request, and the store counts from then on: still never too early, and a short lease costs no part of the window.
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Ask", "Grant", "LocalLease"]

LEAD = 0.25  # of a lease's time: so long before its end the next one is asked for, at least
LATEST = 0.75  # of a lease's time: where that is at most, however slow the store is
LOW = 0.25  # of a lease: when so much is left the next one is asked for
SPACING = 0.75  # of a lease's time: between two requests when there is not enough for all
STEADY = 2  # bookings that make a flow: fewer are not worth a lease in advance
MOST = 1_000  # leases that one request corrects; the others come with the next one


class Ask(NamedTuple):
    """One request to the store."""

    number: int  # of the lease that it may give
    sent: float  # when: local steady seconds
    closing: tuple[tuple[int, float, float], ...]  # lease, units that come back, seconds by which it counts earlier
    carry: float  # units still in hand, which the new lease takes over
    debt: float  # units used already, to be counted whether they fit or not
    least: float  # fewer are of no use
    wanted: float  # units at most, besides those carried over; 0: none


class Grant(NamedTuple):
    """What the store said."""

    units: float
    room: float  # what was left for others
    hint: float  # seconds after which it is worth asking again, when there was not enough
    life: float  # seconds since the request was sent in which the lease can be used


class _Entry:
    """What the store counts, or should, of what was spent here."""

    __slots__ = ("amount", "ends", "known")

    def __init__(self, amount: float, ends: float, *, known: bool) -> None:
        self.amount = amount
        self.ends = ends  # when it counts no more, at the latest
        self.known = known  # to the store


class LocalLease:
    """What is in hand, how much to ask for next, and when.

    `now` is in steady seconds of one clock. At most one request is on its way: `ask` begins it, and `take` or `lost`
    end it.

    Args:
        client: a name for the holder that nobody else has.
        limit: most units that a lease can be worth.
        life: seconds that a lease lives.
        keep: seconds for which the store counts what was spent.
        size: units that the first request asks for.
        returns: whether the store takes back what was not used.
        nameless: whether it takes back what it cannot tell to a lease any more, as a bucket can.
    """

    __slots__ = (
        "_aside",
        "_aside_ends",
        "_count",
        "_is_untold",
        "_later",
        "_open",
        "_returned",
        "_sent",
        "_total",
        "client",
        "debt",
        "entries",
        "extra",
        "generation",
        "hand",
        "keep",
        "last",
        "life",
        "limit",
        "low",
        "nameless",
        "needed",
        "next_ask",
        "number",
        "returns",
        "room",
        "round_trip",
        "scarce",
        "size",
        "spends",
        "until",
        "waits",
    )

    def __init__(
        self,
        client: str,
        *,
        limit: float,
        life: float,
        keep: float,
        size: float,
        returns: bool = True,
        nameless: bool = False,
    ) -> None:
        self.client = client
        self.generation = ""  # of the store's memory, as it named it; "": it was not asked yet
        self.limit = limit
        self.life = life
        self.keep = keep
        self.extra = 0.0  # seconds for which the store counts from later on: jitter beyond the margin
        self.returns = returns
        self.nameless = nameless
        self.size = size  # units to have in hand after the next grant
        self.hand = 0.0
        self.until = -math.inf  # when what is in hand may be used no more
        self.number = 0  # of the lease in hand; bookings carry it
        self.debt = 0.0  # used, and not yet counted by the store
        self.needed = 0.0  # what did not fit since the last request
        self.next_ask = -math.inf  # before that a request would be of no use
        self.low = 0.0  # below that the next lease is asked for
        self.waits = False  # the store keeps a place for what it could not grant
        self.scarce = False  # the last grant was less than what was wanted
        self.last = -math.inf  # when something was last booked
        self.spends = 0  # bookings since the last grant
        self.room = limit  # what the store had left when it last answered
        self.round_trip = 0.0  # seconds, the longest lately
        self.entries: dict[int, _Entry] = {}  # by number: those that count
        self._returned: dict[int, float] = {}  # by number: given back by settlements, not yet told
        self._later: dict[int, float] = {}  # by number: seconds by which it shall count for longer, not yet told
        self._count = 0
        self._open = False  # whether what comes back goes into the hand: it is not being closed
        self._sent = 0.0  # when the request for the lease in hand was sent
        self._total = 0.0  # what it began with
        self._aside = 0  # number of the entry for what is booked without the store
        self._aside_ends = -math.inf  # when that makes room for another one
        self._is_untold = False  # whether there is an entry that the store does not know

    # the bookings

    def fits(self, cost: float, now: float) -> bool:
        """Say whether `cost` may be booked now."""
        return cost <= self.hand and now < self.until

    def book(self, cost: float, now: float) -> int:
        """Book `cost`; what is not in hand becomes a debt. Return the number of the lease."""
        if now >= self.until:
            self.debt += cost
            return self.number
        self.hand -= cost
        self.last = now
        self.spends += 1
        if self.hand < 0:
            self.debt -= self.hand
            self.hand = 0.0
        return self.number

    def book_aside(self, cost: float, now: float) -> int:
        """Book `cost` without a lease, to be told later; return the number to settle it with."""
        if now >= self._aside_ends:
            self._count += 1
            self._aside = self._count
            self._aside_ends = now + self.life
            self.entries[self._aside] = _Entry(0.0, self._aside_ends + self.extra + self.keep, known=False)
        self.entries[self._aside].amount += cost
        self._is_untold = True
        return self._aside

    def settle(self, number: int, change: float, now: float) -> None:
        """Make a booking larger by `change`, or smaller if it is below zero."""
        if change > 0:
            if now < self.until:
                taken = min(change, self.hand)
                self.hand -= taken
                self.last = now
                change -= taken
            self.debt += change
        elif number == self.number and self._open and now < self.until:
            self.hand -= change
        else:
            self._give_back(number, -change, now)

    def _give_back(self, number: int, amount: float, now: float) -> None:
        """Note what a settlement gave back of a lease that is over."""
        entry = self.entries.get(number)
        if entry is None or now >= entry.ends:
            return  # it counts no more
        amount = min(amount, entry.amount)
        entry.amount -= amount
        if entry.known and self.returns and amount:
            key = 0 if self.nameless else number
            self._returned[key] = self._returned.get(key, 0.0) + amount

    def widen(self, extra: float) -> None:
        """Have the store count everything for `extra` seconds longer than `keep`, also what was spent already.

        Less than before holds for what is spent from now on.
        """
        change, self.extra = extra - self.extra, extra
        if change > 0 and self.returns:
            for number, entry in self.entries.items():
                entry.ends += change
                if entry.known:
                    self._later[number] = self._later.get(number, 0.0) + change

    def cut(self, most: float) -> None:
        """Have at most so much in hand: others use the quota. What is taken away stays counted."""
        self.hand = min(self.hand, most)

    def drop(self) -> None:
        """Use the lease no more, and leave it to expire."""
        self.hand = 0.0
        self.until = -math.inf
        self._open = False

    # the requests

    @property
    def is_steady(self) -> bool:
        """Whether there is a flow that will use another lease."""
        return self.spends >= STEADY

    @property
    def owes(self) -> bool:
        """Whether there is something to tell the store, so that others can use it or do not."""
        back = bool(self._returned or self._later) or (self._open and self.returns and self.hand > 0)
        return back or self.debt > 0 or self._is_untold or self.waits

    @property
    def refresh_at(self) -> float:
        """When to ask for the next lease, or to give this one back."""
        return self.until - min(max(LEAD * self.life, 2 * self.round_trip), LATEST * self.life)

    def ask(self, now: float, *, stop: bool = False) -> Ask:
        """Return the next request.

        Args:
            now: when it is sent.
            stop: give all back and ask for nothing.
        """
        self._resize(now)
        live = now < self.until
        keeps = not stop and ((live and self.needed <= self.hand) or not self.returns)
        closing = self._close(live=live)
        carry = self.hand if keeps and live and self.returns else 0.0
        if not keeps:
            self.drop()
        self._correct(closing, now)
        self._count += 1
        least = 0.0 if stop else max(0.0, self.needed - (self.hand if live and keeps else 0.0))
        wanted = 0.0 if stop else max(least, self.size - (self.hand if live and keeps else 0.0))
        self.needed = 0.0
        return Ask(self._count, now, tuple(closing), carry, self.debt, least, wanted)

    def take(self, ask: Ask, grant: Grant, now: float) -> None:
        """Take the answer to a request."""
        self.debt = max(0.0, self.debt - ask.debt)
        self.round_trip = max(now - ask.sent, 0.9 * self.round_trip)
        self.room = grant.room
        self.waits = self.returns and ask.least > 0 and not grant.units
        self.scarce = grant.units < ask.wanted
        self.needed = 0.0  # whoever waits asks again
        told = ask.carry + grant.units + ask.debt
        if told > 0:
            self.entries[ask.number] = _Entry(told, now + grant.life + self.extra + self.keep, known=True)
        if ask.carry + grant.units > 0:
            if not ask.carry and ask.sent + grant.life > self.until + grant.life / 2:
                self.hand = 0.0  # that was of another window, and is over
            self.hand += grant.units
            self.until = ask.sent + grant.life
            self.number = ask.number
            self._sent = ask.sent
            self.last = now if ask.carry else ask.sent
            self._open = True
            self._total = self.hand
            self.spends = 0
            self.low = LOW * self.hand
        self.next_ask = -math.inf
        if self.scarce:
            self.next_ask = ask.sent + SPACING * self.life
            if not grant.units:
                self.next_ask = max(self.next_ask, now + grant.hint)

    def lost(self, ask: Ask) -> None:
        """Take it that a request was not answered: the store may have acted on it, or not.

        So nothing is told again that lowers what it counts. What is in hand may still be used for its time: either the
        old lease or the new one covers it.
        """
        if self.number in self.entries:
            self.entries[self.number].amount += ask.carry
        for number, _, early in ask.closing:
            if early < 0:  # told twice it counts for longer, which does no harm
                self._later[number] = self._later.get(number, 0.0) - early

    def forgotten(self) -> None:
        """Take it that the store has lost its memory: all that counts must be told again."""
        self._returned.clear()
        self._later.clear()
        self._is_untold = bool(self.entries)
        for entry in self.entries.values():
            entry.known = False

    def untold(self, now: float) -> list[tuple[int, float, float]]:
        """Return what the store must be told: number, amount, and seconds from now until it begins to count."""
        if not self._is_untold:
            return []
        return [
            (number, entry.amount, entry.ends - self.keep - now)
            for number, entry in self.entries.items()
            if not entry.known and now < entry.ends
        ]

    def told(self, untold: list[tuple[int, float, float]]) -> None:
        """Take it that the store knows what `untold` returned. What has changed since then comes with the next one."""
        for number, amount, _ in untold:
            entry = self.entries.get(number)
            if entry is not None:
                entry.known = True
                self.debt += max(0.0, entry.amount - amount)
                if entry.amount < amount and self.returns:
                    key = 0 if self.nameless else number
                    self._returned[key] = self._returned.get(key, 0.0) + amount - entry.amount
        if untold:
            self._aside_ends = -math.inf  # what is booked aside from now on is another entry
        self._is_untold = any(not entry.known for entry in self.entries.values())

    def booked(self, now: float) -> float:
        """Return what counts of what was leased here, without what is in hand."""
        entries = list(self.entries.values())  # a copy: another thread may ask
        return sum(entry.amount for entry in entries if now < entry.ends) + self.debt - self.hand_at(now)

    def hand_at(self, now: float) -> float:
        """Return what is in hand."""
        return self.hand if now < self.until else 0.0

    def _resize(self, now: float) -> None:
        """Decide how large the next lease should be, by how this one was used."""
        if now < self.refresh_at:
            if self.hand <= self.low and self.spends and not self.scarce:
                self.size = min(self.limit, 2 * max(self.size, self._total))  # it was used up early
        elif self._total:
            self.size = min(self.size, 2 * (self._total - self.hand))

    def _close(self, *, live: bool) -> list[tuple[int, float, float]]:
        """Return what the store should make of the lease in hand, if it is not told already."""
        if not self._open or not self.returns:
            if not live:
                self.hand = 0.0
            return []
        self._open = False
        back = self.hand
        entry = self.entries.get(self.number)
        if entry is not None:
            back = min(back, entry.amount)
            entry.amount -= back
        early = max(0.0, self.life - max(0.0, self.last - self._sent))
        return [(self.number, back, early)]

    def _correct(self, closing: list[tuple[int, float, float]], now: float) -> None:
        """Add what settlements gave back, and forget what counts no more."""
        for number, entry in list(self.entries.items()):
            if now < entry.ends:
                break  # they end nearly in the order in which they began
            del self.entries[number]
            self._returned.pop(number, None)
            self._later.pop(number, None)
        closing.extend((number, self._returned.pop(number), 0.0) for number in list(self._returned)[:MOST])
        closing.extend((number, 0.0, -self._later.pop(number)) for number in list(self._later)[:MOST])
