"""The gate and what servers say of their quotas: headers, learned quotas, shares, accounting, and where time goes."""

import itertools
import pickle

import pytest
import reactivex as rx

from rxllm import errors
from rxllm.gate import Gate
from rxllm.messages import Reply, Usage
from rxllm.operators import admit, retry
from rxllm.policies import OPENAI, Backoff, Limits, Quota, Ramp, Truth
from rxllm.testing import Script, VirtualScheduler, record


def says(unit="requests", limit=10.0, remaining=None, reset=60.0, window=None):
    return Limits((Truth(unit=unit, limit=limit, remaining=remaining, reset=reset, window=window),))


def reply(limits=None, tokens=0):
    return Reply(value="x", usage=Usage(output_tokens=tokens), limits=limits)


def available(gate):
    return [quota.available for quota in gate.statistics().quotas]


def test_what_others_use_of_the_key_counts_from_the_next_reply_on():
    scheduler, gate = VirtualScheduler(), Gate("10 requests/minute")
    record(scheduler, Script((1.0, reply(says(remaining=4.0)))).pipe(admit(gate)))
    assert available(gate) == [4.0]


def test_a_server_that_admits_more_does_not_raise_what_the_user_has_stated():
    scheduler, gate = VirtualScheduler(), Gate("10 requests/minute")
    record(scheduler, Script((1.0, reply(says(limit=500.0, remaining=499.0)))).pipe(admit(gate)))
    assert available(gate) == [9.0]


def test_a_unit_without_a_quota_gets_the_one_that_the_headers_state():
    scheduler, gate = VirtualScheduler(), Gate()
    record(scheduler, Script((1.0, reply(says(limit=3.0, remaining=2.0)))).pipe(admit(gate)))
    [learned] = gate.statistics().quotas
    assert (learned.quota.limit, learned.quota.per, learned.learned) == (3.0, 60.0, True)
    stream = Script((1.0, reply())).pipe(admit(gate))
    seen = [record(scheduler, stream, until=scheduler.seconds() + 2) for _ in range(3)]
    assert [len(one.values) for one in seen] == [1, 1, 0]  # the third waits for the minute to pass
    assert "requests" in gate.explain().binding
    scheduler.run()
    assert len(seen[2].values) == 1


def test_a_learned_quota_gets_the_window_that_its_resets_show():
    scheduler, gate = VirtualScheduler(), Gate()
    for used in range(1, 41):  # a bucket of 100 in 2 s
        script = Script((0.0, reply(says(limit=100.0, remaining=100.0 - used, reset=used * 2.0 / 100.0))))
        record(scheduler, script.pipe(admit(gate)), until=scheduler.seconds())
    [learned] = gate.statistics().quotas
    assert 2.0 <= learned.quota.per <= 2.1
    assert learned.learned
    assert gate.statistics().quotas[0].available == pytest.approx(60.0, abs=1.0)
    for _ in range(61):
        last = record(scheduler, Script((0.0, reply())).pipe(admit(gate)), until=scheduler.seconds())
    assert not last.values
    scheduler.run(scheduler.seconds() + 0.05)  # not the 0.6 s of a minute's quota
    assert last.values


def test_a_window_that_the_accounting_knows_is_not_guessed():
    scheduler, gate = VirtualScheduler(), Gate(accounting=OPENAI)
    for used in range(1, 41):
        script = Script((0.0, reply(says(limit=100.0, remaining=100.0 - used, reset=used * 2.0 / 100.0))))
        record(scheduler, script.pipe(admit(gate)), until=scheduler.seconds())
    [learned] = gate.statistics().quotas
    assert learned.quota.per == 60.0


def test_what_waits_when_a_quota_is_learned_is_admitted_all_the_same():
    scheduler, gate = VirtualScheduler(), Gate(concurrency=1)
    first = Script((1.0, reply(says("tokens", limit=100.0, remaining=90.0))))
    record(scheduler, first.pipe(admit(gate, cost={"requests": 1, "tokens": 10})), until=0.5)
    waiting = record(scheduler, Script((1.0, reply())).pipe(admit(gate, cost={"requests": 1, "tokens": 10})))
    assert len(waiting.values) == 1
    assert gate.statistics().in_flight == 0


def test_a_refusal_tells_the_truth_as_well():
    error = errors.RateLimitedError("no", 429)
    error.limits = says(remaining=0.0, reset=30.0)
    scheduler, gate = VirtualScheduler(), Gate("10 requests/minute")
    record(scheduler, Script((1.0, error)).pipe(admit(gate)))
    assert available(gate) == [0.0]


def test_statements_about_other_windows_and_units_change_nothing():
    scheduler, gate = VirtualScheduler(), Gate("10 requests/minute")
    for limits in (says(window=86_400.0, remaining=0.0), says("images", remaining=0.0)):
        record(scheduler, Script((0.001, reply(limits))).pipe(admit(gate)))
    assert available(gate) == [8.0]


def test_malformed_headers_are_counted():
    scheduler, gate = VirtualScheduler(), Gate()
    record(scheduler, Script((1.0, reply(Limits(malformed=3)))).pipe(admit(gate)))
    assert gate.statistics().malformed == 3


def test_a_quota_that_the_server_lowers_below_a_waiting_cost_turns_it_away():
    scheduler, gate = VirtualScheduler(), Gate("100 tokens/minute")
    lowered = Script((1.0, reply(says("tokens", limit=20.0, remaining=0.0))))
    record(scheduler, lowered.pipe(admit(gate, cost={"tokens": 80})), until=0.5)
    large = record(scheduler, Script((1.0, reply())).pipe(admit(gate, cost={"tokens": 50})), until=10.0)
    assert isinstance(large.end.value, errors.InvalidRequestError)
    assert "50 tokens" in str(large.end.value)
    assert "20" in str(large.end.value)
    small = record(scheduler, Script((1.0, reply())).pipe(admit(gate, cost={"tokens": 5})))
    assert len(small.values) == 1


def test_a_share_takes_its_part_of_each_quota():
    gate = Gate("100 requests/minute", "7 tokens/minute", share=0.5)
    assert available(gate) == [50.0, 3.5]
    assert available(pickle.loads(pickle.dumps(gate))) == [50.0, 3.5]


@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan"), "half"])
def test_a_bad_share_is_named(share):
    with pytest.raises(errors.ConfigError, match="share"):
        Gate(share=share)


def test_accounting_may_judge_a_quota_in_less_time():
    assert [quota.quota.per for quota in Gate("600/minute", accounting="azure_openai").statistics().quotas] == [60, 10]


def test_accounting_decides_what_a_try_costs():
    scheduler = VirtualScheduler()
    cost = {"requests": 1, "tokens": 80}
    left = {}
    for name in ("generic", "openai"):
        gate = Gate("100 tokens/minute", accounting=name)
        record(scheduler, Script((1.0, reply(tokens=30))).pipe(admit(gate, cost=cost)))
        left[name] = available(gate)[0]
    assert left["generic"] == 70.0
    assert left["openai"] == pytest.approx(20.0)  # what was reserved does not come back
    assert not OPENAI.settles


def test_an_unknown_accounting_is_named():
    with pytest.raises(errors.ConfigError, match="accounting.*bedrock"):
        Gate(accounting="bedrock")


def test_explain_says_where_the_time_went_and_what_binds():
    scheduler, gate = VirtualScheduler(), Gate(concurrency=1)
    script = Script((2.0, errors.ServerError("once")), (2.0, reply()))
    stream = script.pipe(admit(gate), retry(Backoff(base=1.0, cap=1.0), draw=lambda _low, high: high))
    recorders = [
        record(scheduler, stream, until=0.0),
        record(scheduler, Script((3.0, reply())).pipe(admit(gate)), until=0.5),
    ]
    assert gate.explain().binding == "concurrency: 1 of 1 on the wire"
    scheduler.run()
    assert all(recorder.values for recorder in recorders)
    assert gate.explain().seconds == {"network": 7.0, "concurrency": 2.0 + 2.0, "back-off": 1.0}
    text = str(gate.explain())
    assert "58%" in text
    assert "network" in text


def test_a_full_quota_is_named_with_how_full_it_is():
    scheduler, gate = VirtualScheduler(), Gate(Quota(4, per=60.0))
    for _ in range(5):
        record(scheduler, Script((1.0, reply())).pipe(admit(gate)), until=3.0)
    assert gate.explain().binding == "4 requests per 60 seconds: 100%"
    assert gate.explain().fill == {"4 requests per 60 seconds": 1.0}


def test_a_second_user_of_the_key_is_noticed_before_a_refusal():
    import asyncio

    from rxllm.testing import SimulatedProvider

    async def main():
        quota = rxllm.testing.ServerQuota(40, per=1.0)
        async with SimulatedProvider(requests=quota, latency=0.01) as provider:
            async with rxllm.OpenAI("any", provider.url, api_key="x") as client:
                ours, other = Gate(Quota(40, per=1.0), concurrency=8), Gate(Quota(10, per=1.0), concurrency=2)
                pipelines = [
                    rxllm.acollect(rxllm.from_iterable(["hi"] * n).pipe(rxllm.call(client, gate=gate)))
                    for n, gate in ((70, ours), (20, other))
                ]
                results = await asyncio.gather(*pipelines)
            assert all(outcome.ok for outcomes in results for outcome in outcomes)
            return provider.statistics().statuses.get(429, 0), ours.statistics()

    import rxllm.testing

    refused, statistics = asyncio.run(main())
    assert refused <= 9  # 2 to 4; without the headers 18
    assert statistics.malformed == 0


def test_a_gate_may_be_told_to_heed_no_headers():
    scheduler, gate = VirtualScheduler(), Gate("10 requests/minute", headers=False)
    record(scheduler, Script((1.0, reply(says(remaining=0.0)))).pipe(admit(gate)))
    assert available(gate) == [9.0]
    assert available(pickle.loads(pickle.dumps(gate))) == [10.0]
    with pytest.raises(errors.ConfigError, match="headers.*'yes'"):
        Gate(headers="yes")


def starts(scheduler, gate, count):
    """Return when so many attempts that all wait from the beginning start."""
    at = []
    for _ in range(count):
        stream = rx.defer(lambda _: at.append(scheduler.seconds()) or rx.of(reply()))
        stream.pipe(admit(gate)).subscribe(scheduler=scheduler)
    scheduler.run()
    return at


def test_a_ramp_begins_slowly_and_ends_at_the_stated_rate():
    gate = Gate(rate=8.0, ramp=Ramp(initial=1.0, seconds=6.0))  # doubles every 2 s
    at = starts(VirtualScheduler(), gate, 60)
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert at[0] == 0.0
    assert gaps[0] == pytest.approx(1.0, abs=0.002)
    assert all(later <= earlier + 0.002 for earlier, later in itertools.pairwise(gaps))
    for begin, rate in ((0.0, 2.0), (2.0, 4.0), (4.0, 8.0)):
        assert sum(begin <= start < begin + 2 for start in at) <= 2 * rate + 1
    assert gaps[-1] == pytest.approx(1 / 8, abs=0.002)
    assert gate.statistics().rate == 8.0


def test_a_ramp_to_a_quota_leaves_no_pace_behind():
    gate = Gate("40 requests/5 seconds", ramp=Ramp(initial=1.0, seconds=3.0))
    at = starts(VirtualScheduler(), gate, 40)
    assert sum(start < 1.0 for start in at) <= 3
    assert gate.statistics().rate is None
    assert max(at) < 6.0


@pytest.mark.parametrize(("ramp", "words"), [(5, "ramp must be a Ramp, got 5"), (Ramp(initial=1, seconds=1), "rate")])
def test_a_ramp_without_an_end_is_refused(ramp, words):
    with pytest.raises(errors.ConfigError, match=words):
        Gate("5 tokens/minute", ramp=ramp)


def test_a_ramp_is_pickled_with_its_gate():
    gate = Gate(rate=8.0, ramp=Ramp(initial=1.0, seconds=6.0))
    scheduler = VirtualScheduler()
    starts(scheduler, gate, 3)
    again = pickle.loads(pickle.dumps(gate))
    assert starts(VirtualScheduler(), again, 2) == [0.0, pytest.approx(1.0, abs=0.002)]


def test_a_long_quota_that_is_used_up_says_until_when(caplog):
    scheduler, gate = VirtualScheduler(), Gate("2/day")
    assert gate.statistics().resumes_in is None
    with caplog.at_level("WARNING", logger="rxllm.gate"):
        for _ in range(4):
            record(scheduler, Script((1.0, reply())).pipe(admit(gate)), until=scheduler.seconds() + 1)
    day = 86_400 + 0.05
    assert gate.statistics().resumes_in == pytest.approx(1.0 + day - 4.0)  # both share a slot: it goes with the later
    [line] = caplog.messages
    assert "2 requests per 86400 seconds is used up" in line
    scheduler.run()
    assert gate.statistics().resumes_in is None
    assert gate.statistics().admitted == 4
