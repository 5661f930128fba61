"""Where attempts wait: quotas, a pace and a concurrency limit behind one admission.

    attempt ──▶ waiter ──▶ [ queue: first arrival first ] ──▶ lease ──▶ on the wire ──▶ settle
                              ▲ one timer, one look at all limits, no await in between

Admission is one synchronous step: it looks at every limit, and books in all or in none. What a try costs in the end is
decided when its lease is settled, by how it ended (`policies.accounting`).

What is decided here is decided in `policies`, without a clock: `ledger` keeps the quotas, `opening` what holds
everybody back, `line` says who is next, `admission` who may start now, `times` counts where the time goes. This
package is what does it on a loop:

    gate        what users and operators hold: it books, settles, and takes settings
    queue       lets those who wait start, with the `lookout` that says when to look again
    waiter      a place in the queue
    lease       a place on the wire
    lessons     what breaker and controller learn from attempts
    news        events, log and history
    quotas      what is given, and the meter that each quota gets
"""

from rxllm.gate.gate import WINDOW, Gate, Lane, lane_of
from rxllm.gate.lease import Lease
from rxllm.gate.waiter import Applicant, Waiter

__all__ = ["WINDOW", "Applicant", "Gate", "Lane", "Lease", "Waiter", "lane_of"]
