"""What the fuzzer has found: (seed, changes, what has to come of it, words of the refusal)."""

from __future__ import annotations

from fuzz.ops import Op

FOUND: tuple[tuple[str, tuple[Op, ...], str, str], ...] = (
    # a marker that torch has no numpy type for
    ("comfy fp8", (Op("dtype", "model.safetensors", 70, "F8_E8M0"),), "refused", "comfy_quant is F8_E8M0, expected U8"),
    # half of a character, which Python's reader takes and that of the safetensors library does not
    ("scaled fp8", (Op("metadata", "model.safetensors", "config", "\ud800"),), "refused", "half of a character"),
    # a name of a tensor as long as the file
    ("gguf q4_0", (Op("put", "model.gguf", 427, b"\xff\xff\xff\xff"),), "refused", "a tensor of the name"),
    # a setting of any length in the refusal
    ("vae wan", (Op("json", "vae/config.json", ("attn_scales",), ["x" * 100_000]),), "refused", "attn_scales"),
    # Nunchaku takes a tensor scale that is not there as 1
    ("nunchaku fp4", (Op("removed", "svdq-fp4_r16-flux.1-dev.safetensors", 14),), "refused", "neither wtscale nor wcscales"),
    ("nunchaku fp4", (Op("removed", "svdq-fp4_r16-flux.1-dev.safetensors", 37),), "refused", "neither wtscale nor wcscales"),
    # a merge of lists in a tokenizer, a component that is a number, a length that is a list
    ("text flux1", (Op("json", "tokenizer/tokenizer.json", ("model", "merges", 23, 0), [None]),), "refused",
     "model.merges is a list of"),
    ("vae flux1", (Op("json", "model_index.json", ("vae",), 0.5),), "refused", "vae is 0.5, expected a library and a class"),
    ("text flux1", (Op("json", "text_encoder/config.json", ("max_position_embeddings",), []),), "refused",
     "max_position_embeddings is a list of 0, expected a whole number"),
    ("comfy mxfp8", (Op("dtype", "model.safetensors", 71, "F8_E4M3"),), "refused", "comfy_quant is F8_E4M3, expected U8"),
    # block scales in the host's order were read in ModelOpt's, where the marker of one layer was gone
    ("comfy mxfp8", (Op("removed", "model.safetensors", 73),), "refused", "no comfy_quant marker"),
)
