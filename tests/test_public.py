"""What is public is listed, sorted, there, and documented."""

import importlib
import inspect
import pkgutil

import pytest

import rxllm


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def by_kind(name: str) -> tuple[bool, bool, str]:
    """Order constants before classes before functions, as ruff does."""
    return not name.isupper(), not name[0].isupper(), name


FOUND = [module.name for module in pkgutil.walk_packages(rxllm.__path__, "rxllm.") if is_public(module.name)]


def test_the_modules_are_found() -> None:
    assert {"rxllm.errors", "rxllm.messages"} <= set(FOUND)


@pytest.mark.parametrize("module", ["rxllm", *FOUND])
def test_the_public_names_are_sorted_there_and_documented(module: str) -> None:
    loaded = importlib.import_module(module)
    assert loaded.__doc__
    assert list(loaded.__all__) == sorted(set(loaded.__all__), key=by_kind)
    undocumented = []
    for name in loaded.__all__:
        public = getattr(loaded, name)
        own = vars(public).get("__doc__") if inspect.isclass(public) else inspect.getdoc(public)
        if (inspect.isclass(public) or inspect.isroutine(public)) and not own:
            undocumented.append(name)
    assert undocumented == []
