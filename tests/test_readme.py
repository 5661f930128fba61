"""The README is true: its snippets run, its commands are those of the gate."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rxllm import operators
from rxllm.providers.faults import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SNIPPETS = [
    (text, BLOCKS[at + 1][1] if at + 1 < len(BLOCKS) and BLOCKS[at + 1][0] == "text" else None)
    for at, (language, text) in enumerate(BLOCKS)
    if language == "python"
]


@pytest.mark.parametrize(("snippet", "output"), SNIPPETS, ids=[f"snippet-{n}" for n in range(1, len(SNIPPETS) + 1)])
def test_a_snippet_of_the_readme_runs_and_prints_what_it_says(snippet, output, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path) + f":{ROOT}"},
    )
    assert done.returncode == 0, done.stderr
    if output is not None:
        assert done.stdout == output


def test_every_example_is_named_in_the_readme():
    missing = [path.name for path in (ROOT / "examples").glob("*.py") if path.name not in README]
    assert missing == []


def test_the_readme_has_its_two_commands_on_one_line_each():
    commands = [text.strip().splitlines() for language, text in BLOCKS if language == "console"]
    assert [len(lines) for lines in commands] == [1, 1]
    assert all("venv" in line for [line] in commands)


def test_the_commands_of_the_readme_name_files_and_extras_that_exist():
    [first], [second] = [text.strip().splitlines() for language, text in BLOCKS if language == "console"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {name for line in (first, second) for name in re.search(r"'\.\[(.*?)\]'", line)[1].split(",")}
    assert named <= set(extras)
    assert (ROOT / first.split()[-1]).is_file()
    assert second.endswith("-m pytest -q -n auto")


def test_every_operator_is_in_the_table_of_the_readme():
    table = "\n".join(line for line in README.splitlines() if line.startswith("|"))
    missing = [name for name in operators.__all__ if not re.search(rf"\b{name}\b", table)]
    assert missing == []


def test_the_error_table_is_that_of_the_code():
    lines = README.splitlines()
    assert [row for row in table() if f"| {' | '.join(row)} |" not in lines] == []
