"""What the fuzzer has found: (seed, changes, what has to come of it, words of the refusal)."""

from __future__ import annotations

from fuzz.ops import Op

FOUND: tuple[tuple[str, tuple[Op, ...], str, str], ...] = (
    # a marker that torch has no numpy type for
    ("comfy fp8", (Op("dtype", "model.safetensors", 70, "F8_E8M0"),), "refused", "comfy_quant is F8_E8M0, expected U8"),
    # block scales in the host's order were read in ModelOpt's, where the marker of one layer was gone
    ("comfy mxfp8", (Op("removed", "model.safetensors", 73),), "refused", "no comfy_quant marker"),
)
