"""Pure policies: values and state machines without a clock, without I/O and without streams.

Time, random draws and counts come in as arguments.
"""

from rxllm.policies.accounting import Ending, charge
from rxllm.policies.backoff import Backoff, Draw
from rxllm.policies.meters import Meter, meter
from rxllm.policies.pace import Pace, PaceTicket
from rxllm.policies.quota import Quota, Strategy, parse_quotas
from rxllm.policies.sliding import SlidingLog, Ticket
from rxllm.policies.timeouts import Timeouts
from rxllm.policies.validation import Validate

__all__ = [
    "Backoff",
    "Draw",
    "Ending",
    "Meter",
    "Pace",
    "PaceTicket",
    "Quota",
    "SlidingLog",
    "Strategy",
    "Ticket",
    "Timeouts",
    "Validate",
    "charge",
    "meter",
    "parse_quotas",
]
