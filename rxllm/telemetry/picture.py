"""A run as a picture, drawn by matplotlib, which is imported when the first one is drawn."""

import importlib
import itertools
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rxllm.errors import ConfigError
from rxllm.telemetry.bins import Mark, Table

__all__ = ["draw"]

# Colours that the colour-blind can tell apart: M. Okabe and K. Ito, "Color Universal Design", 2002.
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
BLACK, GREY, PALE = "#000000", "#666666", "#BBBBBB"

QUOTAS = tuple(itertools.product(("-", "--", ":"), (GREEN, ORANGE, SKY, PURPLE, BLUE)))  # (line, colour), in turn
REASONS = {"concurrency": GREY, "pace": BLACK, "pause": VERMILLION}  # the others are quotas, and have their colour
MARKS = {  # kind -> (line, colour, what it is called when there are many)
    "suspended": ("-", VERMILLION, "suspensions"),
    "resumed": ("--", GREEN, "resumptions"),
    "paused": (":", VERMILLION, "pauses"),
    "learned": ("-.", BLUE, "learned quotas"),
    "setting": (":", BLACK, "changes of limit or rate"),
    "store": ("-.", PURPLE, "changes of a store"),
}
OTHER_MARK = ("-", GREY, "others")
INCHES = (12.0, 9.0)
DOTS = 100  # per inch
GROUPS = 120  # rates are shown in at most so many steps: in finer ones they are noise
FEW = 20  # marks of a kind: more are drawn fainter
LETTERS = 130  # of the title in a line
LABEL = 70  # letters of an entry in a legend
LINE = 8  # letters that the line and the space before an entry take
ROOM = 160  # letters of a legend in a line
ENTRIES = 9  # of a legend at most: what it takes is taken from the panels


def draw(table: Table, file: str | os.PathLike[str] | IO[bytes]) -> None:
    """Draw `table` into `file`: see `Recording.save`.

    Raises:
        ConfigError: matplotlib is not installed, or it does not know the suffix of `file`.
        OSError: The file cannot be written.
    """
    figure = _figure()
    kind = "png"
    if isinstance(file, (str, os.PathLike)):
        kind = Path(file).suffix.removeprefix(".").lower() or kind
        known = sorted(figure.canvas.get_supported_filetypes())
        if kind not in known:
            raise ConfigError(f"file must end in one of {', '.join(known)}, got {os.fspath(file)!r}")
    seconds, unit = _unit(table)
    rates, places, fills, waits = figure.subplots(4, 1, sharex=True, height_ratios=(3, 2.5, 3, 1.3))
    edges = [number * table.width / seconds for number in range(len(table.admitted) + 1)]
    colours = dict(zip(table.fill, itertools.cycle(QUOTAS), strict=False))

    _draw_rates(rates, table, edges)
    _draw_places(places, table, edges)
    _draw_fills(fills, table, edges, colours)
    _draw_waits(waits, table, edges, colours)
    _draw_marks(figure, (rates, places, fills, waits), table, seconds)

    for axes in (rates, places, fills, waits):
        axes.set_xlim(0, edges[-1] or 1)
        axes.grid(visible=True, color=PALE, linewidth=0.4)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    waits.set_xlabel(f"{unit} after the first attempt")
    title = textwrap.fill(table.gate, LETTERS, max_lines=3, placeholder=" …")
    figure.suptitle(_plain(f"{title}\n{_summary(table)}"), fontsize=11)
    figure.savefig(file, format=kind, dpi=DOTS)  # whatever the user's settings are


def _figure() -> Any:
    """Return an empty figure that belongs to no window and to no state of pyplot."""
    try:
        figures = importlib.import_module("matplotlib.figure")  # optional, so the type checkers shall not look
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'rxllm[plot]'") from error
    return figures.Figure(figsize=INCHES, dpi=DOTS, layout="constrained")  # saving picks the canvas: Agg for pixels


def _unit(table: Table) -> tuple[float, str]:
    """Return the seconds of the unit of the time axis, and its name.

    At least three of it fit into the run.
    """
    length = len(table.admitted) * table.width
    for seconds, name in ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if length >= 3 * seconds:
            return seconds, name
    return 1.0, "seconds"


def _summary(table: Table) -> str:
    """Return the run in a line."""
    admitted, ended, refused, failed = map(sum, (table.admitted, table.ended, table.refused, table.failed))
    if not admitted and not ended:
        return "no attempt yet"
    parts = [f"{admitted:,} attempts started in {_duration(len(table.admitted) * table.width)}"]
    for count, name in ((refused, "refused"), (failed, "failed")):
        share = f" ({count / ended:.1%})" if count else ""
        parts.append(f"{count:,} {name}{share}")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 3:  # noqa: PLR2004  as on the time axis
        return f"{seconds:.1f} s"
    return f"{minutes} min" if minutes < 180 else f"{minutes // 60} h {minutes % 60:02} min"  # noqa: PLR2004  the same


def _draw_rates(axes: Any, table: Table, edges: Sequence[float]) -> None:
    """Draw what started and what went wrong, per second, and where refusals were."""
    size = max(1, math.ceil(len(table.admitted) / GROUPS))
    steps = [*edges[:-1:size], edges[-1]]
    _steps(axes, _rates(table.admitted, size, table.width), steps, BLUE, label="started", fill=True)
    for counts, colour, name in ((table.failed, PURPLE, "failed"), (table.refused, VERMILLION, "refused")):
        if any(counts):
            _steps(axes, _rates(counts, size, table.width), steps, colour, label=name, fill=True)
    times = [(edges[number] + edges[number + 1]) / 2 for number, count in enumerate(table.refused) if count]
    if times:  # a few among many would not be seen
        below = {"transform": axes.get_xaxis_transform(), "clip_on": False, "linestyle": "none"}
        axes.plot(times, [-0.03] * len(times), **below, marker="^", ms=4, color=VERMILLION, label="refusals here")
    if any(rate is not None for rate in table.rate):
        _steps(axes, _numbers(table.rate), edges, BLACK, label="pace", line="--")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("attempts per second")
    _legend(axes)


def _draw_places(axes: Any, table: Table, edges: Sequence[float]) -> None:
    """Draw what was in flight, below its limit."""
    _steps(axes, table.in_flight, edges, BLUE, label="in flight, the most", fill=True)
    if any(limit is not None for limit in table.limit):
        _steps(axes, _numbers(table.limit), edges, BLACK, label="limit", line="--")
    axes.set_ylim(bottom=0)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("in flight")
    _legend(axes)


def _draw_fills(axes: Any, table: Table, edges: Sequence[float], colours: Mapping[str, tuple[str, str]]) -> None:
    """Draw how full each quota was. Where nobody looked it stays as it was."""
    most = 100.0
    for name, fill in table.fill.items():
        line, colour = colours[name]
        most = max([most, *(100 * high for high in fill.highest if high is not None)])
        _steps(axes, _percent(fill.highest, fill.last), edges, colour, label=name, line=line)
    axes.axhline(100, color=BLACK, linewidth=0.8, linestyle="--")
    axes.set_ylim(0, 1.08 * most)
    axes.set_ylabel("quota used, %")
    _legend(axes)


def _draw_waits(axes: Any, table: Table, edges: Sequence[float], colours: Mapping[str, tuple[str, str]]) -> None:
    """Draw for which part of the time the first in the queue waited for what: that is what limits the run."""
    size = max(1, math.ceil(len(table.admitted) / GROUPS))
    steps = [*edges[:-1:size], edges[-1]]
    below = [0.0] * (len(steps) - 1)
    for reason, seconds in table.waited.items():
        colour = REASONS.get(reason) or colours.get(reason, ("-", SKY))[1]
        top = [base + 100 * share for base, share in zip(below, _rates(seconds, size, table.width), strict=True)]
        axes.stairs(top, steps, baseline=below, fill=True, color=colour, alpha=0.8, label=_label(reason))
        below = top
    axes.set_ylim(0, 100)
    axes.set_ylabel("waited for,\n% of time")
    _legend(axes)


def _draw_marks(figure: Any, panels: Sequence[Any], table: Table, seconds: float) -> None:
    """Draw a line through all panels for each mark, and say below what they are."""
    kinds: dict[str, list[Mark]] = {}
    for mark in table.marks:
        kinds.setdefault(mark.kind, []).append(mark)
    handles: list[Any] = []
    labels: list[str] = []
    for kind, marks in kinds.items():
        line, colour, several = MARKS.get(kind, OTHER_MARK)
        look = {"color": colour, "linestyle": line, "linewidth": 0.9}
        faint = max(0.25, 0.8 / (1 + len(marks) / FEW))
        times = [mark.at / seconds for mark in marks]
        for axes in panels:
            axes.vlines(times, 0, 1, transform=axes.get_xaxis_transform(), alpha=faint, **look)
        handles += panels[0].plot([], [], **look)  # as dark in the legend as one alone
        count = sum(mark.count for mark in marks)
        labels.append(_label(marks[0].text if count == 1 else f"{count:,} {several}"))
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=_columns(labels), frameon=False, fontsize=9)


def _steps(
    axes: Any,
    values: Sequence[float],
    edges: Sequence[float],
    colour: str,
    *,
    label: str,
    line: str = "-",
    fill: bool = False,
) -> None:
    if fill:
        axes.stairs(values, edges, fill=True, color=colour, alpha=0.35)
    axes.stairs(values, edges, baseline=None, color=colour, linestyle=line, linewidth=1.2, label=_label(label))


def _rates(counts: Sequence[float], size: int, width: float) -> list[float]:
    """Return what there was per second in each `size` bins together; the last may be fewer.

    >>> _rates([1, 2, 3, 4, 6], 2, 0.5)
    [3.0, 7.0, 12.0]
    """
    groups = (counts[start : start + size] for start in range(0, len(counts), size))
    return [sum(group) / (len(group) * width) for group in groups]


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _percent(highest: Sequence[float | None], last: Sequence[float | None]) -> list[float]:
    """Return the highest fill of each bin; where nobody looked what was last before it.

    >>> _percent((None, 0.75, None, 0.5), (None, 0.25, None, 0.5))
    [nan, 75.0, 25.0, 50.0]
    """
    found: list[float] = []
    before = math.nan
    for high, late in zip(highest, last, strict=True):
        found.append(before if high is None else 100 * high)
        before = before if late is None else 100 * late
    return found


def _legend(axes: Any) -> None:
    """Put the legend above the panel, where no line is."""
    handles, labels = axes.get_legend_handles_labels()
    more = len(labels) - ENTRIES
    if more > 0:
        labels[ENTRIES - 1 :] = [f"{labels[ENTRIES - 1]}, and {more:,} more"]
    if handles:
        axes.legend(
            handles[:ENTRIES],
            labels,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=_columns(labels),
            frameon=False,
            fontsize=9,
            borderpad=0.1,
        )


def _columns(labels: Sequence[str]) -> int:
    """Return in how many columns a legend fits into the picture."""
    return max(1, ROOM // (max(map(len, labels)) + LINE))


def _label(text: str) -> str:
    return _plain(textwrap.shorten(text, LABEL, placeholder=" …"))


def _plain(text: str) -> str:
    """Return text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")
