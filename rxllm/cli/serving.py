"""`rxllm serve-fake`: the simulated provider on a port of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from typing import Any

from rxllm.errors import ConfigError
from rxllm.testing import SimulatedProvider
from rxllm.testing.simulated import Latency

__all__ = ["serve"]


def serve(
    *,
    port: int,
    seed: int,
    latency: float,
    per_token: float,
    rpm: float | None,
    tpm: float | None,
    most: int | None,
    faults: dict[str, float],
    answer: str,
) -> int:
    """Serve until Ctrl-C or SIGTERM; return the exit code.

    Raises:
        ConfigError: an argument out of its range, or the port is taken.
    """
    settings: dict[str, Any] = {
        "latency": Latency(base=latency, per_token=per_token),
        "requests": rpm,
        "tokens": tpm,
        "max_in_flight": most,
        "faults": faults,
        "answer": answer,
    }
    provider = SimulatedProvider(port=port, seed=seed, **settings)
    asyncio.run(_serve(provider, port))
    seen = provider.statistics()
    sys.stderr.write(f"{seen.arrivals:,} requests came, {seen.statuses.get(200, 0):,} were answered well\n")
    return 0


async def _serve(provider: SimulatedProvider, port: int) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError):  # on Windows Ctrl-C cancels this
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
    try:
        await provider.__aenter__()
    except OSError as error:
        msg = f"port: cannot listen on {port}: {error.strerror}"
        raise ConfigError(msg) from None
    try:
        sys.stdout.write(f"{provider.url}\n")
        sys.stdout.flush()
        await ended.wait()
    finally:
        await provider.close()
