"""The examples of the dialects run as a newcomer runs them, and against a server with a key."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rxllm
from rxllm.testing import SimulatedProvider

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
KEYS = {"OPENAI_API_KEY", "ANTHROPIC_API_KEY", "SCALE_API_KEY", "LLM_ENGINE_BASE_PATH"}
NO_KEY = {name: value for name, value in os.environ.items() if name not in KEYS}
PATH = os.pathsep.join([str(Path(rxllm.__path__[0]).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def run(name, *arguments, **environment):
    """Return what an example prints; it says nothing on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"dialect_{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**NO_KEY, "PYTHONPATH": PATH, **environment},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_model_calls_a_function_answers_with_objects_and_is_shown_live():
    said = run("openai")
    assert sorted(re.findall(r"^(\w+): .*degrees, and rain", said, re.MULTILINE)) == ["Lima", "Nairobi", "Oslo"]
    assert said.count("City(name='name', country='country', inhabitants=1)") == 3
    *_, story, used = said.splitlines()
    assert "lighthouse keeper" in story
    assert re.fullmatch(r"\d+ tokens", used)


def test_each_mail_is_sorted_once_although_one_answer_breaks_off():
    *mails, used = run("anthropic").splitlines()
    assert sorted(line.partition(":")[0] for line in mails) == ["kettle", "paper", "poem", "vat"]
    assert all(re.search(r"' in (\d\d) pieces, ended by end_turn$", line) for line in mails)
    assert re.fullmatch(r"\d+ tokens in, 0 of them from the cache, \d+ out", used)


def test_each_review_gets_one_of_three_words_and_a_sentence():
    lines = run("llm_engine").splitlines()
    assert sorted(lines[:3]) == [f"review {number}: good" for number in range(3)]
    assert [re.search(r"\((\d+) tokens\)$", line) is not None for line in lines[3:]] == [True] * 3
    assert ["lamp" in lines[3], "early" in lines[4], "phone" in lines[5]] == [True] * 3


def test_each_text_gets_a_vector_and_a_neighbour():
    first, *others = run("embeddings").splitlines()
    assert re.fullmatch(r"\d\d vectors of 8 numbers", first)
    assert len(others) == 5
    assert all(re.fullmatch(r"(\w+) is most like (?!\1 )\w+ \([01]\.\d\d\)", line) for line in others)


@pytest.mark.parametrize(
    ("name", "arguments", "environment"),
    [
        ("openai", ["--url", "URL", "--model", "m"], {"OPENAI_API_KEY": "k-123"}),
        ("anthropic", ["--url", "URL", "--model", "m"], {"ANTHROPIC_API_KEY": "k-123"}),
        ("llm_engine", ["--model", "m"], {"SCALE_API_KEY": "k-123", "LLM_ENGINE_BASE_PATH": "ORIGIN"}),
        ("embeddings", ["--url", "URL", "--model", "m"], {"OPENAI_API_KEY": "k-123"}),
    ],
)
def test_an_example_asks_a_server_with_the_key_of_the_environment(name, arguments, environment):
    with SimulatedProvider(key="k-123").start() as provider:
        place = {"URL": provider.url, "ORIGIN": provider.origin}
        given = {variable: place.get(value, value) for variable, value in environment.items()}
        said = run(name, *(place.get(argument, argument) for argument in arguments), **given)
        statistics = provider.statistics()
    assert "k-123" not in said
    assert set(statistics.statuses) == {200}
    assert statistics.statuses[200] == statistics.admitted >= 4
