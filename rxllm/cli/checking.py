"""`rxllm check`: what is wrong with a file of requests, and what it will take, before anything is spent."""

from __future__ import annotations

import math
import sys
from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec

from rxllm.cli.progress import counted, model_named, span_text
from rxllm.cli.settings import UNNAMED
from rxllm.errors import CallError, ConfigError
from rxllm.messages import Usage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rxllm.cli.settings import Settings
    from rxllm.policies.prices import Prices

__all__ = ["Estimate", "check", "least_seconds"]

SHOWN = 100  # things that are wrong


class Estimate(msgspec.Struct):
    """What requests will take. Tokens are estimates: a quarter of the bytes of a prompt, and as many as may come."""

    requests: int = 0
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    unlimited: int = 0  # requests that do not say how many tokens the answer may have
    usd: float = 0.0
    unpriced: dict[str, int] = {}  # model -> requests

    def add(self, cost: Mapping[str, float], model: str, prices: Prices | None, *, limited: bool) -> None:
        """Add a request.

        Args:
            cost: what its client says that it takes, by unit.
            model: what is asked.
            prices: what models cost; None: that is not known.
            limited: it says how many tokens the answer may have.
        """
        inputs, outputs = cost.get("input_tokens", 0.0), cost.get("output_tokens", 0.0)
        self.requests += 1
        self.input_tokens += inputs
        self.output_tokens += outputs
        self.unlimited += not limited
        if prices is not None:
            usage = Usage(input_tokens=round(inputs), output_tokens=round(outputs))
            try:
                self.usd += prices.cost(usage, model)
            except ConfigError:
                self.unpriced[model] = self.unpriced.get(model, 0) + 1

    def amounts(self) -> dict[str, float]:
        """Return what it comes to, by unit."""
        return {
            "requests": self.requests,
            "tokens": self.input_tokens + self.output_tokens,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
        }


def least_seconds(amounts: Mapping[str, float], quotas: Iterable[tuple[str, float, float]]) -> float:
    """Return the seconds that quotas make it take at least: what the first window has room for starts at once.

    Args:
        amounts: unit -> how many there are.
        quotas: (unit, limit, seconds of its window); of requests whole ones fit.

    >>> least_seconds({"requests": 1501}, [("requests", 500.9, 60.0)])
    180.0
    >>> least_seconds({"tokens": 1500}, [("tokens", 1000, 60.0)])
    30.0
    """
    longest = 0.0
    for unit, limit, per in quotas:
        amount = amounts.get(unit, 0.0)
        windows = math.ceil(amount / max(1, int(limit))) if unit == "requests" else amount / limit
        longest = max(longest, per * (windows - 1))
    return longest


LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens")  # in the dialects


def check(settings: Settings) -> int:
    """Print what is wrong with a file and what it will take; return the exit code.

    Raises:
        ConfigError: something cannot be used.
    """
    workers = settings.workers()
    if settings.latency is not None and workers is None:
        msg = f"latency: how long it takes depends on --concurrency N too, and there is none, got {settings.latency:g}"
        raise ConfigError(msg)
    source, prices, client = settings.source(), settings.price_list(), settings.counter()
    estimate = Estimate()
    ids: dict[bytes, int] = {}  # digest -> line; the ids themselves may be long
    wrong = 0

    def tell(text: str) -> None:
        nonlocal wrong
        wrong += 1
        if wrong <= SHOWN:
            sys.stdout.write(f"{text}\n")

    for row in source.rows():
        request = row.request
        if request is None:
            tell(source.where(row))
            continue
        try:
            cost = client.cost(request)
        except (CallError, ConfigError) as error:
            tell(source.where(row._replace(problem=str(error))))
            continue
        limited = any(request.body.get(name) is not None for name in LIMITS)
        estimate.add(cost, model_named(request) or settings.model or UNNAMED, prices, limited=limited)
        if request.id is not None:
            first = ids.setdefault(blake2b(request.id.encode(errors="replace"), digest_size=16).digest(), row.line)
            if first != row.line:
                tell(source.where(row._replace(problem=f"the id {request.id!r} is that of line {first} too")))
    if wrong > SHOWN:
        sys.stdout.write(f"… and {wrong - SHOWN:,} more\n")
    verdict = counted(wrong, "bad line") if wrong else "good"
    sys.stdout.write("\n".join([*_lines(estimate, settings, prices), verdict]))
    sys.stdout.write("\n")
    return 1 if wrong else 0


def _lines(estimate: Estimate, settings: Settings, prices: Prices | None) -> list[str]:
    """Say what it will take."""
    inputs = f"about {estimate.input_tokens:,.0f} tokens of input"
    outputs = f"{'about' if estimate.unlimited else 'at most'} {estimate.output_tokens:,.0f} of output"
    lines = [f"{counted(estimate.requests, 'request')}, {inputs}, {outputs}"]
    if estimate.unlimited:
        do = "does not limit its" if estimate.unlimited == 1 else "do not limit their"
        lines.append(f"{counted(estimate.unlimited, 'request')} {do} output, so that is a guess")
    with settings.gate() as gate:
        quotas = [(found.quota.unit, float(found.quota.limit), found.quota.per) for found in gate.statistics().quotas]
    if quotas:
        lines.append(f"these quotas take at least {span_text(least_seconds(estimate.amounts(), quotas))}")
    workers = settings.workers()
    if settings.latency is not None and workers is not None:
        turns = math.ceil(estimate.requests / workers)
        each, whole = span_text(settings.latency), span_text(turns * settings.latency)
        lines.append(f"{workers:,} at a time, each {each}, take about {whole}")
    if prices is not None:
        lines.append(f"about ${estimate.usd:,.4f}")
        lines.extend(
            f"no price of {model!r}, for {counted(count, 'request')}" for model, count in estimate.unpriced.items()
        )
    return lines
