"""FLUX.2's and its klein's, Qwen-Image's and Z-Image's text encoders in their published sizes: names, shapes and configs. No memory."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from quantized_transformers.loaders.components import text_part
from quantized_transformers.loaders.components.text_encoders import gemma3, mistral3, qwen3, qwen3_vl, qwen25_vl
from quantized_transformers.loaders.containers.checkpoint import Checkpoint
from quantized_transformers.loaders.errors import CheckpointError
from quantized_transformers.loaders.locate import locate
from quantized_transformers.loaders.plan import LoadPlan
from support import text_encoders_llm as llm

pytestmark = pytest.mark.parity

# The published sizes in the form of transformers 4, put together by hand (no Hub here); Mistral's tower is cut short.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mistral3": {
        "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3",
        "text_config": {"head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 32768,
                        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
                        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None,
                        "vocab_size": 131072},
        "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 2, "head_dim": 64,
                          "num_attention_heads": 16, "intermediate_size": 4096, "patch_size": 14}},
    "qwen25_vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "hidden_act": "silu", "hidden_size": 3584,
        "image_token_id": 151655, "intermediate_size": 18944, "max_window_layers": 28, "model_type": "qwen2_5_vl",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}, "rope_theta": 1e6,
        "sliding_window": 32768, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 152064,
        "vision_config": {**llm.VISION, "out_hidden_size": 3584, "in_chans": 3, "spatial_patch_size": 14,
                          "tokens_per_second": 2, "model_type": "qwen2_5_vl"}},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2560, "intermediate_size": 9728, "max_window_layers": 36, "model_type": "qwen3",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936}}
_QWEN3_VL = {"attention_bias": False, "head_dim": 128, "hidden_act": "silu", "num_attention_heads": 32, "num_hidden_layers": 36,
             "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 5000000, "vocab_size": 151936, "model_type": "qwen3_vl_text",
             "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}}
for _name, _text, _vision in (("krea2", {"hidden_size": 2560, "intermediate_size": 9728}, qwen3_vl.SMALL),
                              ("joyimage", {"hidden_size": 4096, "intermediate_size": 12288}, qwen3_vl.LARGE),
                              ("ideogram4", {"hidden_size": 4096, "intermediate_size": 12288}, qwen3_vl.LARGE)):
    PUBLISHED[_name] = {
        "architectures": ["Qwen3VLForConditionalGeneration" if _name == "joyimage" else "Qwen3VLModel"], "image_token_id": 151655,
        "model_type": "qwen3_vl", "tie_word_embeddings": _name == "krea2", "text_config": {**_QWEN3_VL, **_text},
        "vision_config": {**qwen3_vl.COMMON, **qwen3_vl.VISION[_vision], "out_hidden_size": _text["hidden_size"], "model_type": "qwen3_vl"}}
PUBLISHED["qwen3_8b"] = {**PUBLISHED["qwen3"], "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
ENCODERS = {"mistral3": mistral3.MISTRAL3, "qwen25_vl": qwen25_vl.QWEN25_VL, "qwen3": qwen3.QWEN3,
            "qwen3_8b": qwen3.KLEIN_9B}
QWEN3_VL = {"krea2": qwen3_vl.KREA2, "joyimage": qwen3_vl.JOYIMAGE, "ideogram4": qwen3_vl.IDEOGRAM4}
HOSTS = {"mistral3": "Mistral3Small24B", "qwen25_vl": "Qwen25_7BVLI", "qwen3": "Qwen3_4B", "qwen3_8b": "Qwen3_8B"}
LEAVES = {"mistral3": ("model.language_model.", "language_model.model."), "qwen25_vl": ("model.language_model.", "model."),
          "qwen3": ("model.", ""), "qwen3_8b": ("model.", "")}


def changed(name: str, **values: Any) -> dict[str, Any]:
    """A published config.json with other values in its language model's part; vision={...} in its vision_config."""
    config = json.loads(json.dumps(PUBLISHED[name]))
    config.get("vision_config", {}).update(values.pop("vision", {}))
    (config.get("text_config") or config).update(values)
    return config


def in_memory(name: str) -> dict[str, torch.Tensor]:
    """The published model as transformers 5 names it, without memory."""
    import transformers

    config = json.loads(json.dumps(PUBLISHED[name]))
    made = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        tensors = getattr(transformers, config["architectures"][0])(made).state_dict()
    new, old = LEAVES[name]
    if any(key.startswith(new) for key in tensors):
        return dict(tensors)
    # before 4.52 the names in memory were those in files
    return {new + key.removeprefix(old) if key.startswith(old) else
            key.removeprefix("language_model.") if key.endswith("lm_head.weight") else f"model.{key}": value
            for key, value in tensors.items()}


@pytest.mark.parametrize("name", ENCODERS)
def test_published_sizes_and_names(name, tmp_path):
    """transformers' published model -> exactly the host's, from the names in memory (5) and in files (4)."""
    import comfy.ops
    import comfy.text_encoders.llama

    config, tensors = PUBLISHED[name], in_memory(name)
    assert ENCODERS[name].host_config(config) == {}
    host = getattr(comfy.text_encoders.llama, HOSTS[name])({}, torch.bfloat16, "meta", comfy.ops.manual_cast)
    expected = {key: value.shape for key, value in host.state_dict().items()}
    new, old = LEAVES[name]
    files = {key.replace(new, old, 1) if key.startswith(new) else key.removeprefix("model."): value
             for key, value in tensors.items()}
    assert files.keys() != tensors.keys()
    if name == "mistral3":
        files["language_model.lm_head.weight"] = files.pop("lm_head.weight")
    for stored in (tensors, files):
        assert host_shapes(planned(name, stored, config, tmp_path)) == expected


@pytest.mark.parametrize(("name", "told"), [
    ("krea2", {}), ("joyimage", {}), ("ideogram4", {"lm_head": False, "final_norm": False})])
def test_published_qwen3_vl(name, told, tmp_path):
    """All of it, eyes and head, as far as the host has it; Ideogram 4 reads the last state before the final norm."""
    import comfy.ops
    import comfy.text_encoders.qwen3vl
    import transformers

    config = json.loads(json.dumps(PUBLISHED[name]))
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**config))
    assert QWEN3_VL[name].host_config(PUBLISHED[name]) == told
    kind = comfy.text_encoders.qwen3vl._make_qwen3vl_model(QWEN3_VL[name].host_name)
    host = kind(dict(told), torch.bfloat16, "meta", comfy.ops.manual_cast)
    expected = {key: value.shape for key, value in host.state_dict().items()}
    assert host_shapes(planned(name, dict(model.state_dict()), PUBLISHED[name], tmp_path)) == expected


def test_published_gemma3(tmp_path):
    """LTX-2's, without its eyes; rotary embeddings as transformers 4 wrote them, and its defaults left out."""
    import comfy.ops
    import comfy.text_encoders.llama
    import transformers

    text = {"hidden_size": 3840, "intermediate_size": 15360, "model_type": "gemma3_text", "num_attention_heads": 16,
            "num_hidden_layers": 48, "num_key_value_heads": 8, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 14}
    with torch.device("meta"):
        made = transformers.Gemma3Config(text_config=dict(text), vision_config=vision)
        tensors = transformers.Gemma3ForConditionalGeneration(made).state_dict()
    assert gemma3.GEMMA3.host_config(config) == {}
    host = comfy.text_encoders.llama.Gemma3_12B({}, torch.bfloat16, "meta", comfy.ops.manual_cast)
    expected = {key: value.shape for key, value in host.state_dict().items() if not key.startswith(gemma3.EYES)}
    assert host_shapes(planned("gemma3", dict(tensors), config, tmp_path)) == expected
    for changed_rope in ({"rope_scaling": None}, {"rope_local_base_freq": 1e5}, {"sliding_window": 512}):
        with pytest.raises(CheckpointError):
            gemma3.GEMMA3.host_config({**config, "text_config": {**text, **changed_rope}})


@pytest.mark.parametrize("each", [False, True])
def test_published_projections_of_ltx2(each, tmp_path):
    """Of LTX-2 and of 2.3; what else diffusers' connectors hold is the transformer's."""
    import comfy.ops
    import comfy.text_encoders.lt
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    settings = {"per_modality_projections": each, "proj_bias": each, "rope_type": "split"}
    with torch.device("meta"):
        tensors = LTX2TextConnectors(**settings, video_connector_num_attention_heads=1, audio_connector_num_attention_heads=1).state_dict()
    config = {"_class_name": "LTX2TextConnectors", "caption_channels": 3840, "text_proj_in_factor": 49, "video_hidden_dim": 4096,
              "audio_hidden_dim": 2048, **settings}
    assert gemma3.CONNECTORS.host_config(config) == {}
    kind = comfy.text_encoders.lt.LTXAVTEModel
    host = kind(torch.bfloat16, "meta", torch.bfloat16, "dual_linear" if each else "single_linear",
                {"custom_operations": comfy.ops.manual_cast})
    expected = {key: value.shape for key, value in host.state_dict().items() if key.startswith(gemma3.PROJECTION)}
    assert expected and host_shapes(planned("connectors", dict(tensors), config, tmp_path)) == expected
    with pytest.raises(CheckpointError):
        gemma3.CONNECTORS.host_config({**config, "proj_bias": not each})


@pytest.mark.parametrize(("name", "values", "message"), [
    ("krea2", {"num_hidden_layers": 35}, "needs 36 layers"), ("krea2", {"hidden_size": 4096, "vision": {"out_hidden_size": 4096}}, "4B"),
    ("joyimage", {"vision": {"depth": 24}}, "depth 24"), ("ideogram4", {"head_dim": 64}, "head_dim 64"),
    ("krea2", {"rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default"}}, "mrope_section")])
def test_what_the_host_fixes_of_qwen3_vl(name, values, message):
    with pytest.raises(CheckpointError, match=message):
        QWEN3_VL[name].host_config(changed(name, **values))


def planned(name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any], folder: Path) -> LoadPlan:
    """What is made of a file of these tensors, all of it a hole in the file system."""
    at, header = 0, {}
    for key, tensor in tensors.items():
        header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at := at + 2 * tensor.numel()]}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + at)
    checkpoint = Checkpoint(locate(str(path)))
    encoder = {**ENCODERS, **QWEN3_VL, "gemma3": gemma3.GEMMA3, "connectors": gemma3.CONNECTORS}[name]
    text_part.know(checkpoint, encoder, config)
    return text_part.planned(checkpoint, encoder, config)[1]


def host_shapes(plan: LoadPlan) -> dict[str, torch.Size]:
    plan.description.require_loadable()
    weights = {f"{module.native}.weight": torch.Size((sum(module.rows), *module.inner)) for module, _ in plan.modules}
    return weights | {f"{module.native}.bias": torch.Size((sum(module.rows),)) for module, _ in plan.modules if module.bias}


@pytest.mark.parametrize("name", ENCODERS)
def test_damaged_tensors_are_refused(name, tmp_path):
    config, tensors = PUBLISHED[name], in_memory(name)

    def problems(tensors: dict[str, torch.Tensor], config: dict[str, Any] = config) -> str:
        return "\n".join(planned(name, tensors, config, tmp_path).description.problems)

    assert problems(tensors) == ""
    norm = next(key for key in tensors if key.endswith("layers.1.post_attention_layernorm.weight"))
    assert problems({key: value for key, value in tensors.items() if key != norm}) == \
        "missing tensor model.layers.1.post_attention_layernorm.weight"
    extra = norm.replace("post_attention_layernorm.weight", "mlp.extra")
    assert problems({**tensors, extra: tensors[norm]}) == "1 unexpected tensors: model.layers.1.mlp.extra"
    last = "40" if name == "mistral3" else "36"
    extra = norm.replace("layers.1.post_attention_layernorm", f"layers.{last}.norm")
    assert problems({**tensors, extra: tensors[norm]}) == f"1 unexpected tensors: model.layers.{last}.norm.weight"
    assert "model.layers.1.post_attention_layernorm.weight is [7], expected" in problems(
        {**tensors, norm: torch.empty(7, device="meta")})
    with pytest.raises(CheckpointError, match="are both"):
        alias = norm.replace("model.language_model.", "language_model." if name == "qwen25_vl" else "model.")
        alias = norm.removeprefix("model.") if name.startswith("qwen3") else alias
        problems({**tensors, alias: tensors[norm]})
    assert "expected [4096, " in problems(tensors, changed(name, intermediate_size=4096))


@pytest.mark.parametrize(("name", "values"), [
    ("mistral3", {"hidden_size": 4096}), ("mistral3", {"head_dim": 160}), ("mistral3", {"hidden_act": "gelu"}),
    ("mistral3", {"sliding_window": 4096}), ("mistral3", {"num_hidden_layers": 29}), ("mistral3", {"rope_theta": None}),
    ("mistral3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e9, "factor": 16.0}}),
    ("mistral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),  # beside rope_theta 1e9
    ("qwen3", {"hidden_size": 2048}), ("qwen3", {"attention_bias": True}), ("qwen3", {"use_sliding_window": True}),
    ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}), ("qwen3", {"partial_rotary_factor": 0.5}),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}), ("qwen3", {"num_hidden_layers": 2}),
    ("qwen3", {"head_dim": 64}), ("qwen3_8b", {"hidden_size": 2560}), ("qwen3_8b", {"num_hidden_layers": 26}),
    ("qwen25_vl", {"num_key_value_heads": 2}), ("qwen25_vl", {"num_attention_heads": 14}),
    ("qwen25_vl", {"rope_scaling": {"type": "mrope", "mrope_section": [24, 20, 20]}}), ("qwen25_vl", {"rope_scaling": None}),
    ("qwen25_vl", {"vision": {"depth": 16}}), ("qwen25_vl", {"vision": {"window_size": 56}}),
    ("qwen25_vl", {"vision": {"fullatt_block_indexes": [7]}}), ("qwen25_vl", {"vision": {"out_hidden_size": 2048}}),
    ("qwen25_vl", {"vision": {"hidden_act": "gelu"}}), ("qwen25_vl", {"image_token_id": 7}),
    ("qwen25_vl", {"vision": {"rope_parameters": {"rope_theta": 500.0, "rope_type": "axial"}}})])
def test_what_the_host_fixes_is_refused(name, values):
    with pytest.raises(CheckpointError):
        ENCODERS[name].host_config(changed(name, **values))


@pytest.mark.parametrize("name", ENCODERS)
def test_what_the_host_can_be_told_is_passed_on(name):
    values = {"rope_theta": 12345.0, "rms_norm_eps": 1e-3, "vocab_size": 1000, "intermediate_size": 64}
    assert ENCODERS[name].host_config(changed(name, **values)) == values
    rope = {"rope_parameters": {"rope_theta": 12345.0, "rope_type": "default", "mrope_section": [16, 24, 24]}}
    assert ENCODERS[name].host_config(changed(name, rope_theta=None, rope_scaling=None, **rope)) == {"rope_theta": 12345.0}
    expected = {"num_hidden_layers": 30} | ({"final_norm": True} if name == "mistral3" else {})
    assert ENCODERS[name].host_config(changed(name, num_hidden_layers=30)) == expected
