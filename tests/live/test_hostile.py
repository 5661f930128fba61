"""2,000 requests against a server that does everything wrong: each gives one outcome, and its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import warnings
from collections import Counter
from collections.abc import Callable

import pytest

import rxllm
from rxllm import Backoff, Gate, Outcome, Timeouts
from rxllm.errors import CallError
from rxllm.testing.simulated import Latency, ServerQuota, SimulatedProvider, fingerprint

COUNT = 2_000
LIMIT = 48
FAULTS = {
    "429": 0.02,
    "429_bare": 0.02,
    "500": 0.02,
    "503": 0.02,
    "529": 0.01,
    "408": 0.01,
    "400": 0.01,
    "insufficient_quota": 0.005,
    "reset": 0.02,
    "hang_up": 0.02,
    "stall": 0.01,
    "truncated": 0.02,
    "garbled": 0.02,
    "wrong_shape": 0.02,
    "empty": 0.01,
    "html": 0.01,
    "html_502": 0.02,
}
FINAL = {400, 429}  # statuses of errors that no retry cures here: a bad request, an empty balance


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
with contextlib.suppress(ImportError):
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop


@pytest.mark.parametrize(("loop", "hang_up"), list(zip(LOOPS, ("idle", "reuse"), strict=False)))
def test_every_request_gives_exactly_one_outcome_and_each_answer_is_its_own(loop, hang_up):
    provider = SimulatedProvider(
        seed=3,
        faults=FAULTS,
        fault_retry_after=0.02,
        latency=Latency(base=0.004, per_token=0.0001, sigma=0.5),
        max_in_flight=LIMIT,
        requests=ServerQuota(600, per=1.0),
        tokens=ServerQuota(80_000, per=1.0),
        requests_per_connection=20,
        hang_up=hang_up,
        max_stall=5.0,
    )
    gate = Gate("550 requests/1 second", "78_000 tokens/1 second", concurrency=LIMIT)
    pulled: list[str] = []

    def prompts():
        for n in range(COUNT):
            pulled.append(f"Prompt {n}: {'word ' * (n % 37)}")
            yield rxllm.chat(pulled[-1], id=str(n), max_tokens=64 + n % 16)

    async def main() -> list[Outcome[str]]:
        async with provider, rxllm.OpenAI("m", provider.url, api_key="any") as client:
            answers = rxllm.call(
                client,
                gate=gate,
                retry=Backoff(attempts=8, base=0.01, cap=0.1),
                timeouts=Timeouts(first_byte=0.5, idle=0.5),
                deadline=50.0,
                seed=5,
            )
            return await rxllm.acollect(rxllm.from_iterable(prompts()).pipe(answers))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            outcomes = runner.run(main())
        gc.collect()

    # each exactly once, and with its own answer
    assert Counter(outcome.request.id for outcome in outcomes) == Counter(str(n) for n in range(COUNT))
    for outcome in outcomes:
        prompt = pulled[int(outcome.request.id or "")]
        assert outcome.request.body["messages"][0]["content"] == prompt
        if outcome.reply is not None:
            assert outcome.text.endswith(f"[{fingerprint(prompt)}]")
            assert fingerprint(prompt) in (outcome.reply.id or "")

    # what failed failed for good
    failed = [outcome for outcome in outcomes if not outcome.ok]
    assert 0 < len(failed) < COUNT * 0.06
    for outcome in failed:
        error = outcome.error
        assert isinstance(error, CallError)
        assert (not error.transient and error.status in FINAL) or len(outcome.attempts) >= 8
        assert outcome.attempts[-1].error is error

    # as the server saw it
    log = provider.log()
    reasons = log.reasons()
    assert set(FAULTS) <= set(reasons)
    assert log.peak(1.0) <= 600
    assert log.peak(1.0, "tokens") <= 80_000
    assert provider.statistics().max_in_flight <= LIMIT
    assert reasons["max_in_flight"] <= reasons["stall"]  # given up here, and not yet noticed there
    assert reasons["requests"] + reasons["tokens"] <= COUNT * 0.02
    answered = Counter(arrival.marker for arrival in log if arrival.reason == "ok" and arrival.answered is not None)
    assert set(answered.values()) == {1}  # no good answer was thrown away and paid again
    assert len(answered) == COUNT - len(failed)
    seen_here = sum(len(outcome.attempts) for outcome in outcomes)
    again_at_once = len(log) - seen_here  # on connections that were gone; of those in the log not all arrived
    assert 0 <= again_at_once <= reasons["reset"] + reasons["hang_up"] + reasons["hung_up"]
    assert gate.statistics().in_flight == gate.statistics().waiting == 0
