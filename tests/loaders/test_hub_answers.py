"""What a hub may answer, both hubs, byte by byte from a server on this machine: a file arrives whole, or one sentence says
why not, in bounded time, memory and disk."""

from __future__ import annotations

import copy
import json
import resource
import threading
import time
from itertools import chain
from pathlib import Path

import pytest

from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.files import hub
from quantized_transformers.loaders.files.hubs import http, transfer
from quantized_transformers.loaders.files.selection import Selection, select_component
from support.odd_hub import COMMIT, FILES, OddHub, bomb, chunked, endless, head, slowly, whole

pytestmark = pytest.mark.unit

CONFIG, WEIGHTS = FILES


@pytest.fixture(params=["huggingface", "modelscope"])
def odd(request, monkeypatch, tmp_path):
    constants = "huggingface_hub.constants."
    with OddHub(request.param) as running:
        monkeypatch.setattr(constants + "ENDPOINT", running.url)
        monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants + "HF_HUB_DISABLE_XET", True)  # tests/loaders/test_xet.py
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", "hf_secret")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
        monkeypatch.setattr(http, "PATIENCE", 0.4)
        monkeypatch.setattr(http, "_EVERY", 0.05)
        monkeypatch.setattr(transfer, "_PAUSE", 0.01)
        running.home = tmp_path
        yield running


def chosen(found) -> list[Selection]:
    one = select_component(found, "")
    if one.config is None:
        raise CheckpointError("there is no config.json")
    return [one]


def fetch(odd: OddHub, progress=lambda total: lambda amount=1: None, repo: str = "owner/odd", revision: str = "") -> str:
    """The sentence of what is refused; empty for files that arrived whole. Nothing damaged may show."""
    try:
        folder = hub.fetch(f"{odd.key}:{repo}", revision, chosen, ["*"], hub.Watcher(progress))
    except CheckpointError as error:
        said = str(error.what)
        assert said == " ".join(said.split()) and 5 < len(said) < 700, said
        assert not said.startswith(("Traceback", "<")) and "hf_secret" not in error.text, error.text
        shown = [path for path in odd.home.rglob("*") if path.name in FILES and path.is_file()]
        assert all(path.read_bytes() == FILES[path.name] for path in shown)
        return said
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    return ""


def written(odd: OddHub) -> list[Path]:
    return [path for path in odd.home.rglob("*") if path.is_file() and path.suffix != ".lock"]


def forget(odd: OddHub) -> None:
    """An empty cache."""
    import shutil

    for folder in odd.home.iterdir():
        shutil.rmtree(folder)


def places(value, at=()):
    """The way to every value in a document."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield from chain.from_iterable(places(child, (*at, key)) for key, child in inner)


WRONG = (None, True, 0, -1, 7.5, 10**30, "", "x", "\0", "2", [], [[]], ["x"], {}, {"x": {}})


def changed(document, way, value, take: bool = False):
    if not way:
        return value
    document = copy.deepcopy(document)
    inner = document
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = value
    if take:
        del inner[way[-1]]
    return document


def test_every_value_of_the_list_of_a_wrong_type(odd):
    """At every place every type, and nothing: it is refused, or was of no importance. Of what decides, it is refused."""
    document = odd.document()
    deciding = {"siblings", "rfilename", "sha", "blobId", "lfs", "sha256"} if odd.key == "huggingface" else \
        {"Code", "Data", "Files", "Path", "Sha256", "ShortId"}
    refused = 0
    for way in places(document):
        for number, value in enumerate((*WRONG, "")):
            answer = changed(document, way, value, take=number == len(WRONG) and bool(way))
            odd.list = lambda _, answer=answer: whole(json.dumps(answer).encode())
            said = fetch(odd)
            refused += bool(said)
            gone = way and way[-1] == "lfs" and (number == len(WRONG) or value is None)  # git's hash is another one
            decides = not way or way[-1] in deciding and way != ("siblings", 1, "blobId")
            assert said or not decides, (way, value)
            if way and way[-1] in ("size", "Size") and "lfs" not in way and not gone:
                assert said, (way, value)
            forget(odd)
    assert refused > 100


NAMES = ("../x.json", "/etc/x.json", "", ".json/..", "a//b.json", "./a.json", "a/./b.json", "a/.. /x.json", "x" * 300 + ".json",
         "x" * 201 + ".json", "/".join(["folder"] * 200) + "/x.json", "a\0.json", "a\n.json", "\x1b[31m.json", "\x7f.json",
         "C:x.json", "..\\x.json", "a\\b.json", " /x.json", ".../x.json")


def with_item(odd: OddHub, **item):
    """The list with one more file."""
    document = odd.document()
    names = {"rfilename": "Path", "size": "Size", "blobId": "Sha256"} if odd.key == "modelscope" else {}
    made = {names.get(key, key): value for key, value in {"size": 3, "blobId": "0" * (64 if names else 40), **item}.items()}
    (document["Data"]["Files"] if names else document["siblings"]).append({**({"Type": "blob"} if names else {}), **made})
    return document


@pytest.mark.parametrize("name", NAMES, ids=[ascii(name[:20]) for name in NAMES])
def test_names_that_no_file_has(odd, name):
    odd.list = lambda _: whole(json.dumps(with_item(odd, rfilename=name)).encode())
    kept = name.endswith(".json")  # of other kinds nothing is downloaded, whatever they are called
    assert ("unsafe names" in fetch(odd)) is kept and bool(written(odd)) is not kept
    forget(odd)
    picture = name.removesuffix(".json") + ".png"
    odd.list = lambda _: whole(json.dumps(with_item(odd, rfilename=picture)).encode())
    assert fetch(odd) == "", "a picture of an odd name keeps nobody from the model"


def test_half_of_a_character_is_no_name(odd):
    odd.list = lambda _: whole(json.dumps(with_item(odd, rfilename="\ud800.png")).encode())
    assert "half of a character" in fetch(odd) and not written(odd)


def test_files_twice(odd):
    odd.list = lambda _: whole(json.dumps(with_item(odd, rfilename=CONFIG)).encode())
    assert "twice" in fetch(odd)
    forget(odd)
    odd.list = lambda _: whole(json.dumps(with_item(odd, rfilename=CONFIG.upper())).encode())
    assert fetch(odd) == "", "not chosen, and another file where systems tell them apart"
    forget(odd)
    odd.list = lambda _: whole(json.dumps(with_item(odd, rfilename="Config.json", size=3)).encode())
    both = [Selection("", (WEIGHTS,), CONFIG, texts=("Config.json",))]
    with pytest.raises(CheckpointError, match="only differ in capitals"):
        hub.fetch(f"{odd.key}:owner/odd", "", lambda _: both, ["*"], hub.Watcher(lambda total: lambda amount=1: None))
    assert not any("config.json" in line.lower() for line in odd.asked[-1:])


LISTS = {
    "HTML": lambda odd: whole(b"<html><body>Please log in</body></html>", Content_Type="text/html"),
    "nothing": lambda odd: whole(b""),
    "a list": lambda odd: whole(b"[]"),
    "no UTF-8": lambda odd: whole(b'{"sha": "\xff\xfe"}'),
    "a BOM": lambda odd: whole(b"\xef\xbb\xbf{}"),
    "1e400": lambda odd: whole(b'{"sha": 1e400, "Code": 1e400}'),
    "NaN": lambda odd: whole(b'{"sha": NaN, "Code": NaN}'),
    "twice": lambda odd: whole(b'{"sha": "a", "sha": "b", "Code": 200, "Code": 300}'),
    "deep": lambda odd: whole(b"[" * 100_000 + b"]" * 100_000),
    "deep objects": lambda odd: whole(b'{"Data":' * 100_000 + b"1" + b"}" * 100_000),
    "many digits": lambda odd: whole(b'{"Code": ' + b"9" * 100_000 + b"}"),
    "too long": lambda odd: whole(b'{"sha": "' + b"x" * (12 << 20) + b'"}'),
    "no end": lambda odd: chain([head()], endless(b" " * 65536)),
    "chunks without an end": lambda odd: chunked(endless(b" " * 65536)),
    "a chunk of 2^70": lambda odd: head(Transfer_Encoding="chunked") + b"%x\r\n{}" % 2**70,
    "a chunk of -1": lambda odd: head(Transfer_Encoding="chunked") + b"-1\r\n{}",
    "chunks of nonsense": lambda odd: head(Transfer_Encoding="chunked") + b"zz\r\n{}",
    "a gzip bomb": lambda odd: whole(bomb(), Content_Encoding="gzip"),
    "a gzip bomb in secret": lambda odd: whole(bomb()),
    "cut in the header": lambda odd: b"HTTP/1.1 200 OK\r\nContent-Le",
    "cut in the body": lambda odd: head(Content_Length=5000) + b'{"sha": ',
    "closed at once": lambda odd: b"",
    "no HTTP": lambda odd: b"SSH-2.0-OpenSSH_9.6\r\n",
    "a status of words": lambda odd: b"HTTP/1.1 abc def\r\n\r\n",
    "a status of 99999": lambda odd: b"HTTP/1.1 99999 OK\r\n\r\n",
    "a length of -1": lambda odd: head(Content_Length=-1) + b"{}",
    "a length of words": lambda odd: head(Content_Length="many") + b"{}",
    "a header without an end": lambda odd: chain([b"HTTP/1.1 200 OK\r\n"], endless(b"X-A: b\r\n" * 1000)),
    "a header line without an end": lambda odd: chain([b"HTTP/1.1 200 OK\r\nX-A: "], endless(b"a" * 65536)),
    "100 for ever": lambda odd: endless(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a header by drops": lambda odd: chain([b"HTTP/1.1 200 OK\r\nX-A: "], slowly(b"a" * 1000, 1, 0.02)),
    "a body by drops": lambda odd: chain([head()], slowly(b" " * 1000, 1, 0.02)),
    "never": lambda odd: slowly(b"  ", 1, 3),
    "to itself": lambda odd: head("302 Found", Location=odd.url + "/api/again"),
    "to a file": lambda odd: head("302 Found", Location="file:///etc/passwd"),
    "to ftp": lambda odd: head("307 Temporary Redirect", Location="ftp://127.0.0.1/x"),
    "to data": lambda odd: head("302 Found", Location='data:application/json,{"sha":"x"}'),
    "to nothing": lambda odd: head("302 Found"),
    "to an empty address": lambda odd: head("302 Found", Location=""),
    "to an address of nobody": lambda odd: head("302 Found", Location="http://"),
    "to half an address": lambda odd: head("302 Found", Location="http://[::1"),
    "to a port of words": lambda odd: head("302 Found", Location="http://127.0.0.1:port/"),
    "to a name with a space": lambda odd: head("302 Found", Location="http://a b/"),
    "to a closed port": lambda odd: head("302 Found", Location="http://127.0.0.1:9/"),
    **{str(status): lambda odd, status=status: whole(b"no", f"{status} X", X_Error_Message="m" * 5000, X_Error_Code="?")
       for status in (204, 304, 400, 401, 403, 404, 405, 416, 418, 429, 451, 500, 502, 503, 600)},
}


@pytest.mark.parametrize("kind", LISTS)
def test_answers_that_are_no_list(odd, kind):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    odd.list = lambda _: LISTS[kind](odd)
    start = time.monotonic()
    said = fetch(odd)
    assert said, kind
    assert time.monotonic() - start < 8
    assert not written(odd)
    assert odd.sent < http.MAX_JSON + (16 << 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def partial(odd: OddHub, data: bytes) -> None:
    """What an earlier download left of the weights."""
    store = hub.hubs.named(odd.key)[0].cache("owner/odd", "")
    store.open(COMMIT, hub.hubs.named(odd.key)[0].listing("owner/odd", None, lambda amount: None).files)
    store.partial(WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    store.partial(WEIGHTS).write_bytes(data)


DATA = FILES[WEIGHTS]
# name -> (answer to (start), whether the file arrives)
ANSWERS = {
    "more than listed": (lambda start: whole(DATA + b"more" * 10_000_000), True),
    "no length": (lambda start: head() + DATA, True),
    "no end": (lambda start: chain([head(), DATA], endless(b"x" * 65536)), True),
    "chunks": (lambda start: chunked([DATA[:1000], DATA[1000:]]), True),
    "chunks without an end": (lambda start: chunked(chain([DATA], endless(b"x" * 65536))), True),
    "too long a length": (lambda start: head(Content_Length=10**15) + DATA, True),
    "a length of 10^30": (lambda start: head(Content_Length=10**30) + DATA, True),
    "too short a length": (lambda start: head(Content_Length=50) + DATA, False),
    "others": (lambda start: whole(b"x" * len(DATA)), False),
    "endless others": (lambda start: chain([head()], endless(b"x" * 65536)), False),
    "nothing": (lambda start: whole(b""), False),
    "HTML": (lambda start: whole(b"<html>log in</html>"), False),
    "compressed": (lambda start: whole(bomb(), Content_Encoding="gzip"), False),
    "a range not asked for": (lambda start: whole(DATA[5:], "206 Partial Content", Content_Range="bytes 5-9/10"), False),
    "a part without a range": (lambda start: whole(DATA, "206 Partial Content"), False),
    "a range of nonsense": (lambda start: whole(DATA, "206 Partial Content", Content_Range="bytes x-y/z"), False),
    "cut": (lambda start: head(Content_Length=len(DATA)) + DATA[:1000], False),
    "cut in the header": (lambda start: b"HTTP/1.1 200", False),
    "by drops": (lambda start: chain([head()], slowly(DATA, 1, 0.02)), False),
    "never": (lambda start: slowly(b"  ", 1, 3), False),
    "a circle": (lambda start: head("302 Found", Location=f"/owner/odd/repo/{WEIGHTS}?FilePath={WEIGHTS}"), False),
    "to a file": (lambda start: head("302 Found", Location="file:///etc/passwd"), False),
    "no address": (lambda start: head("302 Found"), False),
    **{str(status): (lambda start, status=status: whole(b"no", f"{status} X"), False)
       for status in (204, 304, 400, 401, 403, 404, 416, 429, 500, 503)},
}
BEGUN = {  # the same with 1000 bytes here already
    "from its start": (lambda start: whole(DATA), True),
    "a part that begins elsewhere": (lambda start: whole(DATA[7:], "206 Partial Content", Content_Range="bytes 7-9/10"), False),
    "a part of 200": (lambda start: whole(DATA[start:], Content_Range=f"bytes {start}-1/2"), True),
    "416": (lambda start: whole(b"", "416 Range Not Satisfiable"), False),
    "endless": (lambda start: chain([head("206 X", Content_Range=f"bytes {start}-1/2"), DATA[start:]], endless(b"x" * 65536)), True),
}


@pytest.mark.parametrize("kind", [*ANSWERS, *BEGUN])
def test_answers_that_are_no_file(odd, kind):
    """No more than its size is ever on the disk, and no byte of a damaged one shows."""
    answer, arrives = {**ANSWERS, **BEGUN}[kind]
    if kind in BEGUN:
        partial(odd, DATA[:1000])
    odd.file = lambda name, start: answer(start) if name == WEIGHTS else odd.plain(name, start)
    start = time.monotonic()
    said = fetch(odd)
    assert bool(said) is not arrives, said
    assert time.monotonic() - start < 8
    assert sum(path.stat().st_size for path in odd.home.rglob("*") if path.is_file() and not path.is_symlink()) \
        <= sum(map(len, FILES.values())) + 1000
    assert odd.sent < 60 << 20


def test_no_more_than_listed_is_written(odd):
    """Nor by a store that brings more, whatever it is (hf_xet's)."""
    from quantized_transformers.loaders.files.hub_file import HashedFile, RemoteFile

    path = odd.home / "x"
    with open(path, "ab") as raw:
        target = HashedFile(raw, path, RemoteFile(10, "0" * 64), lambda amount: None)
        for _ in range(3):
            target.write(b"1234567")
    assert path.read_bytes() == b"1234567123"


@pytest.mark.parametrize("repo", ["owner/" + "x" * 300, "o" * 300 + "/name", "o" * 130 + "/" + "x" * 130, "owner/na\ud800me",
                                  "owner/name/" + "x" * 300, "owner/na\nme", "owner/na\0me"])
def test_names_that_no_folder_has_are_refused_before_the_request(odd, repo):
    assert fetch(odd, repo=repo)
    assert not odd.asked and not written(odd)


@pytest.mark.parametrize("revision", ["x" * 300, "a/" + "x" * 300, "../x", "a\nb", "a\0b", "\ud800", "/x", "a//b"])
def test_revisions_that_no_folder_has(odd, revision):
    assert fetch(odd, revision=revision) == "this is no revision"
    assert not odd.asked and not written(odd)


def test_the_token_stays_with_its_host(odd):
    """A redirect on the same host keeps it (a repo that was renamed), one to another drops it, and one back has it not."""
    there = odd.url.replace("127.0.0.1", "localhost")

    def listed(document):
        number = len(odd.asked)
        onward = {1: "/api/renamed", 2: f"{there}/api/elsewhere", 3: f"{odd.url}/api/back"}.get(number)
        return head("302 Found", Location=onward) if onward else whole(json.dumps(document).encode())

    odd.list = listed
    assert fetch(odd) == ""
    assert ["hf_secret" in token for token in odd.tokens[:4]] == [True, True, False, False]


@pytest.mark.parametrize(("onward", "leads"), [
    ("/b", ("https://a.example/b", True)), ("c d", ("https://a.example/x/c%20d", True)),
    ("https://b.example/y", ("https://b.example/y", False)), ("//b.example/y", ("https://b.example/y", False)),
    ("https://a.example:444/y", ("https://a.example:444/y", False)), ("http://a.example/y", None), ("http://b.example/y", None),
    ("file:///etc/passwd", None), ("ftp://a.example/x", None), ("data:,x", None), ("javascript:x", None),
    ("HTTP://a.example/", None)])
def test_where_redirects_lead(onward, leads):
    """Never from HTTPS to plain HTTP."""
    if leads is None:
        with pytest.raises(http.StrangeError, match="another kind"):
            http.leads("https://a.example/x/y", onward)
    else:
        assert http.leads("https://a.example/x/y", onward) == leads


STALLS = {
    "no answer": (lambda odd: slowly(b"  ", 1, 30), None),
    "a header by drops": (lambda odd: chain([b"HTTP/1.1 200 OK\r\nX-A: "], slowly(b"a" * 10_000, 1, 0.1)), None),
    "a list by drops": (lambda odd: chain([head()], slowly(b" " * 10_000, 10, 0.1)), None),
    "no byte of a file": (None, lambda start: chain([head(Content_Length=len(DATA))], slowly(b"  ", 0 + 1, 30))),
    "100 kB/s": (None, lambda start: chain([head(Content_Length=len(DATA))], slowly(DATA, 5_000, 0.05))),
}


@pytest.mark.parametrize("kind", STALLS)
def test_cancel_within_a_second(odd, monkeypatch, kind):
    """Whatever the other side does or does not: in a request that nothing answers, and on a slow link, which shows what
    comes meanwhile."""
    monkeypatch.setattr(http, "PATIENCE", 30)
    monkeypatch.setattr(http, "_EVERY", 0.25)
    listed, file = STALLS[kind]
    if listed:
        odd.list = lambda _: listed(odd)
    if file:
        odd.file = lambda name, start: file(start) if name == WEIGHTS else odd.plain(name, start)
    cancelled, calls, moved = threading.Event(), [], []

    class CancelledError(Exception):
        pass

    def progress(total):
        def step(amount=1):
            calls.append(time.monotonic())
            moved.append(amount)
            if cancelled.is_set():
                raise CancelledError
        return step

    def cancel() -> None:
        cancelled.set()
        calls.append(time.monotonic())

    timer = threading.Timer(0.7, cancel)
    timer.start()
    start = time.monotonic()
    with pytest.raises(CancelledError):
        fetch(odd, progress)
    ended = time.monotonic()
    assert ended - start < 0.7 + 1
    gaps = [later - earlier for earlier, later in zip([start, *calls], calls, strict=False)]
    assert max(gaps) < 1
    if kind == "100 kB/s":
        assert len([amount for amount in moved if amount]) > 5, "each piece of it is told"
    deadline = time.monotonic() + 5
    while any(thread.name == "qt-hub" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "its connection is closed, and its thread ends"
        time.sleep(0.02)


def test_cache_folders_are_left_as_they_were(odd):
    """After all of that a repo is fetched as ever."""
    odd.file = lambda name, start: whole(b"x" * len(FILES[name]))
    assert "arrived damaged" in fetch(odd)
    odd.file = odd.plain
    assert fetch(odd) == "" and not [path for path in Path(odd.home).rglob("*.incomplete")]
