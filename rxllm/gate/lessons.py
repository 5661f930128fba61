"""What the breaker and the controller of a gate learn from its attempts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rxllm.events import BreakerChanged
from rxllm.feedback import Feedback, kind_of
from rxllm.messages import Signal

if TYPE_CHECKING:
    from collections.abc import Callable

    from rxllm.gate.lease import Lease
    from rxllm.messages import Kind
    from rxllm.policies.accounting import Ending
    from rxllm.policies.breaker import Breaker

__all__ = ["Lessons"]

GOOD = frozenset({"ok", "invalid"})
BAD = frozenset({"fault", "fatal"})


class Lessons:
    """Tells a breaker and a controller, where there are any, what each attempt did.

    Args:
        breaker: learns of starts, successes and failures.
        feedback: has the controller, which gets a signal of each start and end.
        changed: is told that the breaker has opened or closed.
    """

    __slots__ = ("_breaker", "_changed", "_feedback")

    def __init__(
        self, breaker: Breaker | None, feedback: Feedback | None, changed: Callable[[BreakerChanged], object]
    ) -> None:
        self._breaker = breaker
        self._feedback = feedback
        self._changed = changed

    def started(self, lease: Lease, now: float, *, in_flight: int, binding: bool) -> None:
        """Tell of a start.

        Args:
            lease: of the attempt; it takes along what its end will be told with.
            now: when it started.
            in_flight: how many are on the wire, with this one.
            binding: whether somebody waits because of what the controller sets.
        """
        if self._breaker is not None:
            self._breaker.start(now)
        feedback = self._feedback
        if feedback is not None:
            feedback.wake()
            lease.epoch = feedback.epoch
            lease.in_flight = in_flight
            feedback.tell(Signal(at=now, kind="start", in_flight=in_flight, epoch=lease.epoch, binding=binding))

    def ended(
        self, lease: Lease, now: float, *, ending: Ending, error: Exception | None, tokens: float, binding: bool
    ) -> None:
        """Tell of an end.

        Args:
            lease: of the attempt.
            now: when it ended.
            ending: how.
            error: what it failed with.
            tokens: what it used, if the provider says so.
            binding: as in `started`.
        """
        kind = kind_of(ending, error)
        if kind is None:
            return
        if self._breaker is not None:
            self._judge(self._breaker, kind, now, now - lease.at)
        if self._feedback is not None:
            hint: object = getattr(error, "retry_after", None)
            self._feedback.tell(
                Signal(
                    at=now,
                    kind=kind,
                    in_flight=lease.in_flight,
                    epoch=lease.epoch,
                    seconds=now - lease.at,
                    tokens=tokens,
                    binding=binding,
                    retry_after=hint if isinstance(hint, int | float) else None,
                )
            )

    def _judge(self, breaker: Breaker, kind: Kind, now: float, seconds: float) -> None:
        """Tell the breaker how an attempt ended; a refusal says that the server is there, and no more."""
        if kind in GOOD:
            changed = breaker.succeed(now, seconds)
        elif kind in BAD:
            changed = breaker.fail(now)
        else:
            return
        if changed:
            is_open = breaker.state != "closed"
            reason = f"no answer for {now - breaker.silent_since:.0f} s" if is_open else "answered again"
            self._changed(BreakerChanged(at=now, is_open=is_open, reason=reason))
