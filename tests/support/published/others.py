"""Cases of Wan, Qwen-Image, Z-Image, HunyuanVideo and LTX-2."""

from __future__ import annotations

import json
import pickle
import zipfile

import torch

from .cases import case, old_scaled, plain, save
from .files import text, write, write_json
from .formats import BF16, F16, F32, fp8, fp8_blocks, fp8_rows, mxfp8, nvfp4
from .models import linears, qwen, rand, wan, z_image


# --- Wan
@case("wan", full_precision=("blocks.0.self_attn.q", "blocks.1.ffn.2"))
def wan_wrapper_fp8_scaled(folder):
    """Wan2_x fp8_e4m3fn_scaled: attention and FFN scaled, scale_weight F32 [1], the rest F16 / F32, marker of two elements."""
    model = wan()
    layers = linears(model, "_attn.", "ffn.")
    stored, truth = old_scaled(model, layers, rest=F16, vector=F32, marker=2, shape=(1,))
    save(folder, stored)
    return truth


@case("wan", full_precision=("blocks.0.self_attn.q", "blocks.1.ffn.2"))
def wan_lightx2v_comfy_fp8_scaled(folder):
    """LightX2V's ComfyUI mode: scale_weight BF16 [], no scale_input, `scaled_fp8` of two zeros, the rest BF16."""
    model = wan()
    stored, truth = old_scaled(model, linears(model, "_attn.", "ffn."), rest=BF16, scale_dtype=BF16, marker=2)
    save(folder, stored)
    return truth


@case("wan", ref=".")
def wan_lightx2v_fp8_by_channel(folder):
    """LightX2V's own FP8: weight_scale F32 [N, 1], no marker, chunks *_partN with diffusers' index name, no config.json."""
    model = wan()
    stored, truth = plain(model, BF16), {k: v.to(BF16).float() for k, v in model.items()}
    for layer in linears(model, "_attn.", "ffn."):
        codes, scale = fp8_rows(model[layer + ".weight"], F32)
        stored |= {layer + ".weight": codes, layer + ".weight_scale": scale}
        truth[layer + ".weight"] = codes.float() * scale
    if folder is not None:
        keys, where = list(stored), {}
        for part in range(0, len(keys), 40):
            name = f"wan2.1_i2v_480p_scaled_fp8_e4m3_part{part // 40}.safetensors"
            write(folder / name, {k: stored[k] for k in keys[part:part + 40]})
            where |= dict.fromkeys(keys[part:part + 40], name)
        write_json(folder / "diffusion_pytorch_model.safetensors.index.json",
                   {"metadata": {"total_size": sum(v.numel() * v.element_size() for v in stored.values())},
                    "weight_map": where})
    return truth


@case("wan")
def wan_lightx2v_nvfp4_sparse(folder):
    """Wan2.2-NVFP4-Sparse: low nibble first AND 128x4 tiles, `alpha` = 1 / (input_global_scale * weight_global_scale)."""
    model = wan()
    stored, truth = plain(model, BF16), {k: v.to(BF16).float() for k, v in model.items()}
    for i, layer in enumerate(linears(model, "_attn.", "ffn.")):
        packed, block, second, values = nvfp4(model[layer + ".weight"], high_first=False, tiles=True)
        global_input = torch.tensor(100. + 7 * i)
        stored |= {layer + ".weight": packed, layer + ".weight_scale": block, layer + ".alpha": second / global_input,
                   layer + ".input_global_scale": global_input}
        truth[layer + ".weight"] = values
    save(folder, stored)
    return truth


@case("wan", unsaid=("modelslim",))
def wan_nvfp4_mxfp8_mixed(folder):
    """convert_to_quant: NVFP4 and MXFP8 (E8M0 scales as U8 [N, K/32]) and BF16 layers, each with comfy_quant."""
    model = wan()
    stored, truth = plain(model, BF16), {k: v.to(BF16).float() for k, v in model.items()}
    for layer in linears(model, "_attn.", "ffn."):
        w = model[layer + ".weight"]
        if "cross_attn.v" in layer or "ffn" in layer:
            codes, scale, truth[layer + ".weight"] = mxfp8(w)
            stored |= {layer + ".weight": codes, layer + ".weight_scale": scale,
                       layer + ".comfy_quant": text({"format": "mxfp8"})}
        elif "self_attn" in layer:
            packed, block, second, truth[layer + ".weight"] = nvfp4(w, high_first=True, tiles=True)
            stored |= {layer + ".weight": packed, layer + ".weight_scale": block, layer + ".weight_scale_2": second,
                       layer + ".comfy_quant": text({"format": "nvfp4"})}
    save(folder, stored)
    return truth


@case("wan-vace")
def wan_vace_fp8_scaled(folder):
    """Wan2.1 VACE (FusionX VACE FP8): Wan with vace_blocks, scaled FP8."""
    model = wan(vace=1)
    stored, truth = old_scaled(model, linears(model, "_attn.", "ffn."), rest=F16, marker=2)
    save(folder, stored)
    return truth


# --- Qwen-Image
QWEN_LAYERS = ("img_mlp", "txt_mlp", "txt_mod", "attn.")
QWEN_INPUTS = {"transformer_blocks.1.attn.to_q": 0.03125}
QWEN_CONFIG = {"_class_name": "QwenImageTransformer2DModel", "_diffusers_version": "0.36.0", "patch_size": 2,
               "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 128,
               "num_attention_heads": 1, "joint_attention_dim": 64, "guidance_embeds": False,
               "axes_dims_rope": [16, 56, 56]}


@case("qwen", inputs=QWEN_INPUTS, zero_cond=True)
def qwen_edit_2511_fp8mixed(folder):
    """qwen_image_edit_2511_fp8mixed: comfy_quant, weight_scale and input_scale, and the empty `__index_timestep_zero__`."""
    model = qwen()
    stored, truth = plain(model, BF16), dict(model)
    for layer in linears(model, *QWEN_LAYERS):
        codes, scale = fp8(model[layer + ".weight"])
        stored |= {layer + ".weight": codes, layer + ".weight_scale": scale,
                   layer + ".input_scale": torch.tensor(QWEN_INPUTS.get(layer, 0.0625)),
                   layer + ".comfy_quant": text({"format": "float8_e4m3fn"})}
        truth[layer + ".weight"] = codes.float() * scale
    save(folder, stored | {"__index_timestep_zero__": torch.zeros(0)})
    return truth


@case("qwen", ref=".")
def qwen_fp8_blocks_weight_scale_inv(folder):
    """Fine-grained FP8 in a diffusers folder: weight_scale_inv F32 by 128 x 128 block, quant_method fp8, dynamic."""
    model = qwen()
    stored, truth = plain(model, BF16), dict(model)
    for layer in linears(model, "transformer_blocks"):
        codes, scale, truth[layer + ".weight"] = fp8_blocks(model[layer + ".weight"], 128, 128)
        stored |= {layer + ".weight": codes, layer + ".weight_scale_inv": scale}
    save(folder, stored, name="diffusion_pytorch_model.safetensors")
    if folder is not None:
        write_json(folder / "config.json", {**QWEN_CONFIG, "quantization_config": {
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["img_in", "txt_in", "proj_out", "norm_out", "time_text_embed"]}})
    return truth


@case("qwen", ref=".")
def qwen_modelopt_nvfp4_svdquant(folder):
    """ModelOpt's NVFP4_SVD export: NVFP4 residual, pre_quant_scale by column, svdquant_lora_a [r, K] and _b [N, r]."""
    model = qwen()
    stored, truth = plain(model, BF16), dict(model)
    for layer in linears(model, "transformer_blocks.1."):
        w = model[layer + ".weight"]
        smooth = (1 + 0.5 * rand(layer, "svd smooth", shape=(w.shape[1],)).abs()).to(BF16)
        a = (rand(layer, "a", shape=(16, w.shape[1])) / w.shape[1] ** 0.5).to(BF16)
        b = (0.25 * rand(layer, "b", shape=(w.shape[0], 16))).to(BF16)
        packed, block, second, values = nvfp4(w / smooth.float() - b.float() @ a.float(), high_first=False, tiles=False)
        stored |= {layer + ".weight": packed, layer + ".weight_scale": block, layer + ".weight_scale_2": second,
                   layer + ".input_scale": torch.tensor(0.004), layer + ".pre_quant_scale": smooth,
                   layer + ".svdquant_lora_a": a, layer + ".svdquant_lora_b": b}
        truth[layer + ".weight"] = (values + b.float() @ a.float()) * smooth.float()
    save(folder, stored, name="diffusion_pytorch_model.safetensors")
    if folder is not None:
        write_json(folder / "config.json", {**QWEN_CONFIG, "quantization_config": {
            "quant_method": "modelopt", "quant_algo": "NVFP4_SVD", "group_size": 16, "has_zero_point": False,
            "pre_quant_scale": True, "lora_rank": 16, "producer": {"name": "modelopt", "version": "0.45.0"},
            "ignore": ["img_in", "txt_in", "proj_out", "norm_out*", "time_text_embed*", "transformer_blocks.0.*"]}})
    return truth


@case("qwen", ref=".")
def qwen_modelopt_nvfp4_full_repo(folder):
    """nvidia/Qwen-Image-NVFP4: a whole pipeline repo; the first block BF16, the second NVFP4 in ModelOpt's order."""
    model = qwen()
    stored, truth = plain(model, BF16), dict(model)
    for layer in linears(model, "transformer_blocks.1."):
        packed, block, second, truth[layer + ".weight"] = nvfp4(model[layer + ".weight"], high_first=False, tiles=False)
        stored |= {layer + ".weight": packed, layer + ".weight_scale": block, layer + ".weight_scale_2": second,
                   layer + ".input_scale": torch.tensor(0.004)}
    save(folder, stored, {"format": "pt"}, "transformer/diffusion_pytorch_model-00001-of-00001.safetensors")
    if folder is not None:
        keys = dict.fromkeys(stored, "diffusion_pytorch_model-00001-of-00001.safetensors")
        write_json(folder / "transformer/diffusion_pytorch_model.safetensors.index.json",
                   {"metadata": {"total_size": 1}, "weight_map": keys})
        write_json(folder / "transformer/config.json", {**QWEN_CONFIG, "quantization_config": {
            "quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.45.0"},
            "config_groups": {"group_0": {"input_activations": {"dynamic": False, "num_bits": 4, "type": "float",
                                                                "group_size": 16},
                                          "weights": {"dynamic": False, "num_bits": 4, "type": "float",
                                                      "group_size": 16}, "targets": ["Linear"]}},
            "ignore": ["img_in", "txt_in", "proj_out", "norm_out*", "time_text_embed*", "transformer_blocks.0.*"]}})
        write_json(folder / "model_index.json", {
            "_class_name": "QwenImagePipeline", "_diffusers_version": "0.36.0",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "QwenImageTransformer2DModel"], "vae": ["diffusers", "AutoencoderKLQwenImage"]})
    return truth


# --- Z-Image
@case("z-image")
def z_image_merge_norm_final(folder):
    """A BF16 merge as CivitAI has them: model.diffusion_model. before every name and a left-over `norm_final.weight`, NaN."""
    model = z_image()
    stored = {k: torch.zeros(1, 1, dtype=BF16).expand(v.shape) if v.stride() == (0, 0) else v.to(BF16)
              for k, v in model.items()}
    junk = torch.full((1152,), 1.8e19)
    junk[2] = float("nan")
    save(folder, {"model.diffusion_model." + k: v for k, v in stored.items()}
         | {"model.diffusion_model.norm_final.weight": junk.to(BF16)})
    return {k: v.float() for k, v in stored.items()}


# --- HunyuanVideo
@case("hunyuan", ref="mp_rank_00_model_states_fp8.pt", words=("pickle", ".pt files"))
def hunyuan_fp8_pt(folder):
    """Tencent's FP8 release: a pickle with a second one of scales beside it. Never read; the message must say so."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("mp_rank_00_model_states_fp8.pt", "mp_rank_00_model_states_fp8_map.pt"):
            with zipfile.ZipFile(folder / name, "w") as archive:
                info = zipfile.ZipInfo("archive/data.pkl", (2025, 1, 1, 0, 0, 0))
                archive.writestr(info, pickle.dumps({"module": {}}, protocol=2))


# --- other models: names only, the message must say what the file is
@case("other", words=("ltx",))
def ltx2_nvfp4_names(folder):
    """ltx-2-19b NVFP4: model.diffusion_model. with an audio branch, beside two VAEs, _quantization_metadata."""
    names = ("adaln_single.emb.timestep_embedder.linear_1.weight", "adaln_single.emb.timestep_embedder.linear_1.bias",
             "audio_adaln_single.linear.weight", "patchify_proj.weight", "proj_out.weight", "scale_shift_table",
             "transformer_blocks.0.attn1.to_q.bias", "transformer_blocks.0.attn2.to_k.bias")
    stored = {"model.diffusion_model." + n: torch.ones(8, 8).to(BF16) for n in names}
    for layer in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn2.to_k"):
        packed, block, second, _ = nvfp4(rand(layer, shape=(128, 64)), high_first=True, tiles=True)
        stored |= {f"model.diffusion_model.{layer}.weight": packed, f"model.diffusion_model.{layer}.weight_scale": block,
                   f"model.diffusion_model.{layer}.weight_scale_2": second}
    stored |= {"vae.decoder.conv_in.conv.weight": torch.ones(8, 8).to(BF16),
               "audio_vae.decoder.conv_in.conv.weight": torch.ones(8, 8).to(BF16)}
    save(folder, stored, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {
        "model.diffusion_model.transformer_blocks.0.attn1.to_q": {"format": "nvfp4"},
        "model.diffusion_model.transformer_blocks.0.attn2.to_k": {"format": "nvfp4"}}})})
