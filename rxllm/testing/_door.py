"""Whom the server admits: its quotas, and how many requests it serves at a time. Pure."""

from __future__ import annotations

from math import isinf
from typing import TYPE_CHECKING

from rxllm.testing._quotas import Entry, Limiter, go_duration, limiter
from rxllm.testing._replies import Refusal
from rxllm.testing._settings import Settings

if TYPE_CHECKING:
    from collections.abc import Container

    from rxllm.testing._dialects import Dialect

__all__ = ["Door"]


class Door:
    """The quotas of one server, as its settings have them."""

    def __init__(self) -> None:
        self._settings = Settings()
        self._requests: Limiter | None = None
        self.tokens: Limiter | None = None

    def apply(self, settings: Settings, changed: Container[str], now: float) -> None:
        """Take over settings, of which some are new."""
        self._settings = settings
        if "requests" in changed:
            self._requests = limiter(settings.requests, now, self._requests)
        if "tokens" in changed:
            self.tokens = limiter(settings.tokens, now, self.tokens)

    def admit(self, now: float, cost: int, in_flight: int) -> Entry | Refusal | None:
        """Charge the quotas, and return the entry of the tokens if they have a quota; or say why not."""
        settings, requests, tokens = self._settings, self._requests, self.tokens
        if settings.max_in_flight is not None and in_flight >= settings.max_in_flight:
            status = settings.overload_status
            text = f"Too many requests in flight: limit {settings.max_in_flight}."
            return Refusal(status, "max_in_flight", text, settings.fault_retry_after)
        request_wait = 0.0 if requests is None else requests.wait(now, 1)
        token_wait = 0.0 if tokens is None else tokens.wait(now, cost)
        if request_wait <= 0 and token_wait <= 0:
            if requests is not None:
                requests.charge(now, 1)
            return None if tokens is None else tokens.charge(now, cost)
        if settings.charge_refused and requests is not None:
            requests.charge(now, 1)
        unit, state, need = ("requests", requests, 1) if request_wait >= token_wait else ("tokens", tokens, cost)
        amount = 0.0 if state is None else state.quota.amount
        wait = max(request_wait, token_wait)
        if isinf(wait):
            text = f"Request too large on {unit}: Limit {amount:g}, Requested {need}."
            return Refusal(429, "too_large", text)
        used = amount - (0.0 if state is None else state.remaining(now))
        text = f"Rate limit reached on {unit}: Limit {amount:g}, Used {used:g}, Requested {need}."
        return Refusal(429, unit, f"{text} Please try again in {go_duration(wait)}.", wait)

    def headers(self, now: float, dialect: Dialect) -> bytes:
        """Return the header lines that state the quotas and what is left of them."""
        lines = b""
        for unit, state in ((b"requests", self._requests), (b"tokens", self.tokens)):
            if state is not None:
                lines += dialect.limit(unit, state.quota.amount, state.remaining(now), state.reset(now))
        return lines
