"""The quotas of a gate as they are given, and the meter that each of them gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from rxllm.errors import ConfigError
from rxllm.policies.meters import Meter, meter
from rxllm.policies.quota import Quota, parse_quotas

if TYPE_CHECKING:
    from rxllm.policies.ledger import Ledger
    from rxllm.stores.base import OutsideMeter

__all__ = ["meter_of", "outside_meters", "read_quotas"]


def read_quotas(given: tuple[Quota | str, ...]) -> tuple[Quota, ...]:
    """Return the quotas that are given, as values or as texts.

    Raises:
        ConfigError: one is neither.
    """
    found: list[Quota] = []
    for quota in given:
        if isinstance(quota, Quota):
            found.append(quota)
        elif isinstance(quota, str):
            found.extend(parse_quotas(quota))
        else:
            msg = f'a quota must be a Quota or a text such as "500 requests/minute", got {quota!r}'
            raise ConfigError(msg)
    return tuple(found)


def meter_of(quota: Quota, most: float | None) -> Meter:
    """Return a new meter for `quota`; what few need is imported when it is needed."""
    if quota.store is not None:
        from rxllm.stores.shared_quota import shared_meter  # noqa: PLC0415

        return shared_meter(quota)
    if quota.state is not None:
        from rxllm.stores.state import kept_meter  # noqa: PLC0415

        return kept_meter(quota)
    return meter(quota, most=most)


def outside_meters(ledger: Ledger) -> list[OutsideMeter]:
    """Return the meters that have I/O behind them."""
    rows = zip(ledger.quotas, ledger.meters, strict=False)
    return [cast("OutsideMeter", gauge) for quota, gauge in rows if quota.store or quota.state]
