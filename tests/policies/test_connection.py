"""Connection: which proxy, what may be given, and what does not show."""

from __future__ import annotations

import copy
import ipaddress
import pickle

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.policies.connection import Connection, Proxy, check_headers

SECRET = "pass-marker-98765"


def where(environ: dict[str, str], url: tuple[str, str, int] = ("https", "api.example.com", 443)) -> str | None:
    proxy = Connection().proxy_of(*url, environ)
    return None if proxy is None else proxy.where


@pytest.mark.parametrize(
    ("environ", "scheme", "expected"),
    [
        pytest.param({}, "https", None, id="nothing"),
        pytest.param({"https_proxy": "http://a:1"}, "https", "a:1", id="by-the-scheme"),
        pytest.param({"https_proxy": "http://a:1"}, "http", None, id="of-another-scheme"),
        pytest.param({"http_proxy": "http://a:1"}, "http", "a:1", id="http"),
        pytest.param({"http_proxy": "http://a:1"}, "https", None, id="http-only"),
        pytest.param({"HTTPS_PROXY": "http://a:1"}, "https", "a:1", id="in-capitals"),
        pytest.param({"https_proxy": "http://a:1", "HTTPS_PROXY": "http://b:2"}, "https", "a:1", id="small-ones-first"),
        pytest.param({"all_proxy": "http://a:1"}, "https", "a:1", id="all"),
        pytest.param({"ALL_PROXY": "http://a:1"}, "http", "a:1", id="all-in-capitals"),
        pytest.param({"all_proxy": "http://a:1", "https_proxy": "http://b:2"}, "https", "b:2", id="scheme-before-all"),
        pytest.param({"https_proxy": "", "all_proxy": "http://a:1"}, "https", None, id="an-empty-one-is-none"),
        pytest.param({"https_proxy": "", "HTTPS_PROXY": "http://a:1"}, "https", None, id="an-empty-one-hides-capitals"),
        pytest.param({"HTTP_PROXY": "http://a:1"}, "http", "a:1", id="http-in-capitals"),
        pytest.param({"HTTP_PROXY": "http://a:1", "REQUEST_METHOD": "GET"}, "http", None, id="a-visitor-of-cgi"),
        pytest.param({"http_proxy": "http://a:1", "REQUEST_METHOD": "GET"}, "http", "a:1", id="no-visitor-of-cgi"),
        pytest.param({"HTTPS_PROXY": "http://a:1", "REQUEST_METHOD": "GET"}, "https", "a:1", id="not-from-a-visitor"),
        pytest.param({"https_proxy": "a:1"}, "https", "a:1", id="without-a-scheme"),
        pytest.param({"https_proxy": " http://a "}, "https", "a:80", id="without-a-port"),
        pytest.param({"https_proxy": "http://[::1]:3128/"}, "https", "[::1]:3128", id="ipv6"),
        pytest.param({"https_proxy": "HTTP://A:1"}, "https", "a:1", id="capitals-in-the-url"),
    ],
)
def test_the_environment_names_a_proxy_by_the_usual_rules(environ, scheme, expected):
    assert where(environ, (scheme, "api.example.com", 443)) == expected


@pytest.mark.parametrize(
    ("no_proxy", "host", "port", "direct"),
    [
        ("", "example.com", 443, False),
        ("*", "example.com", 443, True),
        ("example.com", "example.com", 443, True),
        ("example.com", "api.example.com", 443, True),
        (".example.com", "api.example.com", 443, True),
        (".example.com", "example.com", 443, True),
        ("*.example.com", "api.example.com", 443, True),
        ("EXAMPLE.com", "api.Example.COM.", 443, True),
        ("ample.com", "example.com", 443, False),
        ("api.example.com", "example.com", 443, False),
        ("a.com, example.com", "example.com", 443, True),
        ("a.com example.com", "example.com", 443, True),
        ("a.com,,b.com,", "example.com", 443, False),
        (".", "example.com", 443, False),
        ("example.com:443", "example.com", 443, True),
        ("example.com:80", "example.com", 443, False),
        ("10.1.2.3", "10.1.2.3", 80, True),
        ("10.0.0.0/8", "10.1.2.3", 80, True),
        ("10.0.0.0/8", "11.1.2.3", 80, False),
        ("10.1.2.9/8", "10.1.2.3", 80, True),
        ("10.1.2.3:80", "10.1.2.3", 80, True),
        ("10.0.0.0/8", "example.com", 80, False),
        ("::1", "::1", 80, True),
        ("[::1]", "::1", 80, True),
        ("[::1]:80", "::1", 80, True),
        ("[::1]:81", "::1", 80, False),
        ("fd00::/8", "fd00::17", 80, True),
        ("fd00::/8", "10.1.2.3", 80, False),
        ("0:0:0:0:0:0:0:1", "::1", 80, True),
        ("10.0.0.0/99", "10.1.2.3", 80, False),
    ],
)
def test_no_proxy_names_hosts_domains_addresses_networks_and_ports(no_proxy, host, port, direct):
    for name in ("no_proxy", "NO_PROXY"):
        environ = {"all_proxy": "http://p:1", name: no_proxy}
        assert (where(environ, ("https", host, port)) is None) is direct


def test_an_empty_no_proxy_hides_that_in_capitals():
    assert where({"all_proxy": "http://p:1", "no_proxy": "", "NO_PROXY": "*"}) == "p:1"


@given(st.text(max_size=20), st.ip_addresses().map(str) | st.from_regex(r"[a-z.]{1,9}", fullmatch=True))
def test_nothing_in_no_proxy_is_an_error(no_proxy, host):
    where({"all_proxy": "http://p:1", "no_proxy": no_proxy}, ("http", host, 80))


@given(st.ip_addresses(v=4), st.integers(0, 32))
def test_an_address_is_in_every_network_around_it(address, bits):
    network = ipaddress.ip_network((address, bits), strict=False)
    assert where({"all_proxy": "http://p:1", "no_proxy": str(network)}, ("http", str(address), 80)) is None


def test_a_proxy_that_was_given_goes_before_the_environment_and_no_proxy():
    proxy = Connection(proxy="http://a:1").proxy_of("https", "b", 443, {"https_proxy": "http://c:2", "no_proxy": "*"})
    assert proxy == Proxy("a", 1)


def test_there_is_no_proxy_on_the_way_to_a_socket_or_without_trust():
    environ = {"http_proxy": "http://a:1"}
    assert Connection(unix_socket="/x").proxy_of("http", "b", 80, environ) is None
    assert Connection(trust_env=False).proxy_of("http", "b", 80, environ) is None


def test_a_login_is_decoded_and_becomes_a_header():
    proxy = Connection(proxy="http://me%40home:p%3Aw%C3%A9@a:1").proxy_of("http", "b", 80, {})
    assert proxy is not None
    assert proxy.authorization == "Basic bWVAaG9tZTpwOnfDqQ=="
    assert Proxy("a", 1).authorization is None


# what does not show


def test_secrets_do_not_show():
    connection = Connection(proxy=f"http://me:{SECRET}@a:1", headers={"X-Key": SECRET}, verify=False)
    proxy = connection.proxy_of("http", "b", 80, {})
    shown = f"{connection} {connection!r} {proxy} {proxy!r} {connection.__rich_repr__()} {proxy.__rich_repr__()}"
    assert SECRET not in shown
    assert repr(connection) == "Connection(proxy='http://a:1', verify=False, headers={'X-Key': ...})"


@pytest.mark.parametrize(
    "fields",
    [
        {"proxy": f"http://me:{SECRET}@a:1"},
        {"proxy": f"http://{SECRET}@a:1"},
        {"headers": {"Authorization": SECRET}},
        {"headers": {"x-api-key": SECRET}},
        {"headers": {"Cookie": SECRET}},
        {"headers": {"X-Amz-Security-Token": SECRET}},
    ],
)
def test_what_may_be_a_secret_does_not_pickle(fields):
    with pytest.raises(ConfigError, match="must not be pickled") as caught:
        pickle.dumps(Connection(**fields))
    assert SECRET not in str(caught.value)


def test_what_is_none_comes_out_of_a_pickle_as_it_was():
    connection = Connection(
        proxy="http://a:1",
        trust_env=False,
        ca="/ca.pem",
        certificate="/c.pem",
        certificate_key="/k.pem",
        headers={"OpenAI-Organization": "org", "X-Team": "blue"},
        body_bytes=5,
        header_bytes=2_000,
    )
    assert pickle.loads(pickle.dumps(connection)) == connection == copy.copy(connection)


def test_it_can_be_read_from_a_file():
    assert msgspec.convert({"proxy": "http://a:1"}, Connection) == Connection(proxy="http://a:1")
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.convert({"proxi": "http://a:1"}, Connection)


# what is refused


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"proxy": f"https://me:{SECRET}@a:1"}, "proxy must look like http://host:port .*, got https://..."),
        ({"proxy": f"socks5://me:{SECRET}@a:1"}, "got socks5://..."),
        ({"proxy": f"http://me:{SECRET}"}, "got http://..."),
        ({"proxy": f"me:{SECRET}"}, "proxy must look like"),
        ({"proxy": f"http://a:1/{SECRET}"}, "proxy must look like"),
        ({"proxy": f"http://a:1?x={SECRET}"}, "proxy must look like"),
        ({"proxy": f"http://a\r\n{SECRET}:1"}, "proxy must look like"),
        ({"proxy": ""}, "proxy must look like"),
        ({"proxy": SECRET.encode()}, "proxy must be a text like http://host:port, got a bytes"),
        ({"ca": ""}, "ca must be a string"),
        ({"ca": b"x"}, "ca must be a string"),
        ({"certificate": 1}, "certificate must be a string"),
        ({"certificate_key": "k"}, "certificate_key is the key of a certificate: give that too"),
        ({"unix_socket": ""}, "unix_socket must be a string"),
        ({"unix_socket": "/x", "proxy": "http://a:1"}, "proxy and unix_socket are two ways"),
        ({"verify": "no"}, "verify must be True or False, got 'no'"),
        ({"trust_env": 1}, "trust_env must be True or False, got 1"),
        ({"verify": False, "ca": "/x"}, "ca says whom to trust and verify=False"),
        ({"headers": {"X": f"{SECRET}\r\nEvil: 1"}}, "the value of 'X'"),
        ({"headers": {"X": 1}}, "the value of 'X'"),
        ({"headers": {"Host": "x"}}, "'Host' cannot be set"),
        ({"headers": {"Proxy-Authorization": SECRET}}, "'Proxy-Authorization' cannot be set"),
        ({"headers": {1: "x"}}, "1 cannot be set"),
        ({"headers": [("X", SECRET)]}, "headers must map names to values, got a list"),
        ({"body_bytes": 0}, "body_bytes must be a whole number >= 1, got 0"),
        ({"body_bytes": 1.5}, "body_bytes must be a whole number"),
        ({"header_bytes": 1_000}, "header_bytes must be a whole number >= 1024, got 1000"),
        ({"proxies": {}}, "the fields are proxy, trust_env"),
    ],
)
def test_what_cannot_work_is_refused_and_no_secret_shown(fields, text):
    with pytest.raises(ConfigError, match=text) as caught:
        Connection(**fields)
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None or SECRET not in repr(caught.value.__context__)


@pytest.mark.parametrize("value", ["", "a\tb", "\xe9", "x" * 10_000])
def test_every_value_that_a_header_can_have_is_taken(value):
    check_headers({"X-y_z": value})
