"""A controller of your own: stock operators from signals to settings, at work on a server that nobody has described.

    python examples/own_controller.py

A simulated provider refuses what comes on top of 24 calls at a time, and later on top of 12. The controller adds a
place for each round of good answers, takes a quarter off at a refusal, and listens to a refusal only once for each
setting.
"""

import reactivex as rx
from reactivex import operators as ops

import rxllm
from rxllm.messages import Setting, Signal
from rxllm.testing import SimulatedProvider


def additive(signals: rx.Observable[Signal]) -> rx.Observable[Setting]:
    """Raise the limit by one for each round of answers, and lower it by a quarter at a refusal."""

    def step(now: tuple[float, int, bool], signal: Signal) -> tuple[float, int, bool]:
        limit, epoch, _ = now
        if signal.kind == "refused" and signal.epoch >= epoch:  # it started under the limit that holds
            return max(1.0, limit * 0.75), epoch + 1, True
        grown = limit + 1 / limit if signal.kind == "ok" and signal.binding else limit
        return grown, epoch + (int(grown) > int(limit)), int(grown) > int(limit)

    return signals.pipe(
        ops.scan(step, (4.0, 1, False)),  # the setting below is the first
        ops.filter(lambda now: now[2]),
        ops.map(lambda now: Setting(limit=int(now[0]), rate=None, reason="own controller")),
        ops.start_with(Setting(limit=4, rate=None, reason="begin small")),
    )


def main() -> None:
    """Ask 3,000 questions and say how the limit moved."""
    steps = [(2.0, {"max_in_flight": 12})]
    with SimulatedProvider(latency=0.02, max_in_flight=24, fault_retry_after=0.02, steps=steps).start() as provider:
        client = rxllm.OpenAI(model="simulated", base_url=provider.url, api_key="any")
        gate = rxllm.Gate(concurrency=additive, headers=False)
        questions = rxllm.from_iterable(rxllm.chat(f"Question {n}") for n in range(3_000))
        answered = 0
        with rxllm.iterate(questions.pipe(rxllm.call(client, gate=gate))) as outcomes:
            for outcome in outcomes:
                answered += outcome.ok
        told = gate.statistics()
        limits = " ".join(str(change.limit) for change in told.settings[-20:])
        print(f"{answered} of 3000 answered, {told.refused / told.admitted:.1%} of the attempts refused")
        print(f"the last limits: {limits}")


if __name__ == "__main__":
    main()
