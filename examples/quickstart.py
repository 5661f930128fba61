"""Summarise every docstring of the standard library: thousands of calls through quotas, checks and retries.

    python examples/quickstart.py       # asks a simulated provider: costs nothing, needs no key

    export OPENAI_API_KEY=...           # asks a real one, or any other that speaks the same
    python examples/quickstart.py --url https://api.openai.com/v1 --model gpt-4o-mini --limit 20 --quota 500/minute

A generator imports module after module, and is pulled only as fast as its docstrings are summarised. Outcomes come as
they complete; each one is a line of JSON in the output. Ctrl-C stops pulling, waits for what is in progress and
reports on what was done; a second one does not wait.

The pipeline is in `run`, near the end. Before it stand what goes in, what comes out, and the screen.
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import shutil
import statistics
import sys
import threading
import time
import types
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TextIO

from reactivex import operators as ops

import rxllm
from rxllm.testing import Latency, ServerQuota, SimulatedProvider

Outcome = rxllm.Outcome[str]

# These do things when they are imported: open a browser, print a poem, want a window.
SKIPPED = {"__main__", "_tkinter", "antigravity", "idlelib", "this", "tkinter", "turtle", "turtledemo"}
QUOTAS = ["600 requests/2 seconds", "52_000 tokens/2 seconds"]  # the simulated provider's; others count by the minute
HOPELESS = 3  # failures without a single answer: the address or the key is wrong
SHOWN = 0.2  # seconds from one outcome that is shown to the next; the file has all
DRAWN = 0.2  # seconds between two progress lines in a terminal
LOGGED = 5.0  # and elsewhere
INSTANT = 0.001  # seconds: shorter waits are none
LONGEST = 300  # characters of a summary
NAMES = {"concurrency": "a free place on the wire", "pause": "a pause, after a refusal"}
ANSWER, BACKOFF = "the answer", "the next try"  # what a request waits for, besides what its gate makes it wait for

# `read` redirects these for a moment, and it runs in a thread of its own.
STDOUT, STDERR = sys.stdout, sys.stderr


# What goes in


def documented(path: str, thing: Any) -> Iterator[tuple[str, str]]:
    """Walk a module or class: yield the path and the docstring of everything that is defined in it and has one."""
    if isinstance(getattr(thing, "__doc__", None), str):
        yield path, thing.__doc__
    if isinstance(thing, types.ModuleType | type):
        for name, inner in sorted(vars(thing).items()):
            is_code = callable(inner) or isinstance(inner, property | staticmethod | classmethod)
            is_ours = getattr(inner, "__module__", None) in {None, getattr(thing, "__module__", thing.__name__)}
            if is_code and is_ours and inner is not thing.__class__:
                yield from documented(f"{path}.{name}", inner)


def read(module: str) -> list[tuple[str, str]]:
    """Import a module, quietly, and return what is documented in it; nothing when it is not for this system."""
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), warnings.catch_warnings(action="ignore"):
        try:
            return list(documented(module, importlib.import_module(module)))
        except Exception:  # whatever it is: the module does not import cleanly here
            return []


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield the path and the text of every docstring in the standard library, each text once, module by module."""
    seen: set[str] = set()
    for module in sorted(sys.stdlib_module_names - SKIPPED, key=lambda name: (name.startswith("_"), name)):
        for path, text in read(module):
            if text.strip() and text not in seen:
                seen.add(text)
                yield path, text


def requests() -> Iterator[rxllm.Request]:
    """Ask for a summary of each."""
    for path, text in docstrings():
        yield rxllm.chat(f"Summarise this docstring in one sentence.\n\n{text}", id=path, max_tokens=100)


def is_summary(reply: rxllm.Reply[str]) -> bool:
    """Say whether an answer will do; the model is asked again when it does not."""
    return 0 < len(reply.text.strip()) <= LONGEST


# What comes out


def total_waits(outcome: Outcome) -> dict[str, float]:
    """Return how many seconds a request has waited, by what it waited for."""
    waited: dict[str, float] = defaultdict(float)
    for attempt in outcome.attempts:
        for reason, seconds in attempt.waited.items():
            waited[reason] += seconds
        waited[ANSWER] += attempt.seconds
    if len(outcome.attempts) > 1:
        waited[BACKOFF] = outcome.seconds - sum(waited.values())
    return {reason: seconds for reason, seconds in waited.items() if seconds >= INSTANT}


def error_text(outcome: Outcome) -> str | None:
    """Return what went wrong, None if nothing did."""
    return None if outcome.ok else f"{type(outcome.error).__name__}: {outcome.error}"


def json_line(outcome: Outcome) -> str:
    """Return an outcome as a line of JSON."""
    fields = {
        "name": outcome.request.id,
        "summary": outcome.text if outcome.ok else None,
        "error": error_text(outcome),
        "attempts": len(outcome.attempts),
        "tokens": outcome.usage.total_tokens,
        "seconds": round(outcome.seconds, 3),
        "waited": {reason: round(seconds, 3) for reason, seconds in total_waits(outcome).items()},
    }
    return json.dumps(fields) + "\n"


class Report:
    """What has come out until now."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.answered = 0
        self.failures: Counter[str] = Counter()
        self.attempts = 0
        self.faults: Counter[str] = Counter()  # attempts that were not answered well, by error
        self.refusals = 0
        self.tokens = 0
        self.waits: dict[str, list[float]] = defaultdict(list)

    def add(self, outcome: Outcome) -> None:
        """Count an outcome and its attempts."""
        if outcome.ok:
            self.answered += 1
        else:
            self.failures[type(outcome.error).__name__] += 1
        self.attempts += len(outcome.attempts)
        self.tokens += outcome.usage.total_tokens
        for attempt in outcome.attempts:
            if attempt.error is not None:
                self.faults[type(attempt.error).__name__] += 1
                self.refusals += getattr(attempt.error, "refusal", False)
        for reason, seconds in total_waits(outcome).items():
            self.waits[reason].append(seconds)

    def lines(self, quotas: list[rxllm.Quota]) -> Iterator[str]:
        """Yield the summary."""
        seconds = time.monotonic() - self.begun
        failed, faulty = self.failures.total(), self.faults.total()
        outcomes = self.answered + failed
        yield f"{outcomes:,} outcomes in {seconds:.1f} s"
        yield f"  answered           {self.answered:>9,}"
        yield f"  failed             {failed:>9,}   {listed(self.failures)}"
        yield f"  retries            {self.attempts - outcomes:>9,}"
        yield f"  refusals           {self.refusals:>9,}"
        yield f"  faulty attempts    {faulty:>9,}   {listed(self.faults)}"
        for unit, used in {"requests": self.attempts, "tokens": self.tokens}.items():
            most = {name_of(q): q.limit * math.ceil(seconds / q.per) for q in quotas if q.unit == unit}  # in that time
            shares = [f"{used / allowed:.0%} of {name}" for name, allowed in most.items()]
            yield f"  {unit} a minute".ljust(19) + f"  {used / seconds * 60:>9,.0f}   {', '.join(shares) or 'no quota'}"
        yield ""
        yield f"  {'waited for':<34} {'requests':>9} {'median':>9} {'longest':>9}"
        names = {str(quota): name_of(quota) for quota in quotas} | NAMES
        for reason, each in sorted(self.waits.items(), key=lambda wait: -sum(wait[1])):
            median, longest = f"{statistics.median(each):.3f} s", f"{max(each):.3f} s"
            yield f"  {names.get(reason, reason):<34} {len(each):>9,} {median:>9} {longest:>9}"


def listed(counts: Counter[str]) -> str:
    """Return counts as people write them."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.most_common())


def name_of(quota: rxllm.Quota) -> str:
    """Return a quota as people write it."""
    return f"{quota.limit:,.0f} {quota.unit} in {quota.per:g} s"


# The screen


class Screen:
    """Some of the outcomes on stdout, and below them, on stderr, one line that says how far it is."""

    def __init__(self, status: Callable[[], str]) -> None:
        self.status = status
        self.in_place = STDERR.isatty()
        self.width = shutil.get_terminal_size((120, 24)).columns - 1
        self.shown = 0.0
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.keep_drawing)

    def __enter__(self) -> Self:
        """Begin to draw."""
        self.thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Draw no more."""
        self.over.set()
        self.thread.join()
        if self.in_place:
            write(STDERR, "\r\x1b[K")

    def keep_drawing(self) -> None:
        """Draw the line again and again, also while nothing comes."""
        while not self.over.wait(DRAWN if self.in_place else LOGGED):
            with self.lock:
                self.draw()

    def draw(self) -> None:
        """Write the line."""
        line = self.status()[: self.width]
        write(STDERR, f"\r{line}\x1b[K" if self.in_place else f"{line}\n")

    def show(self, outcome: Outcome) -> None:
        """Write an outcome: every failure, and as many of the others as one can read."""
        now = time.monotonic()
        if outcome.ok and now - self.shown < SHOWN:
            return
        self.shown = now
        text = f"{outcome.request.id}: {outcome.text if outcome.ok else f'FAILED, {error_text(outcome)}'}"
        line = "".join(letter if letter.isprintable() else " " for letter in text)
        if outcome.ok and STDOUT.isatty():
            line = line[: self.width]
        with self.lock:
            if self.in_place:
                write(STDERR, "\r\x1b[K")
            write(STDOUT, f"{line}\n")
            if self.in_place:
                self.draw()


def write(stream: TextIO, text: str) -> None:
    """Write at once, to a terminal that may not know every letter."""
    stream.write(text.encode(stream.encoding, "replace").decode(stream.encoding))
    stream.flush()


# The pipeline


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="base URL of an OpenAI-compatible API; default: a simulated provider")
    parser.add_argument("--model", help="the model to ask; needed with --url")
    parser.add_argument("--key-env", default="OPENAI_API_KEY", metavar="NAME", help="where the key is (%(default)s)")
    parser.add_argument("--limit", type=int, default=1_000_000, metavar="N", help="how many docstrings; default: all")
    parser.add_argument("--quota", action="append", metavar="TEXT", help='such as "500 requests/minute"; repeatable')
    parser.add_argument("--concurrency", type=int, default=32, metavar="N", help="calls at a time (%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("summaries.jsonl"), help="where the lines of JSON go (%(default)s)"
    )
    chosen = parser.parse_args()
    if (chosen.url is None) != (chosen.model is None):
        parser.error("--url and --model go together")
    if chosen.limit < 1:
        parser.error("--limit must be at least 1")
    return chosen


def open_client(chosen: argparse.Namespace, stack: contextlib.ExitStack) -> rxllm.OpenAI:
    """Return what the requests are sent with; it is closed with the stack."""
    if chosen.url is not None:
        return stack.enter_context(rxllm.OpenAI(chosen.model, chosen.url, api_key_env=chosen.key_env))
    provider = SimulatedProvider(
        latency=Latency(base=0.03, per_token=0.002, sigma=0.3),
        requests=ServerQuota(600, per=2),
        tokens=ServerQuota(52_000, per=2),
        charge="actual",
        faults={"429": 0.001, "500": 0.01, "reset": 0.002, "truncated": 0.005, "empty": 0.01, "400": 0.0005},
        fault_retry_after=0.2,
    )
    server = stack.enter_context(provider.start())  # in a process of its own
    return stack.enter_context(rxllm.OpenAI("simulated", server.url, api_key="any"))


def run(chosen: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """Run the pipeline and report; return the exit status."""
    client = open_client(chosen, stack)
    quotas = [rxllm.Quota(text) for text in chosen.quota or ([] if chosen.url else QUOTAS)]
    gate = rxllm.Gate(*quotas, concurrency=chosen.concurrency)
    output = stack.enter_context(chosen.output.open("x" if chosen.url else "w", encoding="utf-8"))

    summaries = rxllm.from_iterable(requests(), thread=True).pipe(  # a thread, because to import a module takes time
        ops.take(chosen.limit),
        rxllm.call(client, gate=gate, validate=is_summary),
    )
    write(STDOUT, f"Asking {client!r}\nthrough {gate!r}\n\n")
    report = Report()
    outcomes = stack.enter_context(rxllm.iterate(summaries))

    def status() -> str:
        now = outcomes.statistics()
        done, failed = report.answered + report.failures.total(), report.failures.total()
        rate = done / (time.monotonic() - report.begun)
        stopping = "; stopping" if now.draining else ""
        return f"{done:,} done, {failed} failed, {now.pulled - done} in progress, {rate:,.0f} a second{stopping}"

    interrupted = False
    with Screen(status) as screen:
        try:
            for outcome in outcomes:
                output.write(json_line(outcome))
                report.add(outcome)
                screen.show(outcome)
                if not report.answered and report.failures.total() >= HOPELESS:
                    return give_up(chosen.output)
        except KeyboardInterrupt:
            interrupted = True
    write(
        STDOUT,
        "\n".join(["", *map(str.rstrip, report.lines(quotas)), "", f"Each outcome is a line of {chosen.output}.\n"]),
    )
    return 130 if interrupted else 0


def give_up(output: Path) -> int:
    """Say so; return the exit status."""
    output.unlink()  # nothing good is in it, and the next try may want the name
    write(STDERR, f"quickstart: gave up after {HOPELESS} failures and no answer\n")
    return 1


def main() -> int:
    """Run; what is wrong with the address, the key or the output is said in one line."""
    chosen = options()
    try:
        with contextlib.ExitStack() as stack:
            return run(chosen, stack)
    except FileExistsError:
        reason = f"{chosen.output} exists, and may have been paid for: name another with --output"
    except (rxllm.errors.ConfigError, OSError) as error:
        reason = str(error)
    write(STDERR, f"quickstart: {reason}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
