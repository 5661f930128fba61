"""The example draws its picture as a newcomer would have it drawn."""

import subprocess
import sys
from pathlib import Path

import rxllm

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_saves_a_picture_and_says_where(tmp_path):
    file = tmp_path / "run.png"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "picture.py"), str(file), "--seconds", "1"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={"PYTHONPATH": ":".join([str(Path(rxllm.__path__[0]).parent), *filter(None, sys.path)])},
    )
    assert done.returncode == 0, done.stderr
    assert "answers; limited by" in done.stdout
    assert done.stdout.splitlines()[-1] == f"the picture is {file}"
    assert file.read_bytes().startswith(b"\x89PNG")
