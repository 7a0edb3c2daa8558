"""What a server would run wrong, or not at all, told before it starts: SGLang takes most of it without a word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ...host.texts import Text
from . import known
from .installed import Installed
from .layout import Layout
from .references import NVFP4, Base, LoRA, Override, lacks_scales

REFUSED, WARNING, NOTE = "refused", "warning", "note"
# Families of quantized weights that SGLang loads as an override, and those of them that a card must have units for.
SVDQ = ("svdquant-int4", "svdquant-nvfp4")
SUPPORTED = frozenset({"none", "fp8", "modelopt-fp8", "comfy", *NVFP4, *SVDQ})
LOCAL = ("127.0.0.1", "localhost", "::1")
EVERY = ("0.0.0.0", "::")


class Check(NamedTuple):
    """`level` is REFUSED, WARNING or NOTE; `do` may be empty for a note."""

    level: str
    what: str
    do: str = ""


def of_references(base: Base, overrides: Sequence[tuple[str, Override]], loras: Sequence[LoRA]) -> Iterator[Check]:
    """What the files say."""
    for role, override in overrides:
        pair = (base.part.name, override.part.name)
        if known.is_validated(*pair) and role == "transformer":
            yield Check(
                NOTE, Text("validated by SGLang's makers: {override} on {base}", override=pair[1], base=pair[0])
            )
        else:
            yield Check(
                NOTE, Text("not validated by SGLang's makers: {override} on {base}", override=pair[1], base=pair[0])
            )
        description = override.description
        if description.family not in SUPPORTED:
            yield Check(
                REFUSED,
                Text(
                    "SGLang {version} does not load {family} weights",
                    version=known.VERSION,
                    family=description.family,
                ),
                Text("load {reference} in ComfyUI, with this pack", reference=override.part.name),
            )
        if override.kind == "weights" and lacks_scales(description):
            yield Check(
                REFUSED,
                Text(
                    "{count} layers of {name} have no activation scale, and SGLang takes 1.0 for it, which "
                    "makes white pictures",
                    count=description.dynamic_activations,
                    name=Path(override.path).name,
                ),
                Text("take the file without '-mixed' in its name, or load this one in ComfyUI"),
            )
        for problem in description.notes:
            yield Check(NOTE, problem)
    if word := known.diffusers_word(base.folder):
        yield Check(
            REFUSED,
            Text("SGLang gives every folder with {word} in its path to diffusers, overrides unseen", word=word),
            Text("link or move the folder to a path without it"),
        )
    if loras and any(override.description.family != "none" for _, override in overrides):
        yield Check(
            NOTE, Text("on quantized layers SGLang applies a LoRA beside the weight: merging is refused there")
        )
    if not known.model_id(base.part.name, base.pipeline_class):
        yield Check(
            WARNING,
            Text(
                "SGLang {version} has no settings for {base} by name, and goes by its class {kind}",
                version=known.VERSION,
                base=base.part.name,
                kind=base.pipeline_class or Text("none"),
            ),
            Text("give the name of a model that it knows behind --: --model-id NAME"),
        )


def of_layout(
    base: Base, layout: Layout, weights: int, offload: str, installed: Installed | None
) -> Iterator[Check]:
    """What the GPUs say. `weights`: bytes of the transformers that one GPU has whole, unless they are split."""
    if problem := layout.problem():
        yield Check(REFUSED, problem, Text("give degrees whose product is the number of GPUs"))
        return
    distilled = base.pipeline_class in known.DISTILLED
    if layout.cfg > 1 and distilled:
        yield Check(
            REFUSED,
            Text("--cfg-parallel splits two evaluations a step, and {kind} has one", kind=base.pipeline_class),
            Text("leave it away: all GPUs then share the sequence"),
        )
    elif layout.cfg > 1:
        yield Check(
            WARNING,
            Text("at CFG 1, as with distilled LoRAs, half of the GPUs compute for nothing"),
            Text("use --ulysses {gpus} there", gpus=layout.gpus),
        )
    cards = installed.gpus if installed else ()
    least = min((card.bytes for card in cards), default=0)
    whole = offload == "none" or offload == "auto" and layout.sequence_parallel(not distilled)
    if least and weights > least and layout.tensor < 2 and whole:
        yield Check(
            WARNING,
            Text(
                "the transformer takes {weights:.1f} GB on each GPU, and one has {memory:.1f} GB",
                weights=weights / 1e9,
                memory=least / 1e9,
            ),
            Text("use --offload layerwise, or --tp"),
        )


def of_version(installed: Installed) -> Iterator[Check]:
    """Whether it is the SGLang that this pack was tried with."""
    if not installed.sglang:
        yield Check(
            REFUSED,
            Text("{command} belongs to a Python without SGLang", command=installed.command),
            Text("pip install 'sglang[diffusion]=={version}' in an environment of its own", version=known.VERSION),
        )
    elif installed.sglang != known.VERSION:
        yield Check(
            WARNING,
            Text(
                "this is SGLang {found}; this pack was tried with {version}",
                found=installed.sglang,
                version=known.VERSION,
            ),
            Text("install that version, or look at the first pictures"),
        )


def of_machine(
    overrides: Sequence[tuple[str, Override]], layout: Layout, installed: Installed | None
) -> Iterator[Check]:
    """What the installation says."""
    if installed is None:
        yield Check(
            NOTE,
            Text("there is no sglang on this machine, so its cards and versions were not looked at"),
            Text("pip install 'sglang[diffusion]=={version}' in an environment of its own", version=known.VERSION),
        )
        return
    yield from of_version(installed)
    families = {override.description.family for _, override in overrides}
    if not installed.gpus:
        if families - {"none"} and not installed.npu:
            yield Check(
                REFUSED,
                Text("SGLang's kernels for quantized weights need a GPU, and its Python sees none"),
                Text("load them in ComfyUI, with this pack"),
            )
        return
    if len(installed.gpus) < layout.gpus:
        yield Check(
            REFUSED,
            Text("--gpus is {wanted}, and its Python sees {found}", wanted=layout.gpus, found=len(installed.gpus)),
            Text("give fewer, or look at CUDA_VISIBLE_DEVICES"),
        )
    oldest = min(card.capability for card in installed.gpus)
    sm = ".".join(map(str, oldest))
    if families & set(NVFP4) and oldest < (10, 0):
        yield Check(
            REFUSED,
            Text("SGLang multiplies NVFP4 on SM 10.0 or newer, and this is {sm}", sm=sm),
            Text("load it in ComfyUI, with this pack"),
        )
    if families & set(SVDQ) and (oldest[0] not in (8, 12)):
        yield Check(
            REFUSED,
            Text("nunchaku's kernels are for SM 8.x and 12.x, and this is {sm}", sm=sm),
            Text("load it in ComfyUI, with this pack"),
        )
    if families & set(SVDQ) and not installed.engine:
        yield Check(
            REFUSED,
            Text("the package named nunchaku there is another one, a statistics library")
            if installed.nunchaku
            else Text("the package nunchaku is not installed there"),
            Text("install the SVDQuant engine: https://github.com/nunchaku-ai/nunchaku/releases"),
        )


def of_address(host: str, port: int, data: int) -> Iterator[Check]:
    """What an address would open. There is no authentication."""
    if host not in (*LOCAL, *EVERY):
        yield Check(
            REFUSED,
            Text(
                "--host {host} also opens the socket of SGLang's scheduler there, which runs any code that it is "
                "sent",
                host=host,
            ),
            Text("give 127.0.0.1, or 0.0.0.0 behind a proxy that asks who calls"),
        )
    elif host in EVERY:
        yield Check(
            WARNING,
            Text("anybody who reaches this machine can use the server: it asks for no password"),
            Text("put a proxy that does in front of it"),
        )
    if not 0 < port < 65536 - 200 - data:
        yield Check(
            REFUSED,
            Text("--port {port} leaves no room for the scheduler's ports above it", port=port),
            Text("give one below {highest}", highest=65536 - 200 - data),
        )
