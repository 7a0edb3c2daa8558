"""The command line's commands, one module each: HELP, NEEDS_HOST, add_arguments(parser) and run(options) -> exit code.
With MORE, what stands behind -- is in options.more.

NEEDS_HOST: "no", "yes", "if found" (with ComfyUI, and without it), or "folders": where its models are, and it is not
started; the options then have `base_directory` and `extra_model_paths_config`. All get `comfyui`: its folder, or "".
"""

from __future__ import annotations

COMMANDS = {
    "inspect": "inspect_checkpoint",
    "load": "load",
    "build-fp8": "build_fp8",
    "build-nvfp4": "build_nvfp4",
    "build-gguf": "build_gguf",
    "repack-wan": "repack_wan",
    "compare": "compare",
    "bench": "bench",
    "migrate": "migrate",
    "serve": "serve",
    "workflow": "workflow",
    "fleet": "fleet",
    "doctor": "doctor",
}
