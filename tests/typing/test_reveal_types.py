"""Two type checkers read the files of this folder and object to the lines marked `# wrong`, to no others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FILES = sorted(path for path in HERE.glob("*.py") if not path.name.startswith("test_"))


def marked() -> set[tuple[str, int]]:
    return {
        (path.name, number)
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.endswith("# wrong")
    }


def run(*command: str) -> str:
    """Run a checker on all files at once, and return what it prints: whether it failed is in there."""
    done = subprocess.run(
        [sys.executable, "-m", *command, *map(str, FILES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # 1: found something; 2: did not work
    return done.stdout


def mypy() -> list[tuple[str, int, str]]:
    lines = [json.loads(line) for line in run("mypy", "--output=json").splitlines()]
    return [(Path(line["file"]).name, line["line"], line["message"]) for line in lines if line["severity"] == "error"]


def pyright() -> list[tuple[str, int, str]]:
    output = run("pyright", "--outputjson", "--pythonpath", sys.executable)
    return [
        (Path(line["file"]).name, line["range"]["start"]["line"] + 1, line["message"])
        for line in json.loads(output)["generalDiagnostics"]
        if line["severity"] == "error"
    ]


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_the_checkers_object_to_the_marked_lines_only(checker: object) -> None:
    assert callable(checker)
    found = checker()
    expected = marked()
    assert expected
    assert [entry for entry in found if entry[:2] not in expected] == []
    assert expected - {entry[:2] for entry in found} == set()
