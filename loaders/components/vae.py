"""A request -> the host's VAE, from the `vae` of a diffusers base, a VAE folder, or a native file.

As with transformers, every stored tensor is used or the load fails; and what config.json says of latents must be what
ComfyUI's models do, because there the latent format belongs to the MODEL (comfy/latent_formats.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import host
from ...host.texts import Text, joined
from ..containers.checkpoint import Checkpoint
from ..containers.safetensors import dtype_name
from ..errors import CheckpointError
from ..files.places import Fetch, LocalFolder
from ..files.selection import PIPELINE, select_component
from ..files.source import Source, read_json
from ..locate import locate
from ..model import DTYPES
from ..words import first_ten, size
from .pipeline import locate_parts
from .vaes import VAES, Plan, by_class_name
from .vaes.ltx2_audio import LTX2_AUDIO
from .whole import attempt, find, open_whole

if TYPE_CHECKING:
    import torch

STORED = ("F32", "F16", "BF16")
# What nobody reads: the counter of a batch norm in training, which is often not stored, and layers for a time, of which
# ComfyUI has some in networks that are given none.
UNREAD = (".num_batches_tracked", ".temb_proj.weight", ".temb_proj.bias")
TOLERANCE = 1e-5  # slopes and offsets went through F32 (6e-8) in three operations; published values have 4 to 6 digits
SOUND = "audio_vae"  # of LTX-2's pipelines, which have another VAE as `vae`
UPDATE = Text("update this pack and ComfyUI, or report this")


@dataclass(frozen=True)
class Request:
    """What to load and how; plain values, so that the host can keep it and load again."""

    reference: str
    revision: str = ""
    dtype: str = "default"
    download: bool | Fetch = False


@dataclass(frozen=True)
class Loaded:
    """The host's VAE object (comfy.sd.VAE) and the report for the user."""

    vae: Any
    report: str


def source(request: Request) -> Source:
    """The files of the VAE. Raises CheckpointError when there are none, or a pipeline has no `vae`.

    The reference is a diffusers base (its `vae` is taken), a VAE folder, an index or a single .safetensors file, of a
    VAE or of a whole checkpoint. What ComfyUI has in one with the VAE are companions of it.
    """
    path = find(request.reference, request.revision)  # None: locate_parts downloads it, or says how
    if path is not None and (path.is_file() or _is_vae_folder(path)):
        made = locate(str(path))
        beside = _beside(read_json(made.config)) if made.config else ()
        pipeline = LocalFolder(path.parent)
        return made._replace(companions=tuple(
            pipeline.source(made.reference, select_component(pipeline, name)) for name in beside))
    base, _, name = request.reference.rpartition("/")
    wanted = (name, *LTX2_AUDIO.beside) if name == SOUND else ()
    parts = locate_parts(base if wanted else request.reference, lambda index: wanted or _wanted(index),
                         revision=request.revision, download=request.download,
                         patterns=[f"{part}/*" for part in wanted or ("vae",)]).parts
    first, *companions = parts.values()
    return first._replace(companions=tuple(companions))


def load(request: Request, disable_dynamic: bool = False) -> Loaded:
    """Load a VAE. Raises CheckpointError for anything that is not certain to be right.

    `disable_dynamic` is there for the host, which passes it to every factory; its own VAE loader ignores it as well.
    """
    checkpoint = Checkpoint(source(request))
    where = checkpoint.source.folder
    if not checkpoint.headers:
        raise CheckpointError(Text("there is no .safetensors file of the VAE"), where,
                              Text("finish the download of this folder"))
    if checkpoint.config is None:
        there = open_whole(checkpoint)
        stored = there.parts.vae if there else checkpoint.load_tensors()
        if not stored:
            raise CheckpointError(Text("there is no VAE in this checkpoint"), checkpoint.source.files[0],
                                  Text("use the VAE from a file of its own, or from a base folder"))
        vae, head = _native_file(checkpoint, _plain(stored, where), request)
        if there:
            head[0] = Text("{vae}, of a whole checkpoint of {model}", vae=head[0], model=there.parts.model)
    else:
        stored = checkpoint.load_tensors()
        vae, head = _component(checkpoint, checkpoint.config, _plain(stored, where), request)
        head += [Text("with: {parts}", parts=Path(one.folder).name) for one in checkpoint.source.companions]
    vae.patcher.cached_patcher_init = (rebuild, (request,))
    return Loaded(vae, _report(head, checkpoint, stored, vae))


def rebuild(request: Request, disable_dynamic: bool = False) -> Any:
    """Load `request` again and return the patcher; the factory behind `cached_patcher_init`."""
    return load(request, disable_dynamic).vae.patcher


def _is_vae_folder(folder: Path) -> bool:
    """Whether a folder is a VAE component itself: a config.json of an Autoencoder class, and no pipeline around it."""
    config = folder / "config.json"
    return config.is_file() and not (folder / PIPELINE).is_file() \
        and "Autoencoder" in str(read_json(str(config)).get("_class_name"))


def _beside(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The components that ComfyUI has in one with the VAE of a config.json."""
    known = by_class_name(config.get("_class_name"))
    return known.beside if known else ()


def _wanted(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The name of the VAE component. Raises CheckpointError for a pipeline that has none."""
    if not any(index.get("vae") or ()):
        raise CheckpointError(Text("this pipeline ({name}) has no vae", name=index.get("_class_name", Text("unnamed"))),
                              "", Text("give a base with one, or the folder of a VAE"))
    return ("vae",)


def _plain(tensors: dict[str, torch.Tensor], where: object) -> dict[str, torch.Tensor]:
    """The tensors in dtypes that the host's VAEs have: FP8 numbers mean themselves, which BF16 holds exactly.

    Raises CheckpointError for other dtypes.
    """
    import torch

    casts = (torch.float8_e4m3fn, torch.float8_e5m2)
    other = sorted(name for name, tensor in tensors.items() if not name.endswith(UNREAD)
                   and dtype_name(tensor.dtype) not in STORED and tensor.dtype not in casts)
    if other:
        raise CheckpointError(Text("stored as {dtype}, which ComfyUI's VAEs do not read: {names}",
                                   dtype=dtype_name(tensors[other[0]].dtype), names=first_ten(other)),
                              where, Text("take the VAE in F32, F16 or BF16"))
    return {name: tensor.to(torch.bfloat16) if tensor.dtype in casts else tensor for name, tensor in tensors.items()}


def _component(checkpoint: Checkpoint, config: dict[str, Any], stored: dict[str, torch.Tensor],
               request: Request) -> tuple[Any, list[str]]:
    """The VAE that config.json describes, and what to say of it."""
    where = checkpoint.source.config
    known = by_class_name(config.get("_class_name"))
    if known is None:
        raise CheckpointError(Text("config.json is of {name}, no VAE that this version loads",
                                   name=config.get("_class_name") or Text("no named class")), where,
                              Text("supported: {names}", names=", ".join(vae.class_name for vae in VAES)))
    try:
        plan = known.plan(config)
    except ValueError as error:
        raise CheckpointError(error, where, Text("use a VAE of the published kind")) from error
    _check_latents(plan, where)
    tensors = _native(plan, stored, checkpoint.source.folder)
    dtype = DTYPES[request.dtype]
    vae = host.load_vae(tensors, dtype, plan.metadata, plan.marks) if plan.inferred else \
        host.load_vae_sized(tensors, plan.kind, plan.sizes, plan.published, dtype, plan.marks)
    _check_taken(vae, tensors, checkpoint.source.folder)
    plan.finish(vae)
    return vae, [Text("VAE of {family} · {class_name}", family=plan.family, class_name=known.class_name),
                 Text("sizes: {summary}", summary=plan.summary),
                 Text("latent format: {name}", name=plan.latent_format),
                 *(Text("note: {note}", note=note) for note in plan.notes)]


def _native_file(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor],
                 request: Request) -> tuple[Any, list[str]]:
    """Tensors without config.json, as ComfyUI itself would load them; but every one must be used."""
    where = checkpoint.source.files[0]
    vae = attempt(lambda: host.load_vae(dict(tensors), DTYPES[request.dtype], checkpoint.metadata or None),
                  Text("load this as a VAE"), where, Text("give the folder with its config.json, or another file"))
    if vae.first_stage_model is None:
        raise CheckpointError(Text("ComfyUI does not recognise this file as a VAE"), where,
                              Text("give the folder with its config.json, or a native VAE file"))
    if "decoder.up_blocks.0.resnets.0.norm1.weight" in tensors:
        tensors = host.diffusers_vae_names(tensors)
    renamed = {"decoder.post_quant_conv.": "post_quant_conv.", "encoder.quant_conv.": "quant_conv."}
    for old, new in renamed.items():  # what the constructor renames, too
        tensors = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}
    _check_taken(vae, tensors, where)
    return vae, [Text("native VAE · {kind}", kind=type(vae.first_stage_model).__name__)]


def _check_latents(plan: Plan, where: object) -> None:
    """Raise CheckpointError unless config.json and ComfyUI's latent format scale and shift latents alike."""
    if plan.latents is None:
        return
    for word, said, done in zip((Text("scale"), Text("shift")), plan.latents,
                                host.latent_map(plan.latent_format, plan.channels), strict=True):
        said = said * (plan.channels if len(said) == 1 else 1)
        wrong = [i for i, (a, b) in enumerate(zip(said, done, strict=True))
                 if not math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)]
        if wrong:
            i = wrong[0]
            raise CheckpointError(
                Text("this VAE does not belong to {family}: by config.json a latent's {scale_or_shift} is {said:.6g} "
                     "in channel {channel}, in ComfyUI's latent format {format} it is {done:.6g}; pictures would be "
                     "wrong", family=plan.family, scale_or_shift=word, said=said[i], channel=i,
                     format=plan.latent_format, done=done[i]),
                where, Text("use the VAE that was published with the model"))


def _native(plan: Plan, stored: dict[str, torch.Tensor], where: object) -> dict[str, torch.Tensor]:
    """The stored tensors under native names. Raises CheckpointError for missing, unknown and misshapen ones."""
    native, made = plan.native(stored), plan.made()
    expected = plan.apart(host.vae_tensors(plan.kind, plan.sizes))
    again = Text("download the VAE again, with its config.json")
    if len(native) != len(stored):
        raise CheckpointError(Text("two stored tensors have one name in ComfyUI"), where, again)
    names = dict(zip(native, stored, strict=True))
    unused = [names[name] for name in native if name not in expected]
    missing = [name for name in expected if name not in native and name not in made and not name.endswith(UNREAD)]
    if unused or missing:
        raise CheckpointError(Text("the tensors are not those of config.json: missing {missing} (ComfyUI's names); "
                                   "unused {unused}", missing=first_ten(missing) or "-",
                                   unused=first_ten(unused) or "-"), where, again)
    wrong = [Text("{name} {shape}, expected {expected}", name=names[name], shape=list(tensor.shape),
                  expected=list(expected[name].shape))
             for name, tensor in native.items() if tensor.shape != expected[name].shape]
    if wrong:
        raise CheckpointError(Text("tensors of another shape than config.json says: {wrong}", wrong=first_ten(wrong)),
                              where, again)
    return plan.join(native) | made


def _check_taken(vae: Any, tensors: dict[str, torch.Tensor], where: object) -> None:
    """The host only logs missing and unexpected tensors; here they are errors."""
    if vae.first_stage_model is None:
        raise CheckpointError(Text("ComfyUI did not recognise the converted VAE"), where, UPDATE)
    there = {name for name in vae.first_stage_model.state_dict() if not name.endswith(UNREAD)}
    given = {name for name in tensors if not name.endswith(UNREAD)}
    if there != given:
        raise CheckpointError(Text("ComfyUI {version} has other tensors in this VAE: missing {missing}; unused "
                                   "{unused}", version=host.version(), missing=first_ten(sorted(there - given)) or "-",
                                   unused=first_ten(sorted(given - there)) or "-"), where, UPDATE)


def _report(head: list[str], checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], vae: Any) -> str:
    """What the node says: the VAE, its files, and how ComfyUI runs it."""
    names = checkpoint.source.files
    files = names[0].replace("\\", "/").rpartition("/")[2] if len(names) == 1 else \
        Text("{count} shards", count=len(names))
    stored = sorted({dtype_name(tensor.dtype) for name, tensor in tensors.items() if not name.endswith(UNREAD)})
    frames = vae.temporal_compression_decode() or 1
    sound = getattr(vae.first_stage_model, "output_sample_rate", None)
    latents = Text("latents: {channels} channels; sound of {rate} Hz", channels=vae.latent_channels, rate=sound) \
        if sound else Text("latents: {channels} channels, 1/{factor} of width and height", channels=vae.latent_channels,
                           factor=vae.spacial_compression_decode())
    if frames > 1:
        latents = Text("{latents}, 1/{frames} of the frames", latents=latents, frames=frames)
    dtype = str(vae.vae_dtype).removeprefix("torch.")
    bytes_of = size(sum(tensor.nbytes for tensor in tensors.values()))
    lines: list[str] = [
        head[0], Text("source: {reference}", reference=checkpoint.source.reference),
        Text("files: {files}, {size}, stored as {dtypes}", files=files, size=bytes_of, dtypes=", ".join(stored)),
        *head[1:], latents, Text("runs in {dtype}", dtype=dtype)]
    if vae.vae_dtype not in vae.working_dtypes:
        lines.append(Text("note: ComfyUI would not choose {dtype} for this VAE; values may overflow or lose precision",
                          dtype=dtype))
    return joined("\n", lines)
