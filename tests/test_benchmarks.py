"""Each benchmark runs in its tiny size, says what it should, and loses nothing: figures are for the full size alone."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rxllm

ROOT = Path(__file__).resolve().parents[1]
EVERY = {"benchmark", "case", "unit", "loop", "python"}
GOALS_OF_STREAMS = {"against_loop": 1.5, "against_openai": 0.1, "first_text": 1.05}


def run(name: str) -> dict[str, dict[str, Any]]:
    """Return the JSON lines of a benchmark, by case; a benchmark checks its own results and exits otherwise."""
    path = os.pathsep.join([str(Path(rxllm.__path__[0]).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "benchmarks" / f"{name}.py"), "--tiny"],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(line.keys() >= EVERY and line["benchmark"] == name for line in lines)
    cases = {line["case"]: line for line in lines}
    assert len(cases) == len(lines)
    return cases


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_memory_measures_growth_bounds_and_the_share_of_two_stages() -> None:
    cases = run("memory")
    assert set(cases) == {"call", "one_stage", "two_stages_equal", "two_stages_unequal", "two_stages_unequal_late"}
    for case in cases.values():
        assert case["delivered"] == case["items"]
        assert all(
            most <= bound for most, bound in zip(case["started_minus_passed_on"], case["stage_bounds"], strict=True)
        )
        assert case["pulled_minus_delivered"] <= case["pipeline_bound"]
        assert case.keys() >= {"goal", "met"}
    assert cases["one_stage"].keys() >= {"before", "after", "growth", "us_cpu_per_item", "seconds"}
    assert all(case.keys() >= {"share", "two_stages", "slower_alone"} for name, case in cases.items() if "two" in name)


def test_operators_measures_each_operator_and_the_depth_of_the_stack() -> None:
    cases = run("operators")
    assert {"bounded", "expand", "overflow", "retry", "tee", "timeout", "validate"} < set(cases)
    assert {"flat_map_sync", "flat_map_async", "flat_map_ordered", "from_iterable", "Feed"} < set(cases)
    assert {"stock_pipe", "stock_pipe_on_ours", "stock_flat_map_async", "stock_retry"} < set(cases)
    for name, case in cases.items():
        if name.startswith("depth_"):
            assert case["depth"] == case["depth_of_100"], name
            assert case["met"] is True
        else:
            assert case.keys() >= {"total", "added", "over", "items", "rounds"}
            assert all(value > 0 for value in case["total"])
            assert case["over"] is None or case["over"] in cases


def test_handoff_measures_what_iterate_adds_and_what_slow_consumers_take() -> None:
    cases = run("handoff")
    assert set(cases) == {"iterate_plain", "iterate_flat_map", "slow_consumers"}
    assert all(case.keys() >= {"goal", "met", "items", "rounds"} for case in cases.values())
    assert cases["iterate_plain"].keys() >= {"inside", "iterate", "more"}
    assert cases["slow_consumers"].keys() >= {"alone", "crowded", "share", "threads"}


def test_overhead_measures_both_loops_and_says_what_is_missing() -> None:
    cases = run("overhead")
    names = {f"asyncio_against_{other}" for other in ("plain", "tuned", "rate_limited", "openai")}
    assert names < set(cases)
    assert {name.replace("asyncio", "uvloop") for name in names} < set(cases) or "missing" in cases["uvloop"]
    for name, case in cases.items():
        assert case.keys() >= {"goal", "met"}
        assert "missing" in case or (case["loop"] == name.partition("_")[0] and case["ratio"][1] > 0)
    assert [cases[f"asyncio_against_{other}"]["goal"] for other in ("plain", "tuned")] == [1.0, 1.35]


def test_quota_judges_ours_the_others_and_a_shared_quota_by_the_log_of_the_server() -> None:
    cases = run("quota")
    assert {"12_calls", "requests_sliding", "tokens_bucket", "2_processes"} < set(cases)
    assert "mismatched_tokens_sliding_on_fixed_without_headers" in cases
    assert {"rate_limited", "rate_limited_requests_on_sliding"} & set(cases)
    assert {"openai", "openai_requests_on_sliding"} & set(cases)
    assert cases["12_calls"]["met"] is True
    for case in cases.values():
        assert case.keys() >= {"goal", "met"}
        if "used" in case and "capacity" in case:
            assert 0 < case["used"][0] <= 1.5
            assert case["answered"] + case["refused"] <= case["arrivals"]
            assert 0.1 < case["service"] < 1.0
    shared = cases["2_processes"]
    assert "missing" in shared or shared["peak"] <= shared["limit"]


def test_wide_counts_the_full_width_at_the_server() -> None:
    (case,) = run("wide").values()
    assert case["case"] == "32_in_flight"
    assert case["seen"] == case["seen_of_tuned"] == 32
    assert case["share"][1] > 0


def test_admission_measures_a_free_gate_and_a_queue_against_the_plain_loop() -> None:
    cases = run("admission")
    assert set(cases) == {"free", "queued"}
    assert all(case.keys() >= {"admission", "plain", "share", "goal", "met"} for case in cases.values())


def test_control_judges_controllers_side_by_side_and_the_oracle_meets_every_goal() -> None:
    cases = run("control")
    judged = {name: case for name, case in cases.items() if "/" in name and not name.startswith("worst/")}
    assert {name.partition("/")[2] for name in judged} >= {"oracle", "fixed_100", "aimd_per_reply"}
    for name, case in judged.items():
        scenario, _, controller = name.partition("/")
        figures = {"share", "refused", "refused_all", "rise_90", "p50_ratio"}
        figures |= {"least"} if scenario.startswith("two_clients") else set()
        assert all(case[figure].keys() == {"median", "worst", "goal", "met"} for figure in figures)
        assert case["met"] is all(case[figure]["met"] for figure in figures)
        assert case["met"] or controller != "oracle"
    assert not cases["bucket_30/fixed_100"]["refused"]["met"]
    assert (
        cases["worst/oracle"]["all_goals_met_in"]
        == cases["worst/oracle"]["of"]
        == len({name.partition("/")[0] for name in judged})
    )
    assert cases["speed"].keys() >= {"value", "goal", "met"}


def test_control_http_judges_the_controller_and_a_fixed_limit_by_the_log_of_each_server() -> None:
    cases = run("control_http")
    known = {"bucket_30", "ceiling_64", "knee_64"}
    if importlib.util.find_spec("llmock") is None:
        assert "missing" in cases.pop("llmock_rpm")
    else:
        known.add("llmock_rpm")
    assert set(cases) == {f"{name}/{side}" for name in known for side in ("pace_and_follow", "fixed_64")}
    for name, case in cases.items():
        assert case["arrivals"] > 0
        assert case["share"] > 0
        assert (case["goal"] is None) is (case["met"] is None) is name.endswith("fixed_64")
    assert cases["bucket_30/fixed_64"]["refused"] > 0.3
    assert cases["ceiling_64/fixed_64"]["refused"] == cases["knee_64/fixed_64"]["refused"] == 0.0


def test_stream_measures_chunks_first_texts_and_vectors_against_the_loop_and_the_sdk() -> None:
    cases = run("stream")
    names = {"stream_against_loop", "stream_against_openai", "stream_first_text"}
    names |= {name.replace("stream", "call", 1) for name in names}
    names |= {"embeddings_base64_against_openai", "embeddings_float_against_openai"}
    assert {f"asyncio_{name}" for name in names} < set(cases)
    assert {f"uvloop_{name}" for name in names} < set(cases) or "missing" in cases["uvloop"]
    for name, case in cases.items():
        assert case.keys() >= {"goal", "met"}
        assert "missing" in case or (case["loop"] == name.partition("_")[0] and case["ratio"][1] > 0)
    goals = [cases[f"asyncio_{mine}_{other}"]["goal"] for mine in ("stream", "call") for other in GOALS_OF_STREAMS]
    assert goals == [*GOALS_OF_STREAMS.values()] * 2


def test_journal_measures_what_a_row_adds_what_it_takes_to_go_on_and_the_index() -> None:
    cases = run("journal")
    assert set(cases) == {"added", "resume", "resume_asked", "resume_replayed", "index"}
    assert [cases[name]["goal"] for name in ("added", "resume", "index")] == [0.05, 3.0, 12.0]
    assert all(case.keys() >= {"goal", "met"} for case in cases.values())
    assert cases["added"]["share"][1] > 0
    assert 900 < cases["resume"]["file_bytes"] / cases["resume"]["rows"] < 1_100
    assert 12 <= cases["index"]["size"] < 30
