"""The addresses of stores: what of them is shown, and what their clients get."""

import pytest

from rxllm.errors import ConfigError
from rxllm.policies.quota import Quota
from rxllm.policies.store import Store
from rxllm.stores.backends import key_of, located


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        pytest.param("redis://:pa/ss@host:1/0", "redis://***@host:1/0", id="a-slash-in-the-password"),
        pytest.param("redis://a:pa@ss@host/0", "redis://***@host/0", id="an-at-sign-in-it"),
        pytest.param("redis://host:1/0?password=pass&db=1", "redis://host:1/0?password=***&db=1", id="in-the-query"),
        pytest.param("redis+unix:///s?db=1&password=pass", "redis+unix:///s?db=1&password=***", id="on-a-socket"),
    ],
)
def test_no_part_of_a_password_is_shown_wherever_it_stands(url, shown):
    assert Store(url).shown == shown
    text = f"cannot connect to {url} with pa/ss, pa@ss, pass"
    for secret in ("pa/ss", "pa@ss", "pass&", "=pass"):
        assert secret not in Store(url).scrub(text) or secret not in url


@pytest.mark.parametrize("url", ["http://me:pass@host", "redis:me:pass@host", "me:pass@host"])
def test_an_address_that_is_refused_is_not_shown_either(url):
    with pytest.raises(ConfigError, match="store url must begin with") as caught:
        Store(url)
    assert "pass" not in str(caught.value)


def test_a_secret_of_the_environment_is_scrubbed_as_it_is_and_as_it_stands_in_the_address(monkeypatch):
    monkeypatch.setenv("STORE_PASSWORD", "a b/c")
    store = Store("redis://:$STORE_PASSWORD@host")
    assert store.address() == "redis://:a%20b%2Fc@host"
    assert store.scrub("no 'a b/c' nor a%20b%2Fc at host") == "no '***' nor *** at host"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        pytest.param("redis://host", "redis://host:6379", id="the-usual-port"),
        pytest.param("redis://:p@host/2?a=b", "redis://:p@host:6379/2?a=b", id="between-host-and-path"),
        pytest.param("valkey://host:7/0", "valkey://host:7/0", id="a-port-that-is-given"),
        pytest.param("memcached://one,two:5", "memcached://one:11211,two:5", id="each-of-several-hosts"),
        pytest.param("redis+unix:///run/s", "redis+unix:///run/s", id="a-socket-has-none"),
        pytest.param("mongodb+srv://host/x", "mongodb+srv://host/x", id="nor-has-a-name-that-is-looked-up"),
    ],
)
def test_a_port_is_filled_in_where_the_client_wants_one(url, expected):
    assert located(Store(url)) == expected


def test_the_key_tells_quotas_apart_and_fits_every_store():
    store = Store("redis://h", name="my key {}\n")
    keys = {
        key_of(Quota(limit, per=per, unit=unit, strategy=strategy), store)
        for limit in (5, 6)  # those who share a key may have other parts of it
        for per in (1, 60)
        for unit in ("requests", "tokens")
        for strategy in ("sliding", "fixed", "bucket")
    }
    assert len(keys) == 12
    long = key_of(Quota("5/minute"), Store("redis://h", name="x" * 1_000))
    assert all(len(key) < 200 and key.isprintable() and " " not in key and "}" not in key for key in (*keys, long))
