"""Run the real tools on tiny text encoders: what tests/data/exports/text_packed was made with. One case per call.

    python make_text_packed.py CASE...     on a CPU, in an environment with the case's tool:
    ct_*            llmcompressor 0.14.0.1 (with transformers 5.17)
    bnb_*           bitsandbytes 0.50.2 with transformers 5.17
    gptq, awq       auto-round 0.16.1 (auto_gptq and auto_awq, as their users load them) with transformers 5.23
    modelopt_fp8    nvidia-modelopt 0.47.0 with transformers 5.23
    nunchaku_t5     a checkout of nunchaku-tech/nunchaku (3a3cc3d0) named by NUNCHAKU; one layer

A folder has what the tool saved, less its recipe and tokenizer, and expected.safetensors: `hidden`, all hidden states
that transformers computes in F32 for token ids 1 to 8 from the weights that the tool itself dequantizes (rounded to
`dtype`, the tool's output), and some of these weights under the names of transformers' module.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

OUT = Path(__file__).parents[1] / "data" / "exports" / "text_packed"
VOCAB = 64
IDS = torch.arange(1, 9)[None]


def seeded(model: Any) -> Any:
    """Random weights that are the same for the same names, BF16."""
    from support.transformers_versions import parameters

    with torch.no_grad():
        for name, p in parameters(model).items():
            g = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
            r = torch.randn(p.shape, generator=g)
            p.copy_(1 + 0.2 * r if "norm" in name else 0.05 * r)
    return model.to(torch.bfloat16).eval()


def qwen3(width: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return seeded(Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=width + 32 * (width < 128), num_hidden_layers=1, head_dim=width // 2,
        num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-6, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, max_position_embeddings=512)))


def qwen25vl() -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    from support.transformers_versions import qwen25_vl_config, rope

    text = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "max_position_embeddings": 512, "bos_token_id": 1,
            "eos_token_id": 2, **rope(1e6, mrope_section=[4, 6, 6])}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
              "fullatt_block_indexes": [0], "patch_size": 4}
    special = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return seeded(Qwen2_5_VLForConditionalGeneration(qwen25_vl_config(
        text, vision_config=vision, tie_word_embeddings=False, **special)))


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return seeded(T5EncoderModel(T5Config(
        vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)))


def record(case: str, source: Path, made: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Compute with what the tool dequantized, and keep."""
    import transformers
    from safetensors.torch import save_file

    name = json.loads((source / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model = getattr(transformers, name).from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert weights and weights.keys() <= linear, weights.keys() - linear
    for layer, weight in weights.items():
        before = model.get_submodule(layer).weight
        assert (weight.float() - before).norm() < 0.15 * before.norm(), layer  # no nibble or zero point elsewhere
        model.get_submodule(layer).weight.copy_(weight.to(dtype).float())
    with torch.no_grad():
        hidden = torch.stack(model(input_ids=IDS, output_hidden_states=True).hidden_states)
    keep = [layer for layer in weights if layer.endswith(("k_proj", "down_proj", "SelfAttention.k", "wi_1"))]
    keep = keep[:1 if weights[keep[0]].shape[1] >= 128 else 2]
    expected = {f"{layer}.weight": weights[layer].to(dtype).contiguous() for layer in keep} | {"hidden": hidden.contiguous()}
    folder = OUT / case
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "hf_quant_config.json", "quantize_config.json", "quantization_config.json"):
        if (made / file).is_file():
            shutil.copy(made / file, folder / file)
    save_file(expected, str(folder / "expected.safetensors"))
    print(case, sorted(linear - weights.keys()), sum(file.stat().st_size for file in folder.iterdir()))


def compressed(model: Any, source: Path, made: Path, scheme: str, ignore: list[str]) -> dict[str, torch.Tensor]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers.utils.quantization_config import CompressedTensorsConfig

    kind = type(model)
    made_model = kind.from_pretrained(source, dtype="auto")
    data = {} if "DYNAMIC" in scheme or scheme in ("W4A16", "W8A8") else {
        "dataset": Dataset.from_list([{"input_ids": list(range(8, 40)), "attention_mask": [1] * 32}] * 4),
        "num_calibration_samples": 4, "max_seq_length": 32}
    oneshot(model=made_model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=ignore),
            pipeline="independent" if data else "datafree", **data)
    made_model.save_pretrained(made, save_compressed=True)
    back = kind.from_pretrained(made, dtype="auto", quantization_config=CompressedTensorsConfig(run_compressed=False))
    return {name: module.weight.data for name, module in back.named_modules()
            if isinstance(module, torch.nn.Linear) and hasattr(module, "quantization_scheme") and "visual" not in name}


def bitsandbytes(model: Any, source: Path, made: Path, **options: Any) -> dict[str, torch.Tensor]:
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig

    back = type(model).from_pretrained(source, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16,
                                       device_map={"": "cpu"})
    back.save_pretrained(made)
    weights = {}
    for name, module in back.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # as one long row: its kernel for AVX-512 reads a block that crosses rows as if it began with the row
            state, shape = module.weight.quant_state, module.weight.quant_state.shape
            state.shape = torch.Size([1, shape.numel()])
            weights[name] = bnb.functional.dequantize_4bit(module.weight.data, state).view(shape)
            state.shape = shape
        elif isinstance(module, bnb.nn.Linear8bitLt):
            codes = module.weight.data if module.weight.CB is None else module.weight.CB
            scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB
            weights[name] = bnb.functional.int8_vectorwise_dequant(codes, scale)
    return weights


def autoround(model: Any, source: Path, made: Path, form: str) -> dict[str, torch.Tensor]:
    from auto_round import AutoRound
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")
    AutoRound(model.to(torch.float16), tokenizer, scheme="W4A16", iters=0, nsamples=4, seqlen=32, device_map="cpu",
              disable_opt_rtn=True).quantize_and_save(str(made), format=form)
    for nested in [folder for folder in made.iterdir() if folder.is_dir()]:
        for file in nested.iterdir():
            shutil.move(file, made / file.name)
    return {}


def modelopt(model: Any, made: Path) -> dict[str, torch.Tensor]:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    model.config.architectures = [type(model).__name__]
    model = mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda m: m(torch.arange(8, 40)[None]))
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=str(made))
    return {}


def main(case: str) -> None:
    if case == "nunchaku_t5":
        nunchaku_t5()
        return
    tool, _, rest = case.partition("_")
    model = t5() if "t5" in case else qwen25vl() if "qwen25vl" in case else qwen3(128 if case in ("gptq", "awq", "ct_w4a16") else 64)
    with tempfile.TemporaryDirectory() as at:
        source, made = Path(at) / "source", Path(at) / "made"
        model.save_pretrained(source)
        if tool == "ct":
            scheme = rest.removesuffix("_qwen25vl").upper()
            weights = compressed(model, source, made, scheme, ["lm_head", "re:.*visual.*"])
        elif tool == "bnb":
            options = {"load_in_8bit": True} if "int8" in rest else {
                "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": "double" in rest,
                "bnb_4bit_compute_dtype": torch.bfloat16}
            weights = bitsandbytes(model, source, made, **options)
        elif tool in ("gptq", "awq"):
            weights = autoround(model, source, made, f"auto_{tool}")
        else:
            weights = modelopt(model, made)
        print(sorted(file.name for file in made.iterdir()))
        if not weights:
            weights = independent(made, tool)
        record(case, source, made, weights, torch.float16 if tool in ("gptq", "awq") else torch.bfloat16)


def nunchaku_t5() -> None:
    """One layer by the converter itself (nunchaku/models/text_encoders/tinychat_utils.py), which asks for a weight that is on
    the grid already: what W4Linear.from_linear hands it."""
    import importlib.util

    from safetensors.torch import save_file

    file = Path(os.environ["NUNCHAKU"]) / "nunchaku" / "models" / "text_encoders" / "tinychat_utils.py"
    spec = importlib.util.spec_from_file_location("tinychat_utils", file)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    weight = 0.05 * torch.randn(16, 2, 128, generator=torch.Generator().manual_seed(4))
    low, high = weight.amin(-1), weight.amax(-1)
    scale, zero = ((high - low) / 15).bfloat16(), (-low).bfloat16()
    codes = ((weight + zero.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 15)
    weight = (codes * scale.float()[..., None] - zero.float()[..., None]).flatten(1).bfloat16()
    made = tool.convert_to_tinychat_w4x16y16_linear_weight(weight.clone(), scale, zero, 128)
    (OUT / "nunchaku_t5").mkdir(parents=True, exist_ok=True)
    save_file({"weight": weight, "scale": scale, "zero": zero} | dict(zip(("qweight", "scales", "scaled_zeros"), made, strict=True)),
              str(OUT / "nunchaku_t5" / "layer.safetensors"))


def independent(made: Path, tool: str) -> dict[str, torch.Tensor]:
    """For tools without a way back on a CPU: AWQ's and GPTQ's by the kernels' plain formulas, ModelOpt's code times scale."""
    from safetensors.torch import load_file

    stored, out = load_file(made / "model.safetensors"), {}
    for name in stored:
        if name.endswith(".weight_scale"):
            layer = name.removesuffix(".weight_scale")
            out[layer] = stored[f"{layer}.weight"].float() * stored[name].float()
        elif name.endswith(".qweight"):
            layer = name.removesuffix(".qweight")
            word = {leaf: stored[f"{layer}.{leaf}"].long() & 0xFFFFFFFF for leaf in ("qweight", "qzeros")}
            shift = torch.arange(0, 32, 4)
            scale = stored[f"{layer}.scales"].float()
            if tool == "awq":
                shift = shift[[0, 4, 1, 5, 2, 6, 3, 7]]
                codes = (word["qweight"][..., None] >> shift & 15).flatten(1)
                zeros = (word["qzeros"][..., None] >> shift & 15).flatten(1)
            else:
                codes = (word["qweight"][:, None] >> shift[:, None] & 15).flatten(0, 1)
                zeros = ((word["qzeros"] + 0x11111111) % 2 ** 32)[..., None] >> shift & 15
                zeros = zeros.flatten(1)
            group = torch.arange(len(codes)) // (len(codes) // len(scale))
            out[layer] = ((codes - zeros[group]) * scale[group]).t()
    return out


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # not this folder, which has a bitsandbytes.py of its own
    for argument in sys.argv[1:]:
        main(argument)
