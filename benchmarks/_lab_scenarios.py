"""The worlds in which controllers are judged, as data, and a generator of ones that nobody has seen."""

from __future__ import annotations

import hashlib
import math
import random
from typing import TYPE_CHECKING, Any, Final

from _lab import SPEED, Latency, Phase, Scenario

from rxllm.testing import ServerQuota

if TYPE_CHECKING:
    from collections.abc import Sequence

SHORT: Final = Latency(1.7, 0.57)  # a mean of 2 s
LONG: Final = Latency(6.0, 0.8)  # a mean of 8.3 s
TENFOLD: Final = Latency(17.0, 0.57)


def bucket(rate: float, seconds: float = 1.0) -> ServerQuota:
    """Return a quota that refills at `rate` per second and holds what comes in `seconds`."""
    return ServerQuota(60 * rate, 60.0, "bucket", burst=max(1.0, seconds * rate))


def steps(*phases: tuple[float, ServerQuota | None], **fields: Any) -> tuple[Phase, ...]:
    """Return phases with other quotas and the same fields."""
    return tuple(Phase(at=at, quota=quota, **fields) for at, quota in phases)


def ceilings(*phases: tuple[float, int]) -> tuple[Phase, ...]:
    """Return phases with other ceilings."""
    return tuple(Phase(at=at, ceiling=width) for at, width in phases)


def knees(*phases: tuple[float, int]) -> tuple[Phase, ...]:
    """Return phases with other knees."""
    return tuple(Phase(at=at, knee=width) for at, width in phases)


def _scenario(name: str, *phases: Phase, **fields: Any) -> Scenario:
    return Scenario(name=name, phases=phases, **fields)


SCENARIOS: Final[tuple[Scenario, ...]] = (
    # answers of 6 s in the median, with a heavy tail
    _scenario("bucket_10", Phase(quota=bucket(10), latency=LONG)),
    _scenario("bucket_10_hint_89s", Phase(quota=bucket(10), latency=LONG), retry_after=89.0),
    _scenario("ceiling_64_long", Phase(ceiling=64, latency=LONG)),
    _scenario("knee_64_long", Phase(knee=64, latency=LONG)),
    _scenario("bucket_10_halved", *steps((0, bucket(10)), (300, bucket(5)), (600, bucket(10)), latency=LONG)),
    _scenario("bucket_60", Phase(quota=bucket(60), latency=LONG)),
    # answers of 2 s on average
    _scenario("bucket_30", Phase(quota=bucket(30))),
    _scenario("bucket_2", Phase(quota=bucket(2))),
    _scenario("bucket_300", Phase(quota=bucket(300)), seconds=300.0),
    _scenario("knee_64_ceiling_256", Phase(knee=64, ceiling=256)),
    _scenario("knee_64", Phase(knee=64)),
    _scenario("bucket_30_quartered", *steps((0, bucket(30)), (300, bucket(7.5)), (600, bucket(30)))),
    _scenario("bucket_30_faults", Phase(quota=bucket(30), faults={"fault": 0.01})),
    # other ways to count
    _scenario("sliding_10", Phase(quota=ServerQuota(600, 60.0, "sliding"))),
    _scenario("sliding_30_of_1s", Phase(quota=ServerQuota(30, 1.0, "sliding"))),
    _scenario("sliding_10_counts_refused", Phase(quota=ServerQuota(100, 10.0, "sliding")), charge_refused=True),
    _scenario("fixed_10", Phase(quota=ServerQuota(600, 60.0, "fixed"))),
    _scenario("fixed_60_of_10s", Phase(quota=ServerQuota(600, 10.0, "fixed"))),
    _scenario("bucket_10_of_a_minute", Phase(quota=bucket(10, 60.0))),
    # what refusals say
    _scenario("bucket_30_hint_0s", Phase(quota=bucket(30)), retry_after=0.0),
    _scenario("bucket_30_no_hint", Phase(quota=bucket(30)), retry_after=None),
    _scenario("ceiling_64_529_no_hint", Phase(ceiling=64), retry_after=None, overloaded=True),
    # tokens
    _scenario("tokens_bucket", Phase(quota=bucket(2_000), unit="tokens")),
    _scenario("tokens_sliding", Phase(quota=ServerQuota(120_000, 60.0), unit="tokens")),
    _scenario(
        "tokens_tenfold", *(Phase(at=at, quota=bucket(6_000), unit="tokens", latency=how) for at, how in
        ((0, SHORT), (450, TENFOLD)))
    ),
    # steps, both ways
    _scenario("bucket_rises", *steps((0, bucket(5)), (300, bucket(40)))),
    _scenario("ceiling_steps", *ceilings((0, 64), (300, 24), (600, 64))),
    _scenario("knee_steps", *knees((0, 64), (300, 24), (600, 64))),
    _scenario("bucket_30_tenfold", Phase(quota=bucket(30)), Phase(at=300.0, quota=bucket(30), latency=TENFOLD)),
    _scenario("knee_64_tenfold", Phase(knee=64), Phase(at=300.0, knee=64, latency=TENFOLD)),
    _scenario("quota_then_ceiling", Phase(quota=bucket(30)), Phase(at=300.0, quota=bucket(30), ceiling=32)),
    # trouble
    _scenario("knee_64_restarts_cold", Phase(knee=64), Phase(at=300.0, down=True), Phase(at=330.0, knee=64, cold=60.0)),
    _scenario("bucket_30_outage", Phase(quota=bucket(30)), Phase(at=300.0, quota=bucket(30), down=True),
              Phase(at=360.0, quota=bucket(30))),
    _scenario("ceiling_64_bad_requests", Phase(ceiling=64, faults={"fatal": 0.05, "invalid": 0.05})),
    _scenario("bucket_30_bad_requests", Phase(quota=bucket(30), faults={"fatal": 0.05, "invalid": 0.05})),
    # company
    _scenario("two_clients_bucket_30", Phase(quota=bucket(30)), starts=(0.0, 0.0)),
    _scenario("two_clients_one_late", Phase(quota=bucket(30)), starts=(0.0, 200.0)),
    _scenario("two_clients_ceiling_64", Phase(ceiling=64), starts=(0.0, 0.0)),
    _scenario("three_pipelines", Phase(quota=bucket(30)), pipelines=3),
)  # fmt: skip
QUICK: Final = (
    "bucket_30",
    "bucket_2",
    "ceiling_64_529_no_hint",
    "knee_64",
    "bucket_10_halved",
    "two_clients_bucket_30",
)


def random_scenario(number: int, salt: str = "") -> Scenario:
    """Return a scenario that comes from a number and a word alone.

    Rates and widths are log-uniform over two decades and more; half of the scenarios change midway.
    """
    name = f"random_{salt}{number}"
    draws = random.Random(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]))
    world = _World(draws)
    phases = [world.phase(0.0, 1.0, 1.0)]
    if draws.random() < 0.5:
        at = draws.uniform(150, 350)
        phases.append(world.phase(at, _log(draws, 0.15, 4.0), draws.choice((1.0, 1.0, 0.5, 3.0))))
        if draws.random() < 0.6:
            phases.append(world.phase(at + draws.uniform(150, 300), 1.0, 1.0))
    return Scenario(
        name=name,
        phases=tuple(phases),
        retry_after=draws.choice(("exact", "exact", None, 0.0, 5.0, 89.0)),
        refusal=draws.choice(((0.05, 0.3), (0.01, 0.05), (0.5, 1.5))),
        overloaded=draws.random() < 0.5,
        path=draws.uniform(0.0, 0.05),
        pipelines=draws.choice((1, 1, 1, 2)),
    )


class _World:
    """A kind of server, of which the phases of a random scenario are made."""

    def __init__(self, draws: random.Random) -> None:
        self._latency = Latency(_log(draws, 0.6, 15.0), draws.uniform(0.0, 1.0))
        self._kind = draws.choice(
            ("bucket", "bucket", "sliding", "fixed", "ceiling", "knee", "knee_and_ceiling", "tokens")
        )
        self._width = _log(draws, 4, 400)
        self._rate = _log(draws, 1.0, 200.0)  # requests per second
        self._per = draws.choice((1.0, 10.0, 60.0))
        self._burst = _log(draws, 0.5, 20.0)  # seconds
        self._faults: dict[Any, float] = draws.choice(
            ({}, {}, {"fault": 0.01}, {"fatal": 0.03}, {"invalid": 0.05, "fault": 0.005})
        )

    def phase(self, at: float, factor: float, longer: float) -> Phase:
        """Return the server at `at`, with `factor` of its capacity and answers that are `longer` by a factor."""
        latency = Latency(self._latency.median * longer, self._latency.sigma)
        kind, rate = self._kind, self._rate * factor
        if kind in ("ceiling", "knee", "knee_and_ceiling"):
            width = max(1, round(self._width * factor))
            return Phase(
                at=at,
                knee=None if kind == "ceiling" else width,
                ceiling={"ceiling": width, "knee": None, "knee_and_ceiling": 2 * width}[kind],
                latency=latency,
                faults=self._faults,
            )
        if kind == "tokens":
            tokens = SPEED * self._latency.mean
            full = max(30.0 * SPEED * latency.mean, rate * self._burst * tokens)  # the longest answers fit
            quota = ServerQuota(60 * rate * tokens, 60.0, "bucket", burst=full)
            return Phase(at=at, quota=quota, unit="tokens", latency=latency, faults=self._faults)
        quota = (
            bucket(rate, self._burst)
            if kind == "bucket"
            else ServerQuota(max(1, round(rate * self._per)), self._per, "sliding" if kind == "sliding" else "fixed")
        )
        return Phase(at=at, quota=quota, latency=latency, faults=self._faults)


def _log(draws: random.Random, low: float, high: float) -> float:
    return low * math.exp(draws.random() * math.log(high / low))


def chosen(names: Sequence[str]) -> list[Scenario]:
    """Return the scenarios of these names, all for none.

    Raises:
        SystemExit: there is no such scenario.
    """
    known = {scenario.name: scenario for scenario in SCENARIOS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no scenario is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names or known]
