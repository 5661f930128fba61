"""Pictures of runs: what a controller set, what the server took and refused, and what it could have taken."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from _lab import TICK
from _lab_judge import bins

if TYPE_CHECKING:
    from pathlib import Path

    from _lab import Trace

EVERY: Final = round(5.0 / TICK)  # rows in a point of a curve
SIZE: Final = (11, 9)  # inches


def draw(trace: Trace, title: str, path: Path) -> None:
    """Write a PNG: starts, limit and seconds in service over time.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  only who wants pictures needs it
    from matplotlib.figure import Figure  # noqa: PLC0415  the same

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    starts, limits, times = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    rows = trace.rows[::EVERY]
    at = [row.at for row in rows[1:]]
    pairs = list(itertools.pairwise(rows))
    seconds = EVERY * TICK
    refused = trace.rows[-1].refused / max(1, trace.rows[-1].arrivals)  # of a flood the curve is out of sight

    starts.step(at, [(b.requests - a.requests) / seconds for a, b in pairs], where="pre", label="accepted", lw=1.2)
    starts.step(
        at,
        [(b.refused - a.refused) / seconds for a, b in pairs],
        where="pre",
        label=f"refused: {refused:.1%}",
        color="tab:red",
    )
    known = [(row.at, row.rate) for row in trace.rows if row.rate is not None]
    if known:
        starts.plot(*zip(*known, strict=True), label="rate set", color="tab:green", lw=0.9)
    phases = trace.scenario.phases
    current = [
        max((phase for phase in phases if phase.at <= one.at), key=lambda phase: phase.at) for one in bins(trace)
    ]
    capacity = [phase.rate(one.at) for phase, one in zip(current, bins(trace), strict=True)]
    starts.step([one.at for one in bins(trace)], capacity, where="post", label="capacity", color="black", ls="--", lw=1)
    accepted = max((b.requests - a.requests) / seconds for a, b in pairs)
    starts.set_ylim(0, 1.4 * max(*capacity, accepted))  # refusals and wishes may be far above
    starts.set_ylabel("requests / s")
    starts.legend(loc="upper right", ncols=4, fontsize="small")

    set_to = [(row.at, row.limit) for row in trace.rows if row.limit is not None]
    if set_to:
        limits.plot(*zip(*set_to, strict=True), label="limit set", color="tab:green")
    limits.plot([row.at for row in trace.rows], [row.in_flight for row in trace.rows], label="in flight", lw=0.8)
    width = [
        min(phase.width(one.at), phase.ceiling or float("inf")) for phase, one in zip(current, bins(trace), strict=True)
    ]
    wide = [(one.at, most) for one, most in zip(bins(trace), width, strict=True) if most < float("inf")]
    if wide:
        limits.step(*zip(*wide, strict=True), where="post", label="width of the server", color="black", ls="--", lw=1)
    limits.set_ylim(bottom=0)
    limits.set_ylabel("attempts on the wire")
    limits.legend(loc="upper right", ncols=3, fontsize="small")

    for answered, phase in zip(trace.answered, phases, strict=True):
        if answered:
            times.plot(*zip(*answered, strict=True), ".", ms=1, color="tab:blue", alpha=0.4)
        if not phase.down:
            end = min((later.at for later in phases if later.at > phase.at), default=trace.scenario.seconds)
            times.hlines(phase.latency.median, phase.at, end, color="black", ls="--", lw=1)
    times.set_yscale("log")
    times.set_ylabel("seconds in service")
    times.set_xlabel("seconds")
    figure.savefig(path, dpi=80)
