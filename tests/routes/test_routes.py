"""The web routes of the real server: what they say of real checkpoints, and what they refuse. Those that change
something are in test_routes_post.py."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import struct
import time
from pathlib import Path
from urllib.parse import quote, urlencode

import aiohttp
import pytest
import torch

from support import flux, svdquant_models, wan
from support.hub import FakeRepo, Hub
from support.pack import PACK
from support.routes import ask, describe
from support.server import Server

pytestmark = pytest.mark.host

# How late the server's event loop came to a timer at worst, since it was asked last: in time, and in time that the
# process itself had the processor (other programs on this machine can only add to the first).
LAG = '''
import asyncio, time
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS = {}
worst, task = [0.0, 0.0], None

async def watch():
    while True:
        before, used = time.perf_counter(), time.process_time()
        await asyncio.sleep(0.001)
        worst[0] = max(worst[0], time.perf_counter() - before - 0.001)
        worst[1] = max(worst[1], time.process_time() - used)

@PromptServer.instance.routes.get("/lag")
async def lag(request):
    global task
    task = task or asyncio.get_running_loop().create_task(watch())
    answer, worst[:] = list(worst), [0.0, 0.0]
    return web.json_response(answer)
'''


def header_file(path: Path, header: bytes, data: int = 0, length: int | None = None) -> None:
    """A safetensors file with this header, and so many bytes of (sparse) data behind it."""
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header) if length is None else length) + header)
        file.truncate(8 + len(header) + data)


def write_broken(folder: Path) -> None:
    folder.mkdir()
    header_file(folder / "nojson.safetensors", b"{not json")
    header_file(folder / "nested.safetensors", b"[" * 100_000)
    header_file(folder / "list.safetensors", b"[" + b"1," * 1_900_000 + b"1]")
    header_file(folder / "long.safetensors", b"{" + b" " * 90_000_000)
    header_file(folder / "lies.safetensors", b"{}", length=1 << 62)
    header_file(folder / "offsets.safetensors", b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99]}}')
    many = ", ".join(f'"layer.{i}.weight": {{"dtype": "BF16", "shape": [1], "data_offsets": [{2 * i}, {2 * i + 2}]}}'
                     for i in range(40_000))
    header_file(folder / "many.safetensors", f"{{{many}}}".encode(), 80_000)
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "pickle.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 100)


@pytest.fixture(scope="module")
def svdq():
    return svdquant_models.make_flux()


@pytest.fixture(scope="module")
def hub(tiny):
    """Nobody asks it."""
    with Hub({"owner/tiny": FakeRepo.of(tiny.pipeline)}) as running:
        yield running


@pytest.fixture(scope="module")
def server(tiny, svdq, hub, tmp_path_factory):
    base = tmp_path_factory.mktemp("routes")
    folder, files = base / "models" / "diffusers", base / "models" / "diffusion_models"
    files.mkdir(parents=True)
    shutil.copytree(tiny.pipeline, folder / "tiny-flux")
    shutil.copytree(tiny.fp8, folder / "tiny-fp8")
    shutil.copytree(tiny.sharded, folder / "sharded")
    shutil.copytree(PACK / "tests" / "data" / "modelslim" / "w8a8", folder / "ascend")
    svdq.write(files)
    wan.make().save_pretrained(folder / "tiny-wan")
    write_broken(files / "broken")
    outside = base / "outside"  # beside the model folders
    shutil.copytree(tiny.fp8, outside)
    (folder / "linked").symlink_to(outside, target_is_directory=True)
    (files / "linked.safetensors").symlink_to(next(outside.glob("*.safetensors")))
    shutil.copytree(tiny.fp8, folder / "leaky")
    (folder / "leaky" / "config.json").unlink()
    (folder / "leaky" / "config.json").symlink_to("/etc/passwd")
    shutil.copytree(tiny.fp8, folder / "fat")
    (folder / "fat" / "config.json").write_text('{"a": "' + "x" * 5_000_000 + '"}', encoding="utf-8")
    (folder / "inner").symlink_to(folder / "tiny-fp8", target_is_directory=True)
    (base / "custom_nodes" / "lag").mkdir(parents=True)
    (base / "custom_nodes" / "lag" / "__init__.py").write_text(LAG, encoding="utf-8")
    env = {"HF_HOME": str(base / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with Server(base, env=env) as running:
        yield running
        assert "Traceback" not in running.text()


def test_describe_an_override(server, tiny):
    """Counts and bytes against the file itself, read by safetensors."""
    tensors = flux.stored(tiny.fp8)
    fp8 = {name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    sizes = {True: 0, False: 0}
    for name, tensor in tensors.items():
        if tensor.ndim != 1 or name.endswith("bias"):  # norms have one weight vector, and belong to no Linear
            sizes[name.rpartition(".")[0] in fp8] += tensor.nbytes
    card = describe(server, "tiny-fp8", node="QT_ApplyTransformerOverride", layers="1")
    assert card["on_disk"] and card["family"] == "ModelOpt FP8" and card["architecture"] == "FLUX.1"
    assert {row["format"]: (row["layers"], row["bytes"]) for row in card["formats"]} == {
        "FP8": (len(fp8), sizes[True]), "BF16": (3, sizes[False])}
    assert card["size"] == sum(path.stat().st_size for path in tiny.fp8.glob("*.safetensors"))
    assert card["verdict"] == "amber" and "FP8 runs: dequantize (chosen for this device) on cpu" in card["verdict_text"] and card["problems"] == []
    assert card["mismatch"] is None and card["download"] is None
    grid = card["layer_map"]
    cells = {f"{row}.{column}" if row != "top" else column: fmt for row, values in zip(grid["rows"], grid["cells"], strict=True)
             for column, fmt in zip(grid["columns"], values, strict=True) if fmt}
    assert {name for name, fmt in cells.items() if fmt == "FP8"} == fp8 and len(cells) == len(fp8) + 3
    assert set(grid["colours"]) == {"FP8", "BF16"}
    both = [ask(server, "GET", "describe?reference=tiny-fp8", prefix) for prefix in (
        "/quantized_transformers/", "/api/quantized_transformers/")]
    assert both[0] == both[1]


def test_describe_other_kinds(server, svdq):
    card = describe(server, svdq.file, node="QT_NunchakuSVDQLoader")
    assert (card["family"], card["precision"], card["rank"]) == ("SVDQuant INT4", "int4", 16)
    assert card["verdict"] == "amber" and "dequantize" in card["verdict_text"]
    assert sum(row["layers"] for row in card["formats"] if row["format"] != "BF16") == len(svdq.layers)
    card = describe(server, "ascend", node="QT_ModelSlimLoader")
    assert card["family"].startswith("ModelSlim W8A8") and card["architecture"] == "Wan"
    card = describe(server, "tiny-flux", node="QT_LoadBaseModel", weights="defer to override")
    assert card["architecture"] == "FLUX.1" and card["vram"] == 0 and card["verdict"] == "green"
    assert describe(server, "tiny-flux", node="QT_LoadBaseModel")["family"] == "BF16"
    assert describe(server, "inner")["family"] == "ModelOpt FP8"  # a link between model folders


def test_a_mismatch_with_the_base(server):
    for base, words in (("tiny-flux", None), ("tiny-wan", "the override is FLUX.1, but the base model is Wan"),
                        ("black-forest-labs/FLUX.1-dev", None), ("/etc/passwd", None)):
        card = describe(server, "tiny-fp8", node="QT_ApplyTransformerOverride", base=base)
        assert card["mismatch"] == words
    config = server.base / "models" / "diffusers" / "tiny-flux" / "transformer" / "config.json"
    before = config.read_text(encoding="utf-8")
    config.write_text(json.dumps({**json.loads(before), "num_layers": 3}), encoding="utf-8")
    try:
        card = describe(server, "tiny-fp8", node="QT_ApplyTransformerOverride", base="tiny-flux")
        assert "(base 3)" in card["mismatch"]  # and the answer kept from before is not given
    finally:
        config.write_text(before, encoding="utf-8")


def test_what_is_not_here(server, hub):
    before = len(hub.log)
    card = describe(server, "nunchaku-tech/nunchaku-flux.1-dev", node="QT_NunchakuSVDQLoader")
    assert not card["on_disk"] and card["architecture"] == "FLUX.1" and card["family"] == "SVDQuant"
    assert card["download"] == {
        "repo": "nunchaku-tech/nunchaku-flux.1-dev", "hubs": ["huggingface", "modelscope"], "files": None, "bytes": None, "gated": "unknown",
        "command": 'hf download nunchaku-tech/nunchaku-flux.1-dev --include "svdq-int4_r32-*.safetensors"'}
    assert not describe(server, "owner/none")["on_disk"] and len(hub.log) == before  # nobody asked the Hub
    status, answer = ask(server, "GET", "describe?reference=nothing-of-this-name")
    assert status == 404 and set(answer) == {"error", "where", "todo"}
    assert not any("\n" in text for text in answer.values())


def test_catalog(server, svdq):
    deadline = time.time() + 90
    while True:
        status, catalog = ask(server, "GET", "catalog")
        if not catalog["pending"] or time.time() > deadline:
            break
    assert status == 200 and not catalog["pending"]
    kinds = [item["kind"] for item in catalog["items"]]
    assert catalog["kinds"] == ["base", "override", "svdq", "modelslim"] and set(kinds) == set(catalog["kinds"])
    items = {item["reference"]: item for item in catalog["items"]}
    for reference, kind, node, family, verdict in (
            ("tiny-flux", "base", ("QT_LoadBaseModel", "base_model"), "BF16", "green"),
            ("tiny-wan", "base", ("QT_LoadBaseModel", "base_model"), "BF16", "green"),
            ("sharded", "override", ("QT_ApplyTransformerOverride", "override"), "ModelOpt FP8", "amber"),
            (svdq.file, "svdq", ("QT_NunchakuSVDQLoader", "weights"), "SVDQuant INT4", "amber"),
            ("ascend", "modelslim", ("QT_ModelSlimLoader", "folder"), "ModelSlim W8A8", "red")):  # cut test data
        item = items[reference]
        assert (item["kind"], (item["node"], item["input"]), item["verdict"]) == (kind, node, verdict), item
        assert item["family"].startswith(family) and item["on_disk"] and item["size"] > 0
        # the widget that takes it offers it
        info = server.get(f"/object_info/{node[0]}")[node[0]]["input"]["optional"][node[1]][1]
        assert reference in info["options"]
    assert not any(items[known]["on_disk"] for known in ("Qwen/Qwen-Image", "nunchaku-tech/nunchaku-sdxl"))
    assert items["lmsys/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer"]["formats"] == ["NVFP4"]
    assert {reference: items[reference]["hubs"] for reference in (
        "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8", "Qwen/Qwen-Image", "nunchaku-tech/nunchaku-sdxl", "tiny-flux")} == {
        "Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8": ["modelscope"], "Qwen/Qwen-Image": ["huggingface", "modelscope"],
        "nunchaku-tech/nunchaku-sdxl": [], "tiny-flux": []}
    assert items["leaky"]["verdict"] == items["broken/list.safetensors"]["verdict"] == "red"
    assert {"FLUX.1", "Wan", "SDXL"} <= set(catalog["architectures"]) and "FP8" in catalog["formats"]


def test_page_knows_every_node_that_refers(server):
    """Against the nodes as the host lists them, and what `describe` takes."""
    from quantized_transformers.loaders.queries import NODES
    from quantized_transformers.views.catalog import LOADS_WITH

    status, page = ask(server, "GET", "page")
    assert status == 200 and set(page["nodes"]) == set(NODES)
    ours = {name: {**info["input"]["required"], **info["input"].get("optional", {})}
            for name, info in server.get("/object_info").items() if name.startswith("QT_")}
    assert {name for name, given in ours.items() if "reference" in given and "server" not in given} == set(page["nodes"])
    chooses = {"component", "weights", "weights_name", "revision", "precision", "rank", "override",
               "override_reference", "override_2", "override_2_reference"}
    for name, known in page["nodes"].items():
        kind, more = ours[name][known["input"]]
        assert kind == "COMBO" and any("/" in choice for choice in more["options"]), (name, known["input"])
        assert set(known["others"]) == chooses & ours[name].keys() - {known["input"]}, name
        values = {other: ours[name][other][1]["default"] for other in known["others"]}
        describe(server, "nunchaku-tech/nunchaku-sdxl", node=name, **values)
    assert {known["kind"]: (name, known["input"]) for name, known in page["nodes"].items() if known["kind"]} == LOADS_WITH


def test_page_has_the_colours_of_inspect(server, tiny):
    """Of every stored format, and of one that no report knows: what Inspect Checkpoint paints in legend and cells."""
    from dataclasses import replace

    from quantized_transformers.loaders.containers.checkpoint import Checkpoint
    from quantized_transformers.loaders.describe import describe
    from quantized_transformers.loaders.locate import locate
    from quantized_transformers.views.layer_map import format_colours, layer_map

    colours = ask(server, "GET", "page")[1]["colours"]
    assert colours.keys() == {*format_colours(), ""} and {"F16", "F32"} <= colours.keys()
    described = describe(Checkpoint(locate(str(tiny.fp8))))
    for name, colour in colours.items():
        picture = layer_map(replace(described, formats={name: 1}, layers={"blocks.0.proj": name}))
        painted = bytes(picture.getpixel((20, 40)))
        assert f"#{painted.hex()}" == colour, name
        assert sum(count for count, pixel in picture.getcolors(1 << 20) if bytes(pixel) == painted) >= 13 ** 2 + 18 ** 2
    assert set(ask(server, "GET", "catalog")[1]["formats"]) <= colours.keys()


def test_device(server):
    status, facts = ask(server, "GET", "device")
    assert status == 200 and facts["device"] == "cpu" and facts["kitchen"]["eager"].startswith("available")
    assert {row["family"] for row in facts["families"]} >= {"FP8", "NVFP4", "SVDQ INT4", "W8A8_DYNAMIC"}
    assert {row["verdict"] for row in facts["families"]} == {"green", "amber"}


REFUSED = {
    "describe?reference=/etc/passwd": 403, "describe?reference=/etc": 403, "describe?reference=/": 403,
    "describe?reference=/nothing/at/all": 403,
    "describe?reference=../../outside": 403, "describe?reference=tiny-flux/../../../outside": 403,
    "describe?reference=..%5C..%5Coutside": 403, "describe?reference=%2e%2e%2foutside": 403,
    "describe?reference=.": 403, "describe?reference=./models": 403, "describe?reference=~/.ssh": 403,
    "describe?reference=C:%5CWindows": 403, "describe?reference=D:models": 403,
    "describe?reference=%5C%5Chost%5Cshare": 403, "describe?reference=//host/share": 403,
    "describe?reference=main.py": 403,  # in the server's own folder
    "describe?reference=linked": 403, "describe?reference=linked.safetensors": 403, "describe?reference=leaky": 403,
    "describe?reference=tiny-fp8&weights_name=../../x.safetensors": 403,
    "describe?reference=tiny-fp8&weights_name=/etc/passwd": 403,
    "describe?reference=owner/tiny&revision=../../../../x": 403,
    "describe?reference=tiny%00fp8": 400, "describe?reference=tiny%0Afp8": 400, "describe?reference=": 400,
    "describe": 400, f"describe?reference={'x' * 2000}": 400, f"describe?reference={'x' * 200}/{'y' * 300}": 400,
    f"describe?reference={'x' * 6000}": 413, "describe?reference=fat": 413,
    "describe?reference=broken/long.safetensors": 413,
    "describe?reference=tiny-fp8&rank=many": 400, "describe?reference=tiny-fp8&rank=-1": 400,
    "describe?reference=tiny-fp8&node=Other": 400, "describe?reference=tiny-fp8&component=../x": 400,
    "describe?reference=tiny-fp8&precision=int2": 400, "describe?reference=tiny-fp8&weights_name=none.safetensors": 404,
    "download?id=../../etc": 404, "download": 404,
    **{f"describe?reference=broken/{name}.safetensors": 400
       for name in ("nojson", "nested", "list", "lies", "offsets", "many", "empty", "pickle")},
}


def test_refusals(server):
    """Every one an answer in JSON of one line a text, without a path outside the model folders in it."""
    async def all_of_them() -> dict[str, tuple[int, dict]]:
        from yarl import URL

        async with aiohttp.ClientSession() as session:
            found = {}
            for path in REFUSED:
                url = URL(f"http://127.0.0.1:{server.port}/quantized_transformers/{path}", encoded=True)
                async with session.get(url) as response:
                    assert response.content_type == "application/json", (path, await response.text())
                    found[path] = response.status, await response.json()
            return found

    found = asyncio.run(all_of_them())
    assert {path: status for path, (status, _) in found.items()} == REFUSED
    for _path, (_, answer) in found.items():
        assert set(answer) == {"error", "where", "todo"} and answer["error"]
        assert not any("\n" in text or "root:" in text or str(server.base / "outside") in text
                       for text in answer.values())


WAN, SVDQ = "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "nunchaku-tech/nunchaku-flux.1-dev"


@pytest.mark.parametrize(("asked", "base", "makes", "distilled", "command"), [
    ({"base": "tiny-flux", "override": "tiny-fp8", "kind": "component"}, "tiny-flux", "image", True,
     "tiny-flux --override tiny-fp8 --kind component"),
    ({"base": WAN, "override": "a/b", "override_2": "c/d", "weights_name": "x.safetensors", "revision": "main"}, WAN, "video", False,
     f"{WAN} --override a/b --override-2 c/d --weights-name x.safetensors --revision main"),
    ({"base": "hunyuanvideo-community/HunyuanVideo"}, "hunyuanvideo-community/HunyuanVideo", "video", True,
     "hunyuanvideo-community/HunyuanVideo"),
    ({"override": SVDQ, "near": "a/b"}, "black-forest-labs/FLUX.1-dev", "image", True, f"black-forest-labs/FLUX.1-dev --override {SVDQ}"),
    ({"override": "a/c", "near": "a/b", "kind": "auto"}, "a/b", "image", False, "a/b --override a/c")])
def test_what_a_server_starts_with(server, asked, base, makes, distilled, command):
    """By the class of a pipeline that is here, else by the names of its makers."""
    status, found = ask(server, "GET", f"serve?{urlencode(asked)}")
    assert status == 200, found
    assert (found["base"], found["makes"], found["distilled"]) == (base, makes, distilled)
    assert found["pipeline"] == ("FluxPipeline" if "flux" in base.lower() else "HunyuanVideoPipeline" if "hunyuan" in base else "")
    assert found["command"].startswith("python ") and found["command"].endswith(f" serve {command}")


@pytest.mark.parametrize(("asked", "status", "words"), [
    ({"override": "somebody/unknown"}, 400, "its name does not say which"), ({}, 400, "its name does not say which"),
    ({"base": "tiny-flux", "kind": "other"}, 400, "kind is none of"),
    ({"base": "/etc"}, 403, "outside"), ({"base": "tiny-flux", "override": "../../outside"}, 403, "outside"),
    ({"base": "tiny-flux", "override_2": "/etc/passwd"}, 403, "outside"), ({"base": "tiny-flux", "near": "/etc", "override": "linked"}, 403, "out of")])
def test_what_no_server_starts_with(server, asked, status, words):
    found, error = ask(server, "GET", f"serve?{urlencode(asked)}")
    assert found == status and words in error["error"], error


def test_absolute_paths_inside_are_answered(server):
    inside = server.base / "models" / "diffusers" / "tiny-fp8"
    assert describe(server, str(inside))["family"] == "ModelOpt FP8"
    assert ask(server, "GET", f"describe?reference={quote(str(inside))}-not")[0] == 400


def test_many_at_once(server):
    """A hundred requests at a time, of all kinds: all answered, while the event loop stays responsive."""
    kinds = ["tiny-fp8", "tiny-flux", "sharded", "ascend", "broken/list.safetensors", "broken/many.safetensors",
             "broken/long.safetensors", "/etc/passwd", "linked", "owner/none"]
    paths = [f"describe?reference={quote(kinds[i % 10])}&rank={i % 3}" for i in range(90)] + ["catalog", "device", "page"] * 5
    paths = [f"/quantized_transformers/{path}" for path in paths]
    files = [path for folder in ("tiny-fp8", "tiny-flux", "sharded", "ascend")
             for path in (server.base / "models" / "diffusers" / folder).rglob("*") if path.is_file()]

    async def round_(paths: list[str]) -> tuple[list[float], set[int]]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}", connector=connector) as session:
            async def get(path: str) -> int:
                async with session.get(path) as response:
                    await response.json()
                    return response.status

            async with session.get("/lag"):
                pass
            statuses = await asyncio.gather(*map(get, paths))
            async with session.get("/lag") as response:
                return await response.json(), set(statuses)

    lags, control = [], []
    for _ in range(3):
        control.append(asyncio.run(round_(["/prompt"] * 100))[0])  # what the host's own lightest route costs
        for path in files:
            os.utime(path)  # nothing of it is answered from memory
        lag, statuses = asyncio.run(round_(paths))
        assert statuses == {200, 400, 403, 413}
        lags.append(lag)
    print(f"event loop lag [s, s of processor]: {lags}; of the host's GET /prompt: {control}")
    assert min(processor for _, processor in lags) < 0.05, (lags, control)
    assert min(wall for wall, _ in lags) < max(0.05, 2 * min(wall for wall, _ in control)), (lags, control)
