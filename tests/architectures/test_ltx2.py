"""LTX-2's connectors: a component of its own in diffusers, a part of the transformer in ComfyUI."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil

import pytest
import torch

from quantized_transformers.loaders import model
from quantized_transformers.loaders.architectures.classes import ltx2
from quantized_transformers.loaders.errors import CheckpointError, MissingFiles
from quantized_transformers.loaders.locate import locate
from support import common, downloads
from support.derived.ltx2 import CASES
from support.hub import COMMIT, FakeRepo, Hub
from support.passthrough import load

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=CASES, ids=[case.model for case in CASES])
def pipeline(request, tmp_path_factory):
    """(case, folder, the connectors in F32)."""
    import diffusers

    case, folder = request.param, tmp_path_factory.mktemp("ltx2") / "pipeline"
    kind = diffusers.LTX2VideoTransformer3DModel
    torch.manual_seed(0)
    common.randomise(kind(**case.config)).save_pretrained(folder / "transformer")
    place = importlib.import_module(ltx2.CLASS.companions["connectors"].place)
    config = {key: value for key, value in case.companions["connectors"].items() if key != "_class_name"}
    stored, net = common.randomise(place.LTX2TextConnectors(**config)), place.LTX2TextConnectors(**config).eval()
    net.load_state_dict(stored.state_dict())
    stored.save_pretrained(folder / "connectors")
    (folder / "model_index.json").write_text(json.dumps({
        "_class_name": "LTX2Pipeline", "transformer": ["diffusers", "LTX2VideoTransformer3DModel"],
        "connectors": ["ltx2", "LTX2TextConnectors"]}), encoding="utf-8")
    return case, folder, net


@pytest.mark.parametrize("tokens", [1024, 1000])
def test_the_connectors_do_what_diffusers_do(pipeline, tokens):
    """Of 1024 tokens those that are none are registers, in both."""
    _, folder, net = pipeline
    g = torch.Generator().manual_seed(2)
    video, sound = (torch.randn(1, 1024, 32, generator=g) for _ in range(2))
    mask = torch.zeros(1, 1, 1, 1024)
    mask[..., tokens:] = torch.finfo(torch.float32).min
    diffusion_model = load(folder).patcher.model.diffusion_model
    with torch.no_grad():
        for given, ours, theirs in ((video, diffusion_model.video_embeddings_connector, net.video_connector),
                                    (sound, diffusion_model.audio_embeddings_connector, net.audio_connector)):
            expected, found = theirs(given, mask)[0], ours(given[:, :tokens])[0]
            assert (found - expected).abs().max() / expected.abs().max() < 1e-5


def test_the_pipeline_and_its_transformer_are_the_same(pipeline):
    _, folder, _ = pipeline
    whole, alone = locate(str(folder)), locate(str(folder / "transformer"))
    assert whole.companions[0].files == alone.companions[0].files and len(whole.companions) == len(alone.companions) == 1
    assert len(whole.paths) == 4


@pytest.mark.full
@pytest.mark.parametrize("pipeline", CASES[:1], ids=["LTX-2"], indirect=True)  # the others' files are the same
def test_a_download_brings_them(pipeline, tmp_path):
    """With the transformer, and where an older download lacks them."""
    _, folder, _ = pipeline
    with Hub({"owner/ltx2": FakeRepo.of(folder)}) as hub:
        code, text = downloads.run(hub, tmp_path, "owner/ltx2", "--download")
        assert code == 0 and "LTXAV" in text, text
        snapshot = tmp_path / "hub" / "models--owner--ltx2" / "snapshots" / COMMIT
        shutil.rmtree(snapshot / "connectors")
        with pytest.raises(MissingFiles):
            locate(str(snapshot))
        assert downloads.run(hub, tmp_path, "owner/ltx2", "--download")[0] == 0
        assert {path.name for path in (snapshot / "connectors").iterdir()} == {"config.json", downloads.WEIGHTS}


def test_a_transformer_alone_is_refused(pipeline, tmp_path):
    _, folder, _ = pipeline
    shutil.copytree(folder / "transformer", tmp_path / "transformer")
    with pytest.raises(CheckpointError, match="none lie beside this transformer"):
        load(tmp_path / "transformer")
    with pytest.raises(CheckpointError, match="none lie beside this transformer"):
        model.defer(model.Request(str(tmp_path / "transformer")))


@pytest.mark.parametrize("component, change, words", [
    ("connectors", {"audio_connector_num_layers": 2}, "one video_connector_num_layers for video and sound"),
    ("connectors", {"connector_rope_base_seq_len": 2048}, "connector_rope_base_seq_len 2048 (ComfyUI: 4096)"),
    ("connectors", {"a_new_option": 3}, "a_new_option"),
    ("connectors", {"rope_type": "interleaved"}, "one rope_type in transformer and connectors"),
    ("transformer", {"use_prompt_adaln_single": False}, "use_prompt_adaln_single False (ComfyUI: True)"),
    ("transformer", {"causal_offset": 0}, "causal_offset 0 (ComfyUI: 1)"),
])
def test_what_comfyui_does_not_run_is_refused(pipeline, component, change, words, tmp_path):
    _, folder, _ = pipeline
    shutil.copytree(folder, tmp_path / "pipeline")
    file = tmp_path / "pipeline" / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "pipeline")
    assert words in str(caught.value)


def test_the_host_takes_what_config_json_says(pipeline, tmp_path):
    _, folder, _ = pipeline
    shutil.copytree(folder, tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "transformer" / "config.json"
    told = json.loads(file.read_text(encoding="utf-8")) | {"pos_embed_max_pos": 10, "rope_theta": 5000.0}
    file.write_text(json.dumps(told), encoding="utf-8")
    net = load(tmp_path / "pipeline").patcher.model.diffusion_model
    assert net.positional_embedding_max_pos == [10, 2048, 2048] and net.positional_embedding_theta == 5000.0
    assert net.causal_temporal_positioning and net.use_middle_indices_grid


def test_what_a_header_leaves_out_is_the_hosts_own(pipeline):
    """Lightricks' headers leave some of it out: a base that says it would be another than their files."""
    from comfy.ldm.lightricks.av_model import LTXAVModel

    given = {key: parameter.default for key, parameter in inspect.signature(LTXAVModel.__init__).parameters.items()}
    assert all(given[key] == value for key, value in ltx2._OWN.items())
    case, folder, _ = pipeline
    base = model.defer(model.Request(str(folder))).patcher
    said = base.model.model_config.unet_config
    own = {**ltx2._OWN, **ltx2._OWN_CONNECTORS}
    assert not [key for key, value in own.items() if key in said and said[key] == value]
    assert not [key for key in said if key.startswith("audio_connector")]


@pytest.mark.parametrize("weights, files", [(True, "transformer/* connectors/*"), (False, "transformer/config.json connectors/config.json")])
def test_the_command_fetches_the_connectors_too(weights, files):
    with pytest.raises(MissingFiles) as error:
        locate("Lightricks/LTX-2", need_weights=weights)
    assert all(name in str(error.value) for name in files.split())
