"""What lies in the model folders: as what it is listed, in which order, and that every change of it is seen."""

from __future__ import annotations

import json
import os
import threading

import pytest

from quantized_transformers import host, nodes
from quantized_transformers.loaders import local
from quantized_transformers.loaders.families.repos import KNOWN_BASES
from quantized_transformers.loaders.files.unfinished import MARKER
from quantized_transformers.loaders.local import ENCODER, LIKELY, MAYBE, SURE, TEXTS, TRANSFORMER, VAE
from quantized_transformers.loaders.locate import locate
from quantized_transformers.nodes import checks
from quantized_transformers.views import catalog, known

pytestmark = pytest.mark.unit

KEYS = (*host.MODEL_FOLDER_KEYS, "text_encoders")
FLUX = {"_class_name": "FluxPipeline", "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
SD3 = {"_class_name": "StableDiffusion3Pipeline", "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
       "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
SDXL = {"_class_name": "StableDiffusionXLPipeline", "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["t", "CLIPTokenizer"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["t", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def models(tmp_path, monkeypatch):
    """ComfyUI's folder of models, empty."""
    import folder_paths

    for key in KEYS:
        (tmp_path / key).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, key, ([str(tmp_path / key)], set()))
    return tmp_path


def put(models, *names: str, **config) -> None:
    """Files without bytes, or of this JSON."""
    for name in names:
        path = models / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config) if config else "", encoding="utf-8")


def pipeline(models, place: str, index: dict, *without: str) -> None:
    put(models, f"{place}/model_index.json", **index)
    for part in index.keys() - {"_class_name", *without}:
        name = "tokenizer.json" if part.startswith("tokenizer") else WEIGHTS
        put(models, f"{place}/{part}/config.json", f"{place}/{part}/{name}")


def fits(reference: str) -> dict[str, int]:
    found = {one.reference: dict(one.fits) for one in local.references()}
    return found[reference]


def there() -> list[str]:
    return [one.reference for one in local.references()]


def lists() -> dict[str, tuple[list[str], str]]:
    """Node -> (what its list has of the model folders, what a new node starts with), as ComfyUI is told."""
    found = {}
    for cls in nodes.node_classes():
        name = checks.referring([cls]).get(cls.GET_SCHEMA().node_id, {}).get("input")
        if name:
            options = cls.GET_NODE_INFO_V1()["input"]["optional"][name][1]
            here = [value for value in options["options"] if value not in known.KNOWN_CHECKPOINTS]
            assert options["options"][:len(here)] == here, "those in the model folders come first"
            found[cls.__name__.removeprefix("QT_")] = here, options["default"]
    return found


# --- kinds ---

def test_single_files_are_what_their_folder_holds(models):
    put(models, "diffusion_models/a.safetensors", "checkpoints/b.safetensors", "text_encoders/c.gguf", "vae/d.sft",
        "diffusers_components/e.gguf", "vae/notes.txt", "checkpoints/old.ckpt", "vae/._d.safetensors")
    assert there() == ["a.safetensors", "b.safetensors", "c.gguf", "d.sft", "e.gguf"]
    assert fits("a.safetensors") == {TRANSFORMER: SURE} and fits("c.gguf") == {ENCODER: SURE} and fits("d.sft") == {VAE: SURE}
    assert fits("b.safetensors") == {TRANSFORMER: SURE, TEXTS: LIKELY, VAE: LIKELY}
    assert all(locate(name).files for name in there()), "what is listed is found"
    assert fits("e.gguf") == {TRANSFORMER: LIKELY, TEXTS: MAYBE, ENCODER: MAYBE, VAE: MAYBE}


def test_a_folder_of_several_kinds_holds_what_either_holds(models, monkeypatch):
    """extra_model_paths.yaml may give one folder to several; two folders may hold files of one name."""
    import folder_paths

    folder_paths.folder_names_and_paths["vae"][0].append(str(models / "diffusion_models"))
    put(models, "diffusion_models/x.safetensors", "diffusion_models/y.safetensors", "text_encoders/y.safetensors")
    assert fits("x.safetensors") == {TRANSFORMER: SURE, VAE: SURE}
    assert fits("y.safetensors") == {TRANSFORMER: SURE, VAE: SURE, ENCODER: SURE}


@pytest.mark.parametrize(("index", "without", "expected"), [
    (FLUX, (), {TRANSFORMER: SURE, TEXTS: SURE, ENCODER: LIKELY, VAE: SURE}),
    (FLUX, ("vae", "tokenizer_2"), {TRANSFORMER: SURE, TEXTS: MAYBE, ENCODER: LIKELY, VAE: MAYBE}),
    (FLUX, ("transformer",), {TRANSFORMER: MAYBE, TEXTS: SURE, ENCODER: LIKELY, VAE: SURE}),
    (SD3, (), {TRANSFORMER: SURE, TEXTS: MAYBE, ENCODER: LIKELY, VAE: SURE}),
    (SDXL, (), {TRANSFORMER: SURE, TEXTS: SURE, ENCODER: LIKELY, VAE: SURE}),
    ({"_class_name": "FluxPipeline", "transformer": None, "vae": ["diffusers", "VQModel"]}, ("transformer",), {})])
def test_pipelines_are_what_they_name_and_have(models, index, without, expected):
    pipeline(models, "diffusers/owner/name", index, *without)
    assert there() == ["owner/name"] and fits("owner/name") == expected
    assert local.references()[0].pipeline


@pytest.mark.parametrize(("config", "expected"), [
    ({"_class_name": "FluxTransformer2DModel"}, {TRANSFORMER: SURE}), ({"_class_name": "WanModel"}, {TRANSFORMER: MAYBE}),
    ({"_class_name": "AutoencoderKLWan"}, {VAE: SURE}), ({"_class_name": "FluxControlNetModel"}, {}),
    ({"architectures": ["UMT5EncoderModel"]}, {ENCODER: SURE}),
    ({"architectures": ["SomethingForCausalLM"]}, {ENCODER: MAYBE, TRANSFORMER: MAYBE}),
    ({"sizes": 1}, {TRANSFORMER: LIKELY, ENCODER: MAYBE}), ({"architectures": "no list"}, {TRANSFORMER: LIKELY, ENCODER: MAYBE})])
def test_component_folders_are_of_their_class(models, config, expected):
    put(models, "diffusers/owner/part/config.json", **config)
    put(models, f"diffusers/owner/part/{WEIGHTS}")
    assert there() == ["owner/part"] and fits("owner/part") == expected


def test_component_folders_where_nothing_says_what_they_are(models):
    """No class, no JSON at all, JSON of another kind, too much of it: they are of their model folder."""
    for key, expected in (("diffusion_models", {TRANSFORMER: SURE}), ("text_encoders", {ENCODER: SURE}), ("vae", {})):
        for number, text in enumerate(("{}", "[1]", "{", '{"a": "' + "x" * 4_000_000 + '"}')):
            put(models, f"{key}/{key}-{number}/{WEIGHTS}")
            (models / key / f"{key}-{number}" / "config.json").write_text(text, encoding="utf-8")
            assert fits(f"{key}-{number}") == expected
    put(models, "diffusion_models/shards/model.safetensors.index.json", "diffusion_models/shards/model-00001-of-00002.safetensors")
    assert fits("shards") == {TRANSFORMER: SURE}


def test_what_is_not_for_this_pack_is_nowhere(models):
    put(models, *(f"diffusion_models/{name}.safetensors" for name in (
        "flux-lora", "LORAS/x", "Wan21_CausVid_lora_rank32", "FluxLoRA", "pytorch_lora_weights", "my-LoKr", "FLUX.1-dev-Controlnet-Union",
        "sub/ip-adapter-flux")))
    put(models, "diffusers/adapted/adapter_config.json", "diffusers/adapted/adapter_model.safetensors", "diffusers/adapted/config.json")
    put(models, f"diffusers/begun/{MARKER}", "diffusers/begun/config.json", "diffusers/begun/deep/x.safetensors",
        "diffusers/.cache/x.safetensors")
    assert there() == []
    kept = ["explorative", "flora", "flux-lora-merged-fp8", "Pandora-v1"]
    put(models, *(f"diffusion_models/{name}.safetensors" for name in kept))
    assert there() == [f"{name}.safetensors" for name in kept]


@pytest.mark.parametrize(("name", "quantized"), [
    ("flux1-dev-fp8_e4m3fn", True), ("FLUX.2-dev-NVFP4", True), ("x-nf4", True), ("svdq-int4_r32-flux", True), ("wan_w8a8", True),
    ("m-Q4_K_S.gguf", True), ("qwen_bf16", False), ("z_image_turbo_fp16", False), ("hidream_i1", False), ("print4ever", False),
    ("wan2.2_t2v_14B", False), ("sd_xl_base_1.0", False)])
def test_quantized_by_name(models, name, quantized):
    put(models, f"diffusion_models/{name if name.endswith('gguf') else name + '.safetensors'}")
    assert local.references()[0].quantized is quantized


def test_order(models):
    put(models, *(f"diffusion_models/{name}.gguf" for name in ("b/Z", "b/a", "b-a", "B10", "b9", "b/c/d", "a")))
    assert there() == [f"{name}.gguf" for name in ("a", "b/a", "b/c/d", "b/Z", "b-a", "b9", "B10")]


# --- the nodes' lists ---

def test_every_node_lists_what_it_can_load(models):
    pipeline(models, "diffusers/black-forest-labs/FLUX", FLUX)
    pipeline(models, "diffusers/sdxl", SDXL)
    put(models, "diffusers/fp8/config.json", _class_name="FluxTransformer2DModel", quantization_config={"quant_method": "modelopt"})
    put(models, "diffusers/lite/config.json", _class_name="FluxTransformer2DModel",
        quantization_config={"quant_method": "nunchaku_lite"})
    put(models, "diffusers/repo/config.json", _class_name="FluxTransformer2DModel")
    put(models, "diffusers/repo/svdq-int4_r32-flux.safetensors", "diffusion_models/bf16.safetensors", "diffusion_models/q4.gguf",
        "diffusion_models/svdq-fp4_r32-qwen.safetensors", "checkpoints/all.safetensors", "text_encoders/t5-q8.gguf",
        "vae/ae.safetensors", "diffusers/wan/high_noise_model/quant_model_description.json",
        "diffusers/wan/low_noise_model/quant_model_description.json", "diffusers/wan/high_noise_model/quant_model_weights.safetensors")
    slim = "wan/high_noise_model/quant_model_weights.safetensors"
    transformers = ["all.safetensors", "bf16.safetensors", "black-forest-labs/FLUX", "fp8", "lite", "q4.gguf", "repo", "sdxl",
                    "svdq-fp4_r32-qwen.safetensors", slim]
    quantized = ["fp8", "lite", "q4.gguf", "svdq-fp4_r32-qwen.safetensors", slim]
    assert lists() == {
        "LoadBaseModel": (transformers, "all.safetensors"),
        "LoadBaseTextEncoder": (["black-forest-labs/FLUX", "sdxl", "all.safetensors", slim], "black-forest-labs/FLUX"),
        "LoadBaseVAE": (["ae.safetensors", "black-forest-labs/FLUX", "sdxl", "all.safetensors", slim], "ae.safetensors"),
        "ApplyTransformerOverride": ([*quantized, *(one for one in transformers if one not in quantized)], "fp8"),
        "NunchakuSVDQLoader": (["lite", "repo", "svdq-fp4_r32-qwen.safetensors", "all.safetensors", "bf16.safetensors",
                                "black-forest-labs/FLUX", "sdxl"], "lite"),
        "ModelSlimLoader": (["wan"], "wan"),
        "InspectCheckpoint": ([*transformers, "ae.safetensors", "t5-q8.gguf"], "all.safetensors")}


def test_text_encoders_in_place_of_a_bases(models):
    """After none, which a new node has: text encoders, pipelines with some, and what nothing is said of."""
    pipeline(models, "diffusers/base", FLUX)
    put(models, "text_encoders/umt5.gguf", "text_encoders/mmproj-qwen.gguf", "diffusers/unknown.gguf", "checkpoints/all.safetensors",
        "diffusion_models/wan.gguf")
    put(models, "diffusers/t5/config.json", architectures=["T5EncoderModel"])
    given = nodes.load_parts.QT_LoadBaseTextEncoder.GET_NODE_INFO_V1()["input"]["optional"]
    for name in ("override", "override_2"):
        assert given[name][1]["options"] == ["none", "mmproj-qwen.gguf", "t5", "umt5.gguf", "base", "unknown.gguf"]
        assert given[name][1]["default"] == "none"


def test_new_nodes_start_with_a_known_repo_where_nothing_local_is_sure_to_load(models):
    starts = {name: (here, start) for name, (here, start) in lists().items()}
    assert all(start in known.KNOWN_CHECKPOINTS and not here for here, start in starts.values())
    assert starts["LoadBaseModel"][1] == KNOWN_BASES[0]
    put(models, "diffusion_models/flux.safetensors")  # Nunchaku's, renamed? It is listed, and not proposed
    here, start = lists()["NunchakuSVDQLoader"]
    assert here == ["flux.safetensors"] and start == starts["NunchakuSVDQLoader"][1]
    assert lists()["ApplyTransformerOverride"][1] == "flux.safetensors"
    put(models, "diffusion_models/wan-fp8.safetensors")
    assert lists()["ApplyTransformerOverride"] == (["wan-fp8.safetensors", "flux.safetensors"], "wan-fp8.safetensors")


def test_the_catalog_has_the_transformers(models):
    pipeline(models, "diffusers/base", FLUX)
    pipeline(models, "diffusers/sdxl", SDXL)
    put(models, "text_encoders/t5.safetensors", "vae/ae.safetensors", "diffusion_models/wan.safetensors",
        "diffusers/repo/svdq-int4_r32-flux.safetensors", "diffusers/repo/config.json", "diffusers/slim/quant_model_description.json")
    found = {entry.reference: entry.kind for entry in catalog.entries() if not entry.known}
    assert found == {"base": "base", "sdxl": "base", "wan.safetensors": "override", "repo": "svdq", "slim": "modelslim"}


# --- every change is seen ---

@pytest.fixture
def old(models, monkeypatch):
    """(models, walks): model folders of long ago, and how many folders were read since."""
    put(models, "diffusion_models/sub/a.safetensors", "diffusers/part/config.json", _class_name="FluxTransformer2DModel")
    age(models)
    assert there() == ["part", "sub/a.safetensors"]
    walks: list[str] = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: walks.append(str(path)) or real(path))
    assert there() == ["part", "sub/a.safetensors"] and walks == []
    return models, walks


def age(models) -> None:
    """Let all of it be a day old."""
    for folder, _, files in os.walk(models):
        for path in (folder, *(os.path.join(folder, file) for file in files)):
            if not os.path.islink(path):
                os.utime(path, (os.stat(path).st_mtime - 86_400,) * 2)


def test_nothing_is_read_again_while_nothing_changes(old):
    models, walks = old
    first = local.references()
    lists(), catalog.entries()
    assert local.references() is first and walks == []


@pytest.mark.parametrize(("change", "expected"), [
    (lambda m: (m / "diffusion_models/sub/b.gguf").touch(), ["part", "sub/a.safetensors", "sub/b.gguf"]),
    (lambda m: (m / "diffusion_models/sub/a.safetensors").unlink(), ["part"]),
    (lambda m: (m / "diffusion_models/sub/a.safetensors").rename(m / "diffusion_models/sub/z.gguf"), ["part", "sub/z.gguf"]),
    (lambda m: (m / "diffusion_models/sub").rename(m / "checkpoints/other"), ["other/a.safetensors", "part"]),
    (lambda m: put(m, "vae/new/deep/er/ae.safetensors"), ["new/deep/er/ae.safetensors", "part", "sub/a.safetensors"]),
    (lambda m: (m / "diffusers/part/config.json").unlink(), ["sub/a.safetensors"]),
    (lambda m: (m / f"diffusers/part/{MARKER}").touch(), ["sub/a.safetensors"])])
def test_changes_are_seen_at_once(old, change, expected):
    models, _ = old
    change(models)
    assert there() == expected


def test_a_config_that_is_written_in_place_is_read_again(old):
    """Its folder has the time it had."""
    models, walks = old
    (models / "diffusers/part/config.json").write_text('{"_class_name": "AutoencoderKL"}', encoding="utf-8")
    assert fits("part") == {VAE: SURE}
    assert {os.path.relpath(path, models).split(os.sep)[0] for path in walks} == {"diffusers"}, "the others are kept"


def test_a_part_of_a_pipeline_that_comes_later(models):
    pipeline(models, "diffusers/base", FLUX, "vae")
    age(models)
    assert fits("base")[VAE] == MAYBE
    put(models, f"diffusers/base/vae/{WEIGHTS}")
    assert fits("base")[VAE] == SURE


def test_a_second_change_within_the_same_tick_of_the_clock(models):
    """File systems keep times as coarse as two seconds: a folder that has just changed is read again."""
    folder = models / "diffusion_models"
    put(models, "diffusion_models/a.gguf")
    assert there() == ["a.gguf"]
    then = os.stat(folder)
    put(models, "diffusion_models/b.gguf")
    os.utime(folder, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert there() == ["a.gguf", "b.gguf"]


def test_folders_that_come_and_go(models):
    """extra_model_paths.yaml, or a pack that adds a folder while ComfyUI runs; a folder that is not there yet."""
    import folder_paths

    late = models / "late"
    folder_paths.folder_names_and_paths["checkpoints"][0].append(str(late))
    assert there() == []
    put(models, "late/x.safetensors")
    assert fits("x.safetensors") == {TRANSFORMER: SURE, TEXTS: LIKELY, VAE: LIKELY}
    age(models)
    assert VAE in fits("x.safetensors")
    folder_paths.folder_names_and_paths["vae"][0].append(str(late))
    assert fits("x.safetensors")[VAE] == SURE
    for key in ("checkpoints", "vae"):
        folder_paths.folder_names_and_paths[key][0].remove(str(late))
    assert there() == []


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links(models):
    elsewhere = models / "elsewhere"
    put(models, "elsewhere/one/a.gguf", "elsewhere/two/b.gguf")
    root = models / "diffusion_models"
    (root / "link").symlink_to(elsewhere / "one")
    (root / "file.gguf").symlink_to(elsewhere / "two" / "b.gguf")
    (root / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "gone.gguf").symlink_to(models / "nowhere")
    age(models)
    os.utime(root)
    assert there() == ["file.gguf", "link/a.gguf"]
    put(models, "elsewhere/one/c.gguf")
    assert there() == ["file.gguf", "link/a.gguf", "link/c.gguf"]
    (root / "link").unlink()
    (root / "link").symlink_to(elsewhere / "two")
    assert there() == ["file.gguf", "link/b.gguf"]


def test_comfyui_lists_its_nodes_with_one_look(old, monkeypatch):
    import folder_paths

    looks: list[str] = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *args, **kwargs: looks.append(str(path)) or real(path, *args, **kwargs))
    with folder_paths.cache_helper:
        lists()
    assert len(looks) == len(set(looks)) > len(KEYS) - 1
    (old[0] / "vae" / "x.sft").touch()
    with folder_paths.cache_helper:
        assert "x.sft" in lists()["LoadBaseVAE"][0]


def test_threads_see_whole_lists(models):
    put(models, *(f"diffusion_models/{i}/{j}.gguf" for i in range(5) for j in range(5)))
    wrong: list[int] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            count = len(there())
            if count % 5:
                wrong.append(count)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        (models / "diffusion_models" / "4").rename(models / "4")
        (models / "4").rename(models / "diffusion_models" / "4")
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(there()) == 25


def test_json_that_is_made_to_be_long(models, monkeypatch):
    """ComfyUI lists its nodes in its event loop: what is no published configuration is not parsed, and nothing is twice."""
    from quantized_transformers.loaders.files import scan

    texts = {"long": '{"_class_name": "FluxTransformer2DModel", "x": "' + "x" * 500_000 + '"}', "nested": "[" * 100_000,
             "many": '{"_class_name": "FluxTransformer2DModel", "x": [' + "0," * 30_000 + "0]}", "bytes": "\ufeff{}",
             "twice": '{"_class_name": "A", "_class_name": "FluxTransformer2DModel"}'}
    for name, text in texts.items():
        put(models, f"diffusers/{name}/{WEIGHTS}")
        (models / "diffusers" / name / "config.json").write_text(text, encoding="utf-8")
    put(models, f"diffusers/good/{WEIGHTS}")
    put(models, "diffusers/good/config.json", _class_name="FluxTransformer2DModel", ignore=["transformer_blocks.0.x"] * 5000)
    read = []
    decode = scan.decode
    monkeypatch.setattr(scan, "decode", lambda data, **bounds: read.append(data) or decode(data, **bounds))
    root = next(root for root in scan.of_roots(lambda roots: roots) if root.path == str(models / "diffusers"))
    said = {name: dict(folder.said.get("config.json", {})) for name, folder in root.folders.items() if name}
    assert {name for name, config in said.items() if config} == {"good"}
    assert len(read) == len(texts), "that of 500 kB is not even opened"
    for change in range(3):  # a folder just written is looked at again each time
        put(models, f"diffusers/other{change}/{WEIGHTS}")
        assert any(one.startswith(f"other{change}") for one in there())
    assert len(read) == len(texts)
