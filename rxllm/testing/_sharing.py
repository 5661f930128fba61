"""Processor sharing: a server that slows down when too many requests run at once. Pure: `now` comes in."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Final, Generic, TypeVar

T = TypeVar("T")

COMPACT: Final = 1_000  # removed jobs that may stay in the heap before it is rebuilt


class Sharing(Generic[T]):
    """Jobs in progress, each with its work in seconds at full speed.

    Up to `knee` jobs run at full speed; above it all of them run at `knee / jobs` of it. None: no knee.
    """

    __slots__ = ("_at", "_gone", "_heap", "_live", "_next", "_work", "knee")

    def __init__(self, knee: int | None = None) -> None:
        self.knee = knee  # read at every step: call `finished` before changing it
        self._heap: list[tuple[float, int]] = []  # (work done when it ends, key)
        self._live: dict[int, T] = {}
        self._gone = 0  # removed, still in the heap
        self._next = 0
        self._at = 0.0
        self._work = 0.0  # seconds of work each job present from the start would have received

    def __len__(self) -> int:
        return len(self._live)

    def add(self, now: float, work: float, payload: T) -> int:
        """Start a job; return its key. Call `finished(now)` first: what ended before `now` must be out."""
        if not self._live:
            self._at, self._work = now, 0.0
            self._heap.clear()
            self._gone = 0
        key = self._next
        self._next = key + 1
        self._live[key] = payload
        heappush(self._heap, (self._work + work, key))
        return key

    def remove(self, key: int) -> T | None:
        """Take a job out before its end; None when it has ended. Call `finished(now)` first."""
        payload = self._live.pop(key, None)
        if payload is not None:
            self._gone += 1
            if self._gone > COMPACT and self._gone > len(self._live):
                self._heap = [entry for entry in self._heap if entry[1] in self._live]
                heapify(self._heap)
                self._gone = 0
        return payload

    def finished(self, now: float) -> list[T]:
        """Move to `now`; return the jobs that have ended, in the order of their ends."""
        ended: list[T] = []
        heap, live = self._heap, self._live
        while live:
            end, key = heap[0]
            if key not in live:
                heappop(heap)
                self._gone -= 1
                continue
            speed = self._speed()
            at = self._at + (end - self._work) / speed
            if at > now:
                if now > self._at:
                    self._work += (now - self._at) * speed
                    self._at = now
                break
            heappop(heap)
            self._at, self._work = max(at, self._at), end
            ended.append(live.pop(key))
        return ended

    def next_end(self) -> float | None:
        """Return the instant at which the next job ends if nothing changes."""
        heap, live = self._heap, self._live
        while heap and heap[0][1] not in live:
            heappop(heap)
            self._gone -= 1
        return self._at + (heap[0][0] - self._work) / self._speed() if heap else None

    def _speed(self) -> float:
        jobs = len(self._live)
        return 1.0 if self.knee is None or jobs <= self.knee else self.knee / jobs
