"""The command line's commands, one module each: HELP, NEEDS_HOST, add_arguments(parser) and run(options) -> exit code.

NEEDS_HOST: "no", "yes", or "if found" (with ComfyUI, and without it).
"""

from __future__ import annotations

COMMANDS = {
    "inspect": "inspect_checkpoint",
    "load": "load",
    "repack-wan": "repack_wan",
    "doctor": "doctor",
}
