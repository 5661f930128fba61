"""Pure policies: values and state machines without a clock, without I/O and without streams.

Time, random draws and counts come in as arguments.
"""

from rxllm.policies.accounting import (
    ACCOUNTING,
    ANTHROPIC,
    AZURE_OPENAI,
    GENERIC,
    GROQ,
    OPENAI,
    VLLM,
    Accounting,
    Cell,
    Ending,
    Rule,
    charge,
)
from rxllm.policies.aimd import AdaptiveConcurrencyParams, Aimd, aimd
from rxllm.policies.backoff import Backoff, Draw
from rxllm.policies.breaker import Breaker, BreakerState
from rxllm.policies.bucket import TokenBucket
from rxllm.policies.budget import RetryBudget
from rxllm.policies.connection import Connection
from rxllm.policies.control import Machine
from rxllm.policies.fixed import FixedWindow
from rxllm.policies.follow import PaceAndFollow, pace_and_follow
from rxllm.policies.headers import Limits, Truth, read_limits
from rxllm.policies.hedging import Hedge
from rxllm.policies.meters import Meter, meter
from rxllm.policies.pace import Pace, PaceTicket
from rxllm.policies.prices import Price, Prices
from rxllm.policies.quota import Quota, Strategy, parse_quotas
from rxllm.policies.ramp import Ramp
from rxllm.policies.sliding import SlidingLog, Ticket
from rxllm.policies.spending import Spending, Spent
from rxllm.policies.store import Store
from rxllm.policies.timeouts import Timeouts
from rxllm.policies.tokens import TokenErrors, TokenEstimator
from rxllm.policies.validation import Validate

__all__ = [
    "ACCOUNTING",
    "ANTHROPIC",
    "AZURE_OPENAI",
    "GENERIC",
    "GROQ",
    "OPENAI",
    "VLLM",
    "Accounting",
    "AdaptiveConcurrencyParams",
    "Aimd",
    "Backoff",
    "Breaker",
    "BreakerState",
    "Cell",
    "Connection",
    "Draw",
    "Ending",
    "FixedWindow",
    "Hedge",
    "Limits",
    "Machine",
    "Meter",
    "Pace",
    "PaceAndFollow",
    "PaceTicket",
    "Price",
    "Prices",
    "Quota",
    "Ramp",
    "RetryBudget",
    "Rule",
    "SlidingLog",
    "Spending",
    "Spent",
    "Store",
    "Strategy",
    "Ticket",
    "Timeouts",
    "TokenBucket",
    "TokenErrors",
    "TokenEstimator",
    "Truth",
    "Validate",
    "aimd",
    "charge",
    "meter",
    "pace_and_follow",
    "parse_quotas",
    "read_limits",
]
