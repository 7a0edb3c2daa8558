"""References -> the `sglang serve` that serves them, named so that a client can tell what it serves.

All paths are of this machine, so that the server asks no hub. What a user adds behind -- must not undo what the name
promises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from ...loaders.locate import base_of_quantized
from . import checks, known
from .checks import REFUSED, Check
from .identity import ROLES, Identity
from .installed import COMMAND, Installed, find
from .layout import Layout
from .references import Base, LoRA, Override, base_of, lora_of, override_of

SCHEDULER = 100  # above --port: a port for each copy of the model, and the one where ranks meet behind them
OFFLOADS = ("auto", "none", "layerwise")
# Flags that say what is served, where, and on what: behind -- they would make the name a lie.
PROMISED = frozenset({
    "--host", "--port", "--served-model-name", "--model-path", "--model", "--num-gpus", "--tp-size", "--sp-degree",
    "--ulysses-degree", "--ring-degree", "--kv-gather-degree", "--cfg-parallel-size", "--enable-cfg-parallel",
    "--dp-size", "--dp", "--data-parallel-size", "--scheduler-port", "--master-port", "--strict-ports",
    "--quantization", "--config", "--lora-path", "--lora-scale", "--lora-weight-name", "--lora-nickname",
    "--lora-alpha", "--backend"})
_FREE = ("--output-path", "--input-save-path")  # paths that change no picture


@dataclass(frozen=True)
class Request:
    """What to serve and how, as the command line has it. `loras` are (reference, strength); `more` are SGLang's own
    arguments."""

    base: str
    override: str = ""
    kind: str = "auto"
    override_2: str = ""
    weights_name: str = ""
    revision: str = ""
    layout: Layout = Layout()
    offload: str = "auto"
    loras: tuple[tuple[str, float], ...] = ()
    host: str = "127.0.0.1"
    port: int = 30000
    sglang: str = ""
    state: str = "sglang-output"
    download: bool = False
    more: tuple[str, ...] = ()


class Command(NamedTuple):
    """How to start a server: variables of the environment, program and arguments, what it will be named by, and what
    there is to say about it. Not to be run where a check is REFUSED."""

    env: dict[str, str]
    argv: list[str]
    identity: Identity
    checks: list[Check]

    @property
    def refused(self) -> bool:
        """Whether SGLang would run this wrong, or not at all."""
        return any(check.level == REFUSED for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """As `serve --json` prints it."""
        plain = [check._asdict() for check in self.checks]
        return {"env": self.env, "argv": self.argv, "identity": str(self.identity), "checks": plain}



def command(request: Request) -> Command:
    """The command for a request. Raises CheckpointError where a reference is not here, or does not fit its base."""
    reference, override, kind = request.base, request.override, request.kind
    if not override and base_of_quantized(reference):  # quantized weights alone, given as their base
        reference, override, kind = base_of_quantized(reference), reference, "weights"
    base = base_of(reference, request.revision, request.download)
    overrides = [
        (role, override_of(given, base, role, kind, name, "", request.download))
        for role, given, name in zip(ROLES, (override, request.override_2), (request.weights_name, ""), strict=True)
        if given
    ]
    loras = [lora_of(given, strength, request.download) for given, strength in request.loras]
    if len(loras) > 1:
        raise CheckpointError(
            Text("SGLang starts with one LoRA at most"),
            ", ".join(given for given, _ in request.loras),
            Text("leave all but one away"),
        )
    installed = find(request.sglang)
    identity = Identity(
        base.part,
        tuple((role, one.part) for role, one in overrides),
        tuple((one.part, one.strength) for one in loras),
    )
    found = [
        *checks.of_references(base, overrides, loras),
        *checks.of_layout(base, request.layout, _largest(base, overrides), request.offload, installed),
        *checks.of_machine(overrides, request.layout, installed),
        *checks.of_address(request.host, request.port, request.layout.data),
        *_of_more(request.more),
    ]
    return Command(_env(overrides), _argv(request, base, overrides, loras, identity, installed), identity, found)


def _env(overrides: Sequence[tuple[str, Override]]) -> dict[str, str]:
    cudnn = any(override.part.name == known.CUDNN for _, override in overrides)
    return {"HF_HUB_OFFLINE": "1", **({known.FP4_BACKEND: "flashinfer_cudnn"} if cudnn else {})}


def _argv(
    request: Request,
    base: Base,
    overrides: Sequence[tuple[str, Override]],
    loras: Sequence[LoRA],
    identity: Identity,
    installed: Installed | None,
) -> list[str]:
    layout, name = request.layout, known.model_id(base.part.name, base.pipeline_class)
    argv = [installed.command if installed else COMMAND, "serve", "--model-path", base.folder]
    argv += ["--model-id", name] if name else []
    for role, override in overrides:
        flag = f"--{role.replace('_', '-')}" + ("-path" if override.kind == "component" else "-weights-path")
        argv += [flag, override.path]
    for lora in loras:
        argv += ["--lora-path", lora.path, "--lora-nickname", f"qt-{lora.part.mark}"]
        argv += ["--lora-scale", f"{lora.strength:g}"]
    argv += layout.flags()
    if request.offload != "auto":
        argv += ["--dit-layerwise-offload", "true" if request.offload == "layerwise" else "false"]
    scheduler = request.port + SCHEDULER
    output = str(Path(request.state).absolute()) if known.is_video(base.pipeline_class) else ""
    argv += ["--served-model-name", str(identity), "--host", request.host, "--port", str(request.port)]
    argv += ["--scheduler-port", str(scheduler), "--master-port", str(scheduler + max(layout.data, 1) + 1)]
    argv += ["--strict-ports", "true", "--backend", "sglang", "--input-save-path", "", "--output-path", output]
    return [*argv, *request.more]


def _largest(base: Base, overrides: Sequence[tuple[str, Override]]) -> int:
    """Bytes of all transformers of a pipeline as they are served."""
    total, replaced = 0, {role: override.description.bytes_on_disk for role, override in overrides}
    for role in ROLES:
        folder = Path(base.folder, role)
        own = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
        total += replaced.get(role, own)
    return total


def _of_more(more: Sequence[str]) -> Iterator[Check]:
    """What must not stand behind --. SGLang takes the beginning of a flag for it; and a path of a component that no
    model has, with which it does nothing."""
    for word in more:
        flag = word.partition("=")[0].replace("_", "-")
        own = flag.startswith("--component-") or flag.endswith(("-path", "-quantization")) and flag not in _FREE
        if len(flag) > 2 and flag.startswith("--") and (own or any(name.startswith(flag) for name in PROMISED)):
            yield Check(
                REFUSED,
                Text("{flag} behind -- would undo what the server is named by", flag=flag),
                Text("give it before --, as `serve --help` says"),
            )
