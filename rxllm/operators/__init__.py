"""Operators over observables, one a file. Import them under a name that is not `ops`: that is reactivex' own.

Each docstring shows a marble diagram and says what the operator emits and holds, and how it ends.
"""

from rxllm.operators.admit import admit
from rxllm.operators.bounded import bounded
from rxllm.operators.budget import budget
from rxllm.operators.cache import cache
from rxllm.operators.call import call
from rxllm.operators.expand import expand
from rxllm.operators.feedback import feedback
from rxllm.operators.flat_map import flat_map
from rxllm.operators.hedge import hedge
from rxllm.operators.journal import journal
from rxllm.operators.overflow import overflow
from rxllm.operators.retry import retry
from rxllm.operators.single_flight import single_flight
from rxllm.operators.tee import tee
from rxllm.operators.throttle import throttle
from rxllm.operators.timeout import timeout
from rxllm.operators.to_outcome import to_outcome
from rxllm.operators.validate import validate

__all__ = [
    "admit",
    "bounded",
    "budget",
    "cache",
    "call",
    "expand",
    "feedback",
    "flat_map",
    "hedge",
    "journal",
    "overflow",
    "retry",
    "single_flight",
    "tee",
    "throttle",
    "timeout",
    "to_outcome",
    "validate",
]
