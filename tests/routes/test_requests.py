"""What a request may be, as values: its host and origin, every wrong type, and workflows that are none."""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantized_transformers.loaders.download_plans import Asked
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.queries import Query
from quantized_transformers.makers.migrate import migrate
from quantized_transformers.routes.requests import RefusedError, check_origin, parse_object, to_download, to_query
from support.pack import PACK

pytestmark = pytest.mark.unit

LAN, LOCAL = ("192.168.1.5", 8188), ("127.0.0.1", 8188)


def allowed(writes: bool = True, here=LAN, **headers: str) -> bool:
    from aiohttp.test_utils import make_mocked_request

    transport = SimpleNamespace(get_extra_info=lambda name, default=None: here if name == "sockname" else default,
                                is_closing=lambda: False)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = make_mocked_request("POST", "/", headers=names, transport=transport)
    try:
        check_origin(request, writes)
    except RefusedError as error:
        assert error.answer.status == 403
        return False
    return True


@pytest.mark.parametrize(("own", "origin", "passes"), [
    ("comfy.lan:8188", "http://comfy.lan:8188", True), ("comfy.lan", "https://comfy.lan", True),
    ("comfy.lan", "http://comfy.lan:80", True), ("Comfy.lan:80", "http://comfy.lan", True),
    ("comfy.lan:8188", "http://comfy.lan", False), ("comfy.lan:8188", "http://evil.lan:8188", False),
    ("[::1]:8188", "http://[::1]:8188", True), ("comfy.lan", "null", False), ("comfy.lan", "http://comfy.lan:x", False),
    ("", "http://comfy.lan", False)])
def test_origins_elsewhere(own, origin, passes):
    """Away from loopback addresses, where the host's own middleware does not look, ours does."""
    assert allowed(Host=own, Origin=origin) is passes


@pytest.mark.parametrize(("own", "passes"), [
    ("127.0.0.1:8188", True), ("localhost:8188", True), ("LOCALHOST", True), ("localhost.", True), ("[::1]:8188", True),
    ("192.168.1.5:8188", True), ("[::ffff:127.0.0.1]", True), ("me.localhost:8188", True), ("proxied.example", True),
    ("evil.example:8188", False), ("127.0.0.1.evil.example", False), ("localhost.evil.example", False), ("evillocalhost", False),
    ("localtest.me", False), ("2130706433", False), ("127.1", False), ("[::1", False), ("", False), ("user@127.0.0.1", True),
    ("127.0.0.1@evil.example", False), ("a:b:c", False)])
def test_names_that_lead_to_this_machine(monkeypatch, own, passes):
    """DNS rebinding: the page's origin is the host that it asks, whatever its name. Over every loopback address."""
    monkeypatch.setenv("QT_HOSTS", "other.example, Proxied.example")
    for here in (LOCAL, ("127.0.0.7", 1), ("::1", 8188, 0, 0), ("::ffff:127.0.0.1", 8188, 0, 0)):
        assert allowed(here=here, Host=own) is passes, here
    assert allowed(here=LAN, Host=own) and allowed(here="/run/comfy.sock", Host=own), "a name of the network's is its own"
    assert allowed(here=LOCAL), "programs may send no Host"
    assert not allowed(here=LOCAL, Host="evil.example", Origin="http://evil.example")


WRONG = (None, True, 0, -1, 7.5, 10**30, "", "x", "\0", "\ud800", "9" * 5000, [], [[]], ["x"], {}, {"x": {}})
BODY = {"items": [{"reference": "owner/name", "node": "QT_LoadBaseModel", "component": "transformer", "weights_name": "a",
                   "revision": "b", "precision": "auto", "rank": 32, "weights": "load", "base": "c/d", "layers": "1",
                   "base_component": "transformer", "override": "e/f", "override_reference": "g", "override_2": "h"}],
        "target": "cache", "hub": "", "licences": ["owner/name"], "plan": True}


def places(value, at=()):
    """The way to every value in a document."""
    yield at
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(child, (*at, key))


def changed(document, way, value):
    document = copy.deepcopy(document)
    if not way:
        return value
    inner = document
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]]  # noqa: B018  # raises where there is no such place
    inner[way[-1]] = value
    return document


def test_every_parameter_of_a_wrong_type():
    """A query and a plan, or one sentence."""
    refused = 0
    for way in places(BODY):
        for value in WRONG:
            body = json.dumps(changed(BODY, way, value)).encode()
            try:
                found = to_download(parse_object(body))
                assert isinstance(found, Asked) and all(isinstance(query, Query) for query in found.queries)
                assert all(isinstance(text, str) for query in found.queries for name, text in vars(query).items()
                           if name not in ("rank", "layers"))
                hash(found)
            except CheckpointError as error:
                refused += 1
                assert "\n" not in error.what
    assert refused > 150


@pytest.mark.parametrize("rank", ["1e400", "1e3", "nan", "inf", "-inf", "Infinity", "9" * 5000, "0x10", "1_0", "٣", " 1", "1.0", "--1"])
def test_numbers_that_are_none(rank):
    with pytest.raises(CheckpointError, match="rank is no number"):
        to_query({"reference": "a/b", "rank": rank})


@pytest.mark.parametrize("body", [
    b'{"rank": 1e400}', b'{"rank": -1e400}', b'{"rank": NaN}', b'{"rank": Infinity}', b'{"rank": ' + b"9" * 5000 + b"}",
    b'{"a": 1, "a": 2}', b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", '{"a": 1}'.encode("utf-16"), b'{"a": "\xff"}', b"[" * 60_000,
    b'{"a":' * 10_000, b"[]", b"", b"null", b"{'a': 1}"], ids=lambda body: repr(body[:16]))
def test_bodies_that_are_no_object(body):
    with pytest.raises(CheckpointError) as error:
        parse_object(body)
    assert "\n" not in error.value.what and len(error.value.what) < 400


def workflows() -> list[dict]:
    """Workflows with nodes of other packs, in both formats, with a subgraph and a group node."""
    sys.path.append(str(PACK / "tests" / "makers" / "migrate"))
    try:
        import importlib.util

        spec = importlib.util.spec_from_file_location("migrated", PACK / "tests" / "makers" / "migrate" / "test_migrate.py")
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
    finally:
        sys.path.pop()
    page = made.flux_page()
    page["nodes"].append(made.node(50, "NunchakuFluxLoraStack", ["a.safetensors", 1.0] * 15, [("model", "MODEL", None)],
                                   [("MODEL", "MODEL", [])]))
    page["nodes"].append(made.node(51, "SGLDOptions", [1], outputs=[("SGLD_OPTIONS", "SGLD_OPTIONS", [])]))
    page["extra"] = {"groupNodes": {"g": {"nodes": [{"type": "NunchakuFluxDiTLoader"}]}}}
    inner = {**made.flux_page(), "id": "sub", "name": "inside", "inputs": [{"linkIds": [3]}], "outputs": []}
    wrapper = {"id": 60, "type": "sub", "inputs": [], "outputs": [], "properties": {"proxyWidgets": [["45", "model_path"]]}}
    page["nodes"].append(wrapper)
    page["definitions"] = {"subgraphs": [inner]}
    api = {"1": {"class_type": "NunchakuFluxDiTLoader", "inputs": {"model_path": "svdq-int4_r32-flux.1-dev.safetensors",
                                                                   "cache_threshold": 0}, "_meta": {"title": "t"}},
           "2": {"class_type": "NunchakuFluxLoraStack", "inputs": {"model": ["1", 0], "lora_count": 2, "lora_name_1": "a",
                 "lora_wt_1": 1.0, "lora_name_2": "b", "lora_wt_2": 0.5}},
           "3": {"class_type": "DualCLIPLoaderGGUF", "inputs": {"clip_name1": "clip_l.safetensors",
                                                                "clip_name2": "t5-v1_1-xxl.gguf", "type": "flux"}},
           "4": {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "a.gguf"}}}
    return [page, api, {"prompt": api}]


def survived(workflow) -> bool:
    """Whether it was migrated; it is JSON then, and else one sentence."""
    try:
        done = migrate(workflow)
    except CheckpointError as error:
        assert "\n" not in error.what and len(error.what) < 400, error.what
        return False
    assert json.loads(json.dumps(done.workflow, allow_nan=False)) == done.workflow
    assert all(isinstance(line, str) for line in (*done.changes, *done.left))
    return True


@pytest.mark.parametrize("number", range(3))
def test_migrate_takes_any_value_at_any_place(number):
    """Every place of a workflow of every type; and a seeded mixture of them."""
    workflow = json.loads(json.dumps(workflows()[number]))
    assert survived(workflow)
    wrong = (*WRONG, "nan", "1e999", 1e308, -1e308, ["nan", "inf"], [10**400, 0], "\0text", {"\0text": 5})
    ways = list(places(workflow))
    dice = random.Random(number)
    every = [(way, value) for way in ways[1:] for value in wrong]
    answers = {survived(changed(workflow, way, value)) for way, value in dice.sample(every, min(len(every), 1200))}
    for _ in range(300):
        mixed = workflow
        for _ in range(dice.randint(2, 8)):
            try:
                mixed = changed(mixed, dice.choice(ways[1:]), dice.choice(wrong))
            except (TypeError, LookupError, AttributeError):  # what was there is gone
                continue
        survived(mixed)
    assert answers == {True, False}


def test_migrate_takes_any_nesting():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for workflow in ({"nodes": deep, "links": []}, {"nodes": [{"type": "NunchakuFluxDiTLoader", "widgets_values": deep}], "links": []},
                     {"1": {"class_type": "NunchakuFluxDiTLoader", "inputs": {"model_path": deep}}}):
        assert not survived(workflow)
    while deep:  # Python's own deletion of it recurses
        deep = deep[0]
    assert Path(__file__).is_file()
