"""Text encoders and tokenizers of the host's CLIP."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .check import needs, version
from .errors import CheckpointError
from .texts import Text

if TYPE_CHECKING:
    import torch


@needs("text encoders")
def load_text_encoders(state_dicts: list[dict[str, torch.Tensor]], clip_type: str, configs: dict[str, dict[str, Any]],
                       dtype: torch.dtype | None = None, disable_dynamic: bool = False, operations: Any = None) -> Any:
    """Text encoders in the host's names -> its CLIP.

    `clip_type` is a member of its CLIPType; `configs` are entries of its model configs, by its name of the encoder.
    `operations`: the classes of the encoders' layers (None: the usual).
    Raises RuntimeError (torch) for tensors of other shapes than the configs say, CheckpointError for two CLIP encoders
    that differ from its own in different ways.
    """
    import comfy.sd
    import folder_paths

    kind = getattr(comfy.sd.CLIPType, clip_type, None)
    if kind is None:
        raise CheckpointError(Text("ComfyUI {version} has no text encoders of this kind ({kind})", version=version(),
                                   kind=clip_type.lower()), "", Text("update ComfyUI"))
    options: dict[str, Any] = {f"{name}_model_config": dict(config) for name, config in configs.items()}
    clips = [configs[name] for name in ("clip_l", "clip_g") if name in configs]
    if clips:  # where it measures CLIP's positions (long_clipl.py) it puts this one in the place of both
        if clips[0] != clips[-1]:
            raise CheckpointError(Text("ComfyUI sets both CLIP text encoders at once, and these two need {first} and "
                                       "{second}", first=clips[0] or Text("nothing"),
                                       second=clips[-1] or Text("nothing")), "config.json",
                                  Text("use the base's own text encoders"))
        options["model_config"] = dict(clips[0])
    if dtype is not None:
        options["dtype"] = dtype
    if operations is not None:
        options["custom_operations"] = operations
    return comfy.sd.load_text_encoder_state_dicts(
        state_dicts, embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=kind, model_options=options, disable_dynamic=disable_dynamic)


@needs("quantized text encoders")
def text_operations() -> Any:
    """The mixed-precision operations that the host takes for quantized text encoders, computing in F32, as it does."""
    import comfy.ops
    import torch

    return comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32, full_precision_mm=True)


@needs("text encoders")
def take_away(clip: Any, name: str, module: str, error: Callable[[], Exception]) -> None:
    """Put something in the place of a module of the encoder `name` that raises `error()` when it runs."""
    import torch

    class Nothing(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise error()

    setattr(getattr(clip.cond_stage_model, name).transformer, module, Nothing())


@needs("text encoders")
def read_normed(clip: Any, name: str) -> None:
    """Let the encoder `name` of a CLIP give its last hidden state behind the final norm, unless it is asked for
    another."""
    model = getattr(clip.cond_stage_model, name)
    model.layer, model.layer_idx = "last", None
    model.options_default = (model.layer, model.layer_idx, model.return_projected_pooled)


def _network(clip: Any, name: str) -> tuple[Any, str]:
    """The network `name` of a CLIP, and what its tensors' names begin with: nothing, or its own name, where it is no
    encoder but what comes behind one."""
    model = getattr(clip.cond_stage_model, name)
    return (model.transformer, "") if hasattr(model, "transformer") else (model, f"{name}.")


@needs("text encoders")
def text_encoder_shapes(clip: Any, name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the encoder `name` of a CLIP is made of.

    Shapes are those of the modules' sizes: a host with lazy weights takes a tensor of any shape.
    """
    model, below = _network(clip, name)
    shapes = {below + key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for module_name, module in model.named_modules():
        if f"{module_name}.weight" in shapes and hasattr(module, "out_features"):
            shapes[f"{module_name}.weight"] = (module.out_features, module.in_features)
        if f"{module_name}.weight" in shapes and hasattr(module, "num_embeddings"):
            shapes[f"{module_name}.weight"] = (module.num_embeddings, module.embedding_dim)
    return shapes


@needs("quantized text encoders")
def has_quantized_layers(clip: Any, name: str) -> bool:
    """Whether the encoder `name` of a CLIP has quantized weights: a host that passes over the operations it is given
    would take codes for numbers."""
    from comfy_kitchen.tensor import QuantizedTensor

    network, _ = _network(clip, name)
    return any(isinstance(parameter, QuantizedTensor) for parameter in network.parameters())


@needs("text encoders")
def text_encoder_dtype(clip: Any, name: str) -> str:
    """The dtype in which the encoder `name` of a CLIP is kept (it computes in F32), as "bfloat16"."""
    network, _ = _network(clip, name)
    dtype = network.dtype if hasattr(network, "dtype") else next(network.parameters()).dtype
    return str(dtype).removeprefix("torch.")


def is_instance_of(value: Any, class_name: str) -> bool:
    """Whether the class of a host's object, or one of its base classes, has this name."""
    return any(cls.__name__ == class_name for cls in type(value).__mro__)


@needs("text encoders")
def tokenizer_of(clip: Any, name: str) -> Any:
    """The host's tokenizer (an SDTokenizer) of the encoder `name` of a CLIP; byT5's is named without its size."""
    tokenizer = clip.tokenizer
    names = (name, f"clip_{name}", name.rpartition("_")[0])
    return getattr(tokenizer, next((one for one in names if hasattr(tokenizer, one)), name))


def follow_tokenizer_json(tokenizer: Any, path: str, probe: str) -> bool:
    """Let one of the host's tokenizers split text as tokenizer.json at `path` says; whether it did not, on `probe`.

    transformers 5 builds what is called LlamaTokenizerFast in its own way, whatever tokenizer.json says; this host asks
    for that class. Only this tokenizer is changed, and only when the two disagree.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    stated = Tokenizer.from_file(path)
    if tokenizer.tokenizer(probe)["input_ids"] == stated.encode(probe).ids:
        return False
    tokenizer.tokenizer = PreTrainedTokenizerFast(tokenizer_object=stated)
    return True


@needs("text encoders")
def pad_with(tokenizer: Any, token: str) -> bool:
    """Let one of the host's tokenizers pad with a token of its vocabulary (no other changes it); whether it did not."""
    number = tokenizer.tokenizer.get_vocab().get(token, tokenizer.pad_token)
    changed = number != tokenizer.pad_token
    tokenizer.pad_token = number
    return changed


def bundled_tokenizer(*path: str) -> str:
    """A file of a tokenizer that the host brings along, below its `comfy` folder."""
    import comfy.sd1_clip

    return os.path.join(os.path.dirname(inspect.getfile(comfy.sd1_clip)), *path)


def _hands_over(slot: Any) -> bool:
    """Whether a tokenizer slot of the host gives back the very object it is handed, and so calls it with text (since
    0.32), instead of building one of transformers' around it."""
    probe = object()
    try:
        return slot.from_pretrained("", tokenizer_object=probe) is probe
    except Exception:  # whatever transformers raises for an object that is no tokenizer
        return False


@needs("mT5's tokenizer")
@contextmanager
def mt5_handed_on() -> Iterator[None]:
    """While a CLIP is made, hand the `spiece_model` among an encoder's tensors to Hunyuan-DiT's tokenizer.

    The host looks for it where it loads whole checkpoints only (its hydit.py; sd.py hands on other models' by name),
    and cannot make this tokenizer without: its own CLIP loaders fail. What it asks of every encoder's tensors, how long
    CLIP is, is exchanged for as long as this CLIP is made.
    """
    import comfy.text_encoders.long_clipl as asked

    theirs = asked.model_options_long_clip

    def with_tokenizer(tensors: Any, tokenizer_data: dict[str, Any], options: dict[str, Any]) -> Any:
        if "spiece_model" in tensors:
            tokenizer_data = {**tokenizer_data, "mt5xl.spiece_model": tensors["spiece_model"]}
        return theirs(tensors, tokenizer_data, options)

    asked.model_options_long_clip = with_tokenizer
    try:
        yield
    finally:
        asked.model_options_long_clip = theirs


@needs("FLUX.2's tokenizer")
@contextmanager
def tekken_read_by(read: Callable[[dict[str, Any]], str | None]) -> Iterator[None]:
    """While a CLIP is made, let `read` turn its `tekken_model` (parsed tekken.json) into the text of a tokenizer.json.

    The host makes this tokenizer inside its CLIP, by transformers' MistralConverter with the arguments of transformers
    4: newer ones refuse them (TypeError), and those of 4 pass over the pattern in the file. From 0.32 on it reads the
    file itself, by one fixed pattern. There is no other way in, so its function is exchanged for as long as this CLIP
    is made; where `read` returns None the host's own is asked.
    """
    import json

    import comfy.text_encoders.flux as flux
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    theirs = flux.load_mistral_tokenizer

    def load_mistral_tokenizer(data: Any) -> dict[str, Any]:
        text = read(json.loads(data.numpy().tobytes() if torch.is_tensor(data) else data)) if data is not None else None
        if text is None:
            return theirs(data)
        made: Any = Tokenizer.from_str(text)
        if _hands_over(flux.MistralTokenizerClass):
            made = PreTrainedTokenizerFast(tokenizer_object=made)
        return {"tokenizer_object": made, "legacy": False}

    flux.load_mistral_tokenizer = load_mistral_tokenizer
    try:
        yield
    finally:
        flux.load_mistral_tokenizer = theirs
