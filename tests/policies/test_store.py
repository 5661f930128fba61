"""Where quotas are shared: its URL, its name, and what is not shown of it."""

import pickle
from pathlib import Path

import pytest

from rxllm.errors import ConfigError
from rxllm.policies.quota import Quota
from rxllm.policies.store import Store


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:pass@host:6379/0", "redis://***@host:6379/0"),
        ("rediss://user:pa@ss@host/1", "rediss://***@host/1"),
        ("redis+unix:///run/redis.sock", "redis+unix:///run/redis.sock"),
        ("mongodb://me:pass@one,two/?w=1", "mongodb://***@one,two/?w=1"),
    ],
)
def test_no_password_is_shown(url: str, shown: str) -> None:
    store = Store(url)
    assert store.shown == shown
    assert "pass" not in f"{store!r} {store} {Quota('5/minute', store=store)!r} {Quota('5/minute', store=store)}"


def test_environment_variables_are_read_when_the_address_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("redis://:${STORE_PASSWORD}@$STORE_HOST/0")
    with pytest.raises(ConfigError, match="the environment variable STORE_PASSWORD in the store's url is not set"):
        store.address()
    monkeypatch.setenv("STORE_PASSWORD", "secret")
    monkeypatch.setenv("STORE_HOST", "host")
    assert store.address() == "redis://:secret@host/0"
    assert b"secret" not in pickle.dumps(store)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Store("http://host"), "store url must begin with one of redis, .*, got Store\\('http://host'"),
        (lambda: Store("localhost:6379"), "store url must begin with one of redis"),
        (lambda: Store("redis://host", name=""), "store name must be a string that is not empty"),
        (lambda: Store("redis://host", unreachable="never"), "unreachable must be 'wait', 'fail' or a share"),  # type: ignore[arg-type]
        (lambda: Store("redis://host", unreachable=0.0), "unreachable must be"),
        (lambda: Quota("5/minute", store=7), "store must be a Store or its URL, got 7"),  # type: ignore[arg-type]
        (lambda: Quota("5/minute", store="redis://h", state="file"), "state must not be given besides a store"),
        (lambda: Quota("5/minute", store="redis://h", charged_at="end"), "charged_at must be 'start' with a store"),
        (lambda: Quota("5/minute", charged_at="then"), "charged_at must be .start. or .end., got .then."),  # type: ignore[arg-type]
        (lambda: Quota("5/minute", on_exhausted="cry"), "on_exhausted must be .wait. or .fail., got .cry."),  # type: ignore[arg-type]
        (lambda: Quota("5/minute", state=""), "state must be a string that is not empty"),
    ],
)
def test_a_bad_value_is_named(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_a_url_and_a_path_may_be_given_for_a_store_and_a_state() -> None:
    assert Quota("5/minute", store="redis://h").store == Store("redis://h")
    assert Quota("5/minute", state=Path("there")).state == "there"
