"""Real pictures: their size, what is written on them, and where they go."""

import io
import subprocess
import sys
import tempfile

import matplotlib as mpl
import pytest
from PIL import Image

import rxllm
from rxllm.errors import ConfigError
from rxllm.telemetry import Recording
from rxllm.telemetry.bins import Bins
from rxllm.telemetry.picture import draw
from rxllm.testing import VirtualScheduler

PNG = b"\x89PNG\r\n\x1a\n"
VERMILLION, PURPLE = (0xD5, 0x5E, 0x00), (0xCC, 0x79, 0xA7)
QUOTA = "10 requests per 60 seconds"
QUIET = {"waiting": 0, "limit": None, "rate": None, "fill": {}, "waited": {}}


def run(seconds=10, *, refused=False, failed=False):
    """Return the bins of a small run."""
    bins = Bins(600)
    for number in range(seconds * 10):
        bins.admitted(number / 10, 3)
        bad = number == seconds * 5
        bins.ended(number / 10 + 0.05, 2, refused=refused and bad, failed=failed and bad)
    return bins


def texts(table):
    """Return what is written on a picture."""
    with tempfile.NamedTemporaryFile(suffix=".svg") as file, mpl.rc_context({"svg.fonttype": "none"}):
        draw(table, file.name)
        return file.read().decode()


def image(table):
    file = io.BytesIO()
    draw(table, file)
    return Image.open(file).convert("RGB")


def colours(table):
    """Return how many pixels have which colour."""
    drawn = image(table)
    return {colour: count for count, colour in drawn.getcolors(drawn.width * drawn.height)}


@pytest.fixture
def recording():
    gate, scheduler = rxllm.Gate("10/minute", concurrency=2), VirtualScheduler()

    class Asker:
        def admitted(self, lease):
            scheduler.call_later(0.3, lambda: lease.settle("answered"))

        def turned_away(self, error):
            raise error

    with Recording(gate) as found:
        for _ in range(5):
            gate.enter(gate.apply(scheduler, gate.amounts({}), Asker()))
        scheduler.run(2.0)
    return found


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["a-text", "a-path"])
def test_a_picture_has_1200_by_900_pixels(recording, tmp_path, kind):
    path = tmp_path / "run.png"
    recording.save(kind(path))
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (1200, 900))


@pytest.mark.parametrize(
    ("name", "begins"),
    [("run.svg", b"<?xml"), ("run.PDF", b"%PDF"), ("run.png", PNG)],
)
def test_the_suffix_says_the_format(recording, tmp_path, name, begins):
    recording.save(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_a_path_without_a_suffix_is_a_png(recording, tmp_path):
    recording.save(tmp_path / "run")
    assert (tmp_path / "run").read_bytes().startswith(PNG)


def test_a_binary_file_gets_a_png_and_stays_open_whatever_the_settings_of_the_user_are(recording):
    file = io.BytesIO()
    with mpl.rc_context({"savefig.format": "svg", "savefig.dpi": 20}):
        recording.save(file)
    with Image.open(file) as image:
        assert (image.format, image.size) == ("PNG", (1200, 900))


def test_an_unknown_suffix_is_refused_before_anything_is_written(recording, tmp_path):
    with pytest.raises(ConfigError, match=r"file must end in one of .*png.*svg.*, got '.*run\.doc'"):
        recording.save(tmp_path / "run.doc")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_an_error_of_the_system(recording, tmp_path):
    with pytest.raises(FileNotFoundError):
        recording.save(tmp_path / "no" / "run.png")


def test_without_matplotlib_the_error_says_how_to_get_it(recording, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"needs matplotlib: pip install 'rxllm\[plot\]'"):
        recording.save(tmp_path / "run.png")


def test_matplotlib_is_imported_by_the_first_picture_and_pyplot_never():
    script = """
import io, sys
import rxllm
from rxllm.telemetry import Recording
recording = Recording(rxllm.Gate("5/minute"))
print("matplotlib" in sys.modules)
recording.save(io.BytesIO())
print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    path = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=path)
    assert done.stdout.split() == ["False", "True", "False"]


def test_a_picture_says_what_gate_which_quotas_and_what_was_waited_for(recording):
    written = texts(recording.table())
    for said in (
        "Gate('10 requests per 60 seconds', concurrency=2)",
        "5 attempts started in 0.9 s, 0 refused, 0 failed",
        "seconds after the first attempt",
        "in flight, the most",
        "limit",
        "concurrency",
    ):
        assert f">{said}<" in written.replace("&#x27;", "'"), said
    assert written.count(f">{QUOTA}<") == 1  # how full it is; nobody waited for it


def test_an_empty_recording_is_a_picture_too():
    with Recording(rxllm.Gate("10/minute", rate=2.5)) as recording:
        written = texts(recording.table())
    assert "no attempt yet" in written


def test_a_single_refusal_is_seen_among_thousands_of_attempts():
    assert VERMILLION not in colours(run(400).table("a gate"))
    assert VERMILLION in colours(run(400, refused=True).table("a gate"))


def test_failures_are_drawn_when_there_are_some():
    written = texts(run(failed=True).table("a gate"))
    assert ">failed<" in written
    assert "100 attempts started in 10.0 s, 0 refused, 1 failed (1.0%)" in written
    assert ">failed<" not in texts(run().table("a gate"))


def test_the_pace_and_the_limit_are_drawn_while_there_is_one():
    bins = run()
    assert ">pace<" not in texts(bins.table(""))
    bins.look(11.0, **{**QUIET, "rate": 5.0})
    bins.look(12.0, **{**QUIET, "limit": 4})
    written = texts(bins.table(""))
    assert ">pace<" in written
    assert ">limit<" in written


def test_a_mark_tells_itself_and_many_of_a_kind_are_counted():
    bins = run()
    bins.mark(10.1, "setting", "limit 4: too much")
    bins.mark(10.25, "paused", "paused for 1 s")
    bins.mark(10.26, "paused", "paused for 2 s")
    bins.mark(10.35, "paused", "paused for 3 s")
    bins.mark(10.4, "unheard", "something")
    bins.mark(10.5, "unheard", "something")
    written = texts(bins.table(""))
    for said in ("limit 4: too much", "3 pauses", "2 others"):
        assert f">{said}<" in written
    assert "paused for" not in written


def test_a_mark_is_drawn_at_its_time():
    pictures = []
    for at in (100.0, 200.0):
        bins = Bins(600)
        for time in (0.0, at, 299.0):  # an axis in minutes
            bins.mark(time, "paused", "")
        pictures.append(image(bins.table("")).tobytes())
    assert pictures[0] != pictures[1]


def test_attempts_are_drawn_at_their_time():
    pictures = []
    for first, last in ((9, 1), (1, 9)):
        bins = Bins(600)
        for at in [0.0] * first + [59.9] * last:
            bins.admitted(at, 1)
        pictures.append(image(bins.table("")).tobytes())
    assert pictures[0] != pictures[1]


def test_what_was_waited_for_at_the_same_time_is_drawn_one_above_the_other():
    bins = Bins(600)
    bins.look(0.0, **QUIET)
    bins.look(50.0, **{**QUIET, "waited": {"concurrency": 25.0, "pause": 25.0}})
    counts = colours(bins.table(""))
    grey = sum(counts.get((light,) * 3, 0) for light in range(130, 136))  # 0x66 with the opacity that the panel has
    assert grey > 20_000  # else it is hidden; the legend has some hundred of it


@pytest.mark.parametrize(
    ("seconds", "unit"), [(120, "seconds"), (180, "minutes"), (3 * 3600, "hours"), (3 * 86_400, "days")]
)
def test_the_time_axis_has_the_largest_unit_of_which_three_fit(seconds, unit):
    bins = Bins(600)
    bins.admitted(0.0, 1)
    bins.admitted(float(seconds), 1)
    assert f">{unit} after the first attempt<" in texts(bins.table(""))


@pytest.mark.parametrize(("seconds", "said"), [(100, "101.0 s"), (590, "10 min"), (3 * 3600 + 60, "3 h 01 min")])
def test_the_title_says_how_long_the_run_was(seconds, said):
    bins = Bins(600, 1.0)
    bins.admitted(0.0, 1)
    bins.admitted(float(seconds), 1)
    assert f"2 attempts started in {said}, " in texts(bins.table(""))


def test_a_text_that_looks_like_a_formula_is_drawn_as_it_is():
    bins = run()
    bins.mark(1.0, "setting", r"cost in $ and $\nonsense{")
    bins.look(5.0, **{**QUIET, "fill": {"$x^$ per day": 0.5}})
    written = texts(bins.table("Gate('$x^$ per day')"))
    assert written.count("$x^$ per day") == 2


def test_more_quotas_than_colours_with_long_names_leave_room_for_the_panels():
    bins = run()
    fill = {f"{number}000 tokens_of_some_kind per 86400 seconds": number / 20 for number in range(20)}
    bins.look(5.0, **{**QUIET, "fill": fill})
    bins.look(8.0, **{**QUIET, "fill": fill, "waited": dict.fromkeys(["something new", *fill, "pause"], 0.1)})
    written = texts(bins.table(f"Gate({', '.join(map(repr, fill))})"))  # a panel without room is a warning
    assert "…\n" in written or "…<" in written
    assert (
        written.count(">3000 tokens_of_some_kind per 86400 seconds<") == 2
    )  # how full it is, and that it was waited for
    assert ">8000 tokens_of_some_kind per 86400 seconds, and 11 more<" in written
    assert ">7000 tokens_of_some_kind per 86400 seconds, and 13 more<" in written
    assert ">something new<" in written


def test_a_debt_does_not_leave_the_panel():
    bins = run()
    assert ">100<" in texts(bins.table(""))
    bins.look(11.0, **{**QUIET, "fill": {QUOTA: 2.5}})
    assert ">250<" in texts(bins.table(""))
