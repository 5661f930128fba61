"""What a try costs, by how it ended, and how each provider counts."""

import math
from typing import Literal

import msgspec

from rxllm.errors import ConfigError, check_choice, check_number
from rxllm.policies.quota import Quota, Strategy

__all__ = [
    "ACCOUNTING",
    "ANTHROPIC",
    "AZURE_OPENAI",
    "GENERIC",
    "GROQ",
    "OPENAI",
    "VLLM",
    "Accounting",
    "Cell",
    "Ending",
    "Rule",
    "accounting_of",
    "charge",
]

Ending = Literal["unsent", "refused", "answered", "failed", "timed_out", "cancelled"]
Rule = Literal["refund", "keep", "settle"]

# An invalid answer is an answer; the loser of a hedge is cancelled.
RULES: dict[Ending, Rule] = {
    "unsent": "refund",
    "refused": "refund",
    "answered": "settle",
    "failed": "settle",
    "timed_out": "settle",
    "cancelled": "settle",
}
EXCEPTIONS: dict[tuple[Ending, str], Rule] = {
    ("refused", "requests"): "keep",  # providers count the calls that they refuse
}


def charge(ending: Ending, unit: str, reserved: float, actual: float | None) -> float:
    """Return what a try that was sent, or not, costs of a quota.

    Args:
        ending: How it ended.
        unit: What the quota counts.
        reserved: What was booked at admission.
        actual: What the provider says it used; None if it does not say.

    >>> charge("refused", "requests", 1, None), charge("refused", "tokens", 900, None)
    (1, 0.0)
    >>> charge("answered", "tokens", 900, 350), charge("timed_out", "tokens", 900, None)
    (350, 900)
    """
    return _charged(EXCEPTIONS.get((ending, unit)) or RULES[ending], reserved, actual)


def _charged(rule: Rule, reserved: float, actual: float | None) -> float:
    if rule == "refund":
        return 0.0
    if rule == "settle" and actual is not None and 0.0 <= actual < float("inf"):  # a provider may say anything
        return actual
    return reserved


class Cell(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule that holds for one provider instead of the generic one."""

    ending: Ending
    unit: str
    rule: Rule


class Accounting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a provider counts.

    Args:
        reserves: What of the output a call takes of a token quota when it is admitted: "max_tokens", or "actual" for
            what it really writes.
        settles: Whether what was reserved and not written comes back at the end.
        cached: Whether input that was read from a cache counts.
        apart: Whether input and output have quotas of their own ("input_tokens", "output_tokens").
        smoothing: Seconds in which the provider may judge a quota of a minute, in proportion; 0: only the minute.
        strategy: How it counts in time.
        dialect: Which limit headers it sends.
        windows: Unit -> seconds that its headers are about, where they do not say it.
        snapshot: When the state is taken that its headers tell: when the call was admitted, or when it was answered.
        cells: Rules of its own, by ending and unit.
        uncertain: Names of the fields here that are inferred, or on which texts disagree.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.

    >>> ANTHROPIC.costs(900, 100, max_tokens=4000, cached=600)
    {'requests': 1.0, 'tokens': 400.0, 'input_tokens': 300.0, 'output_tokens': 100.0}
    >>> OPENAI.costs(900, 100, max_tokens=4000)["tokens"]
    4900.0
    >>> [str(quota) for quota in AZURE_OPENAI.quotas(Quota("600/minute"))]
    ['600 requests per 60 seconds', '100 requests per 10 seconds']
    """

    reserves: Literal["max_tokens", "actual"] = "actual"
    settles: bool = True
    cached: bool = True
    apart: bool = False
    smoothing: float = 0.0
    strategy: Strategy = "sliding"
    dialect: Literal["x-ratelimit", "anthropic", "none"] = "x-ratelimit"
    windows: tuple[tuple[str, float], ...] = ()
    snapshot: Literal["admitted", "answered"] = "admitted"
    cells: tuple[Cell, ...] = ()
    uncertain: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        check_number("smoothing", self.smoothing, least=0)
        check_choice("reserves", self.reserves, ("max_tokens", "actual"))
        check_choice("snapshot", self.snapshot, ("admitted", "answered"))
        unknown = self.uncertain.difference(self.__struct_fields__)
        if unknown:
            raise ConfigError(f"uncertain must name fields of Accounting, got {', '.join(sorted(unknown))}")

    def costs(
        self, inputs: float, outputs: float, *, max_tokens: float | None = None, cached: float = 0.0
    ) -> dict[str, float]:
        """Return what a call takes when it is admitted, by unit, whichever quotas there are.

        Args:
            inputs: Input tokens, cached ones included: estimated.
            outputs: Output tokens: estimated.
            max_tokens: The most output tokens that it asks for; None: it does not say.
            cached: Input tokens that will be read from a cache, as far as is known.
        """
        if self.reserves == "max_tokens" and max_tokens is not None:
            outputs = max_tokens
        return self._amounts(inputs, outputs, cached)

    def used(self, inputs: float, outputs: float, *, cached: float = 0.0) -> dict[str, float]:
        """Return what a call that was answered has taken, by unit; without those that keep what they reserved.

        Args:
            inputs: Input tokens, cached ones included: as the reply says.
            outputs: Output tokens: the same.
            cached: Input tokens that were read from a cache: the same.
        """
        return self._amounts(inputs, outputs, cached) if self.settles else {"requests": 1.0}

    def charge(self, ending: Ending, unit: str, reserved: float, actual: float | None) -> float:
        """Return what a try costs of a quota: as `charge`, but for the cells of this provider."""
        for cell in self.cells:
            if cell.ending == ending and cell.unit == unit:
                return _charged(cell.rule, reserved, actual)
        return charge(ending, unit, reserved, actual)

    def quotas(self, quota: Quota) -> tuple[Quota, ...]:
        """Return `quota`, and for requests the one over the shorter time in which this provider may judge it.

        In that time whole requests have room: 2 in 1.2 s for 100 a minute, not 1.67 in 1 s, of which one would be lost.
        Tokens have none: one large call needs more of them than such a time holds, and is admitted all the same.
        """
        if quota.unit != "requests" or not 0 < self.smoothing < quota.per:
            return (quota,)
        limit = math.ceil(quota.limit * self.smoothing / quota.per - SLIGHT)
        if limit >= quota.limit:
            return (quota,)
        per = limit * quota.per / quota.limit
        return quota, msgspec.structs.replace(quota, limit=limit, per=per, burst=None, state=None)

    def window(self, unit: str, default: float = 60.0) -> float:
        """Return the seconds that a header about `unit` means."""
        return dict(self.windows).get(unit, default)

    def _amounts(self, inputs: float, outputs: float, cached: float) -> dict[str, float]:
        counted = float(inputs if self.cached else max(0.0, inputs - cached))
        return {
            "requests": 1.0,
            "tokens": counted + outputs,
            "input_tokens": counted,
            "output_tokens": float(outputs),
        }


# Facts as of 2026. Each line says where it is from; the fields that `uncertain` names are not sure.

# What most do; nothing is known of a server that is not named below.
SLIGHT = 1e-9  # of a request: what divisions leave over

GENERIC = Accounting(uncertain=frozenset(Accounting.__struct_fields__) - {"uncertain"})

OPENAI = Accounting(
    reserves="max_tokens",  # the larger of max_tokens and an estimate from characters: guides/rate-limits
    settles=False,  # inferred from that: nothing says that the rest comes back
    cached=True,  # "caching does not affect rate limits": guides/prompt-caching
    smoothing=1.0,  # "60 requests a minute may be enforced as 1 a second": help centre, article 5955604
    strategy="bucket",  # inferred: resets of some ms, and a reset to the full state
    windows=(("requests", 60.0), ("tokens", 60.0)),  # some tiers also have a quota of requests a day
    # Unsuccessful requests count (help centre, article 5955604): that is the generic rule.
    uncertain=frozenset({"settles", "smoothing", "strategy", "windows", "snapshot"}),
)

AZURE_OPENAI = Accounting(
    reserves="max_tokens",  # an estimate from prompt, max_tokens and best_of: learn.microsoft.com, how-to/quota
    settles=False,  # "a running count that resets each minute": the same; an answer there says that it comes back
    smoothing=10.0,  # requests are judged over 1 or 10 s: the same page
    strategy="fixed",  # "resets each minute": the same
    # The limit for requests was seen as 1/60 or 1/6 of that of the minute; resets are whole seconds; -1 and 0
    # instead of what is unknown: learn.microsoft.com, questions 2265464 and 5625878.
    windows=(("requests", 10.0), ("tokens", 60.0)),
    uncertain=frozenset({"settles", "cached", "smoothing", "strategy", "windows", "snapshot"}),
)

ANTHROPIC = Accounting(
    reserves="actual",  # max_tokens does not matter, output counts as it is produced: api/rate-limits; an older
    #                     text of the same page reserves max_tokens and settles at the end
    cached=False,  # cache reads do not count but with the oldest models, cache writes do: the same
    apart=True,  # input and output tokens a minute: the same
    smoothing=1.0,  # "60 a minute may be enforced as 1 a second": the same
    strategy="bucket",  # "token bucket algorithm": the same
    dialect="anthropic",  # the same; tokens that remain are rounded to thousands
    uncertain=frozenset({"reserves", "smoothing", "snapshot"}),
)

GROQ = Accounting(
    cached=False,  # "cached tokens do not count": console.groq.com/docs/rate-limits
    windows=(("requests", 86_400.0), ("tokens", 60.0)),  # headers: requests a *day*, tokens a minute: the same
    strategy="bucket",  # inferred: its example, 2m59.56s for 30 of 14,400 requests a day, is how a bucket fills
    uncertain=frozenset({"reserves", "settles", "strategy", "snapshot", "smoothing"}),
)

VLLM = Accounting(
    dialect="none",  # no quota, an unbounded queue and no 429 by default: vllm issues 13395, 18826
    cells=(Cell("refused", "requests", "refund"),),  # what sits in front of it may refuse, and counts nothing
    uncertain=frozenset({"cells"}),
)

ACCOUNTING: dict[str, Accounting] = {
    "generic": GENERIC,
    "openai": OPENAI,
    "azure_openai": AZURE_OPENAI,
    "anthropic": ANTHROPIC,
    "groq": GROQ,
    "vllm": VLLM,
}


def accounting_of(given: Accounting | str) -> Accounting:
    """Return the preset of that name; an `Accounting` is one already.

    Raises:
        ConfigError: there is no such preset.
    """
    if isinstance(given, Accounting):
        return given
    check_choice("accounting", given, tuple(ACCOUNTING))
    return ACCOUNTING[given]
