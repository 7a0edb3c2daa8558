"""Which server a node may call: the machine's own, and those whose names are in QT_SERVERS."""

from __future__ import annotations

import pytest

from quantized_transformers.engines.sglang.address import address_of, parsed, servers
from quantized_transformers.loaders.errors import CheckpointError

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ("QT_SERVER_URL", "QT_SERVERS"):
        monkeypatch.delenv(name, raising=False)


def test_the_usual_one(monkeypatch):
    assert address_of("").url == "http://127.0.0.1:30000" and address_of(" ").is_local
    monkeypatch.setenv("QT_SERVER_URL", "https://gpu1.lan/sglang/")
    assert address_of("").url == "https://gpu1.lan/sglang" and not address_of("").is_local
    assert address_of("https://gpu1.lan/other").url == "https://gpu1.lan/other"


@pytest.mark.parametrize("text, url", [("127.0.0.1:30001", "http://127.0.0.1:30001"), ("http://localhost:8", "http://localhost:8"),
                                       ("http://[::1]:30000", "http://[::1]:30000"), ("https://127.0.0.1", "https://127.0.0.1"),
                                       ("http://127.9.9.9:1/", "http://127.9.9.9:1"), ("HTTP://LOCALHOST:1", "http://localhost:1")])
def test_this_machine_is_always_allowed(text, url):
    assert address_of(text).url == url


def test_names_and_their_hosts(monkeypatch):
    monkeypatch.setenv("QT_SERVERS", "flux=http://gpu1:30000, wan = http://10.0.0.7:30002/")
    assert address_of("flux").url == "http://gpu1:30000" and address_of(" wan ").url == "http://10.0.0.7:30002"
    assert address_of("http://gpu1:30000").url == "http://gpu1:30000"
    with pytest.raises(CheckpointError, match="known are flux, wan"):
        address_of("qwen")
    for other in ("http://gpu1:30001", "http://gpu2:30000", "http://gpu1.evil:30000", "http://10.0.0.8:30002"):
        with pytest.raises(CheckpointError, match="calls no server that a workflow names"):
            address_of(other)


@pytest.mark.parametrize("text", [
    "http://127.0.0.1@evil.com", "http://evil.com\\@127.0.0.1", "http://127.0.0.1#@evil.com", "http://127.0.0.1:30000:80", "http://0177.0.0.1",
    "http://0x7f.0.0.1", "http://0x7f000001", "http://2130706433", "http://127.1", "http://[::ffff:127.0.0.1]", "http://127.0.0.1%2eevil.com",
    "http://127.0.0.1:0", "http://127.0.0.1:70000", "ftp://127.0.0.1", "file:///etc/passwd", "http://", "http://127.0.0.1 .evil.com", "http://loc\nalhost",
    "http://127.0.0.1?x", "http://ⓛocalhost", "http://127。0.0.1", "//127.0.0.1", "http://user:secret@127.0.0.1:1"])
def test_what_two_readers_could_read_in_two_ways_is_refused(text):
    with pytest.raises(CheckpointError) as refused:
        address_of(text)
    assert "secret" not in str(refused.value)


def test_a_list_that_is_none_is_said_without_its_words(monkeypatch):
    for text in ("http://gpu1:30000", "a b=http://gpu1", "flux=http://me:secret@gpu1"):
        monkeypatch.setenv("QT_SERVERS", text)
        with pytest.raises(CheckpointError) as refused:
            servers()
        assert "secret" not in str(refused.value)


def test_whoever_types_an_address_may_call_any():
    assert parsed("gpu7:1").url == "http://gpu7:1" and parsed("http://10.0.0.9").url == "http://10.0.0.9"
