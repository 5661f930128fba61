"""A run is killed at random moments and started again: the server's log judges. RXLLM_KILLS=50 is the full size."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rxllm

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "resume.py"
KILLS = int(os.environ.get("RXLLM_KILLS", "3"))
REQUESTS = 40 * max(KILLS, 5)


@pytest.mark.slow
@pytest.mark.timeout(60 + 5 * KILLS)
def test_killed_at_random_moments_it_loses_nothing_and_repeats_only_what_was_on_the_way():
    path = os.pathsep.join([str(Path(rxllm.__path__[0]).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), "--requests", str(REQUESTS), "--kills", str(KILLS)],
        capture_output=True,
        text=True,
        timeout=50 + 5 * KILLS,
        check=False,
        env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    kills = re.findall(r"killed with +([\d,]+) answers in the journal and +(\d+) on the way", done.stdout)
    assert len(kills) == KILLS
    assert all(int(on_the_way) <= 16 for _, on_the_way in kills)
    more = int(re.search(r"asked [\d,]+ times: (-?\d+) more than there are questions", done.stdout)[1])
    assert 0 <= more <= sum(int(on_the_way) for _, on_the_way in kills)
    assert f"{REQUESTS} of {REQUESTS} answered, in this run and those before" in done.stdout
    assert "questions without an answer: 0; rows twice: 0" in done.stdout
