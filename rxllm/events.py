"""What happens at a gate, as values: `gate.events` is a stream of them.

Times are steady seconds of the loop that the gate is used on.
"""

import msgspec

from rxllm.policies.accounting import Ending
from rxllm.policies.quota import Quota

__all__ = [
    "Admitted",
    "BreakerChanged",
    "Ended",
    "Event",
    "Learned",
    "Paused",
    "Resumed",
    "SettingChanged",
    "StoreChanged",
    "Suspended",
]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something happened at `at`."""

    at: float  # steady seconds


class Admitted(Event, frozen=True, kw_only=True):
    """An attempt started."""

    waited: float  # seconds in the queue
    in_flight: int  # with this one


class Ended(Event, frozen=True, kw_only=True):
    """An attempt ended."""

    ending: Ending
    seconds: float  # on the wire
    in_flight: int  # without this one


class Suspended(Event, frozen=True, kw_only=True):
    """A quota is used up, and nothing starts for more than a minute."""

    quota: Quota
    seconds: float  # until the next attempt starts


class Resumed(Event, frozen=True, kw_only=True):
    """Attempts start again after a `Suspended`."""

    seconds: float  # since then


class Paused(Event, frozen=True, kw_only=True):
    """A refusal said when to come again, and the gate lets nothing start until then."""

    seconds: float


class Learned(Event, frozen=True, kw_only=True):
    """The headers of a reply stated a quota that nobody had given, or another limit for one."""

    quota: Quota


class SettingChanged(Event, frozen=True, kw_only=True):
    """The limit or the pace changed."""

    limit: int | None
    rate: float | None  # starts per second
    reason: str


class BreakerChanged(Event, frozen=True, kw_only=True):
    """The server has answered nothing for long and only probes start any more; or it answers again."""

    is_open: bool
    reason: str


class StoreChanged(Event, frozen=True, kw_only=True):
    """The store of a shared quota does not answer any more, or does again."""

    quota: Quota
    reachable: bool
    reason: str
