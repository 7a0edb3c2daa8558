"""A CLIP against diffusers' own pipeline on the same folder: token ids, hidden states, pooled outputs. Both compute in F32."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import torch

from support.common import rel_l2

HARD = "Two cats,  1234 snowflakes; naïve été\n\nﬁne ½ “quotes” 日本 it's"
PROMPTS = ("a red cat, running over the old river", "")
# measured: 1e-8 .. 1e-6, and up to 5e-6 for T5, whose attention is not scaled and so sharp with random weights
FORWARD = 2e-5


def ids(tokens: dict, name: str) -> list[int]:
    (batch,) = tokens[name]
    return [pair[0] for pair in batch]


def ids_by_tokenizer_json(folder: Path, text: str) -> list[int]:
    """What the folder's tokenizer.json says, by the library that it is made for, without transformers."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def encode(clip, prompt: str) -> tuple[torch.Tensor, dict]:
    ((states, rest),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return states, rest


def diffusers_pipeline(folder: Path):
    """The pipeline with nothing but its text encoders, in F32, by transformers' and diffusers' own loaders."""
    import diffusers
    import transformers

    index = json.loads((folder / "model_index.json").read_text())
    kind = getattr(diffusers, index.pop("_class_name"))
    parts = {}
    for name, (_, cls) in index.items():
        if cls is None:
            parts[name] = None
            continue
        part = getattr(transformers, cls).from_pretrained(folder / name)
        parts[name] = part.float() if "encoder" in name else part
    asked = inspect.signature(kind.__init__).parameters.values()
    absent = {one.name: None for one in asked if one.default is one.empty and one.name not in ("self", *parts)}
    if "safety_checker" in inspect.signature(kind.__init__).parameters and "Cosmos" in kind.__name__:
        absent["safety_checker"] = torch.nn.Identity()  # a package of its own
    return kind(**parts, **absent)


def assert_flux(clip, folder: Path, within: float = FORWARD, prompts=PROMPTS) -> None:
    pipeline = diffusers_pipeline(folder)
    stated = ids_by_tokenizer_json(folder / "tokenizer_2", HARD)
    assert ids(clip.tokenize(HARD), "t5xxl")[:len(stated)] == stated
    for prompt in prompts:
        tokens = clip.tokenize(prompt)
        options = {"padding": "max_length", "truncation": True}
        assert ids(tokens, "l") == pipeline.tokenizer(prompt, max_length=77, **options).input_ids
        assert ids(tokens, "t5xxl") == pipeline.tokenizer_2(prompt, max_length=512, **options).input_ids
        with torch.inference_mode():
            expected, pooled, _ = pipeline.encode_prompt(prompt, None, device="cpu", max_sequence_length=512)
        states, rest = encode(clip, prompt)
        assert states.shape == expected.shape and rel_l2(states, expected) < within
        assert rel_l2(rest["pooled_output"], pooled) < FORWARD


def assert_wan(clip, folder: Path, within: float = FORWARD, prompts=PROMPTS, length: int = 512) -> None:
    pipeline = diffusers_pipeline(folder)
    for prompt in prompts:
        expected_ids = pipeline.tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
        assert ids(clip.tokenize(prompt), "umt5xxl") == expected_ids
        with torch.inference_mode():
            expected = pipeline._get_t5_prompt_embeds(prompt, max_sequence_length=length, device="cpu")
        states, _ = encode(clip, prompt)
        assert states.shape == expected.shape == (1, length, expected.shape[-1]) and rel_l2(states, expected) < within
        assert torch.equal(states == 0, expected == 0)


def assert_hunyuan_video(clip, folder: Path, within: float = FORWARD, prompts=PROMPTS, language=None) -> None:
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video as module

    pipeline = diffusers_pipeline(folder)
    if language is not None:  # I2V: the text half alone, whose states the pipeline takes
        pipeline.text_encoder = language(pipeline.text_encoder)
    template = module.DEFAULT_PROMPT_TEMPLATE["template"]
    assert ids(clip.tokenize(HARD), "llama") == ids_by_tokenizer_json(folder / "tokenizer", template.format(HARD))
    for prompt in prompts:
        tokens = clip.tokenize(prompt)
        assert ids(tokens, "llama") == pipeline.tokenizer(template.format(prompt)).input_ids
        assert ids(tokens, "l") == pipeline.tokenizer_2(prompt, padding="max_length", max_length=77,
                                                        truncation=True).input_ids
        with torch.inference_mode():
            expected, pooled, mask = pipeline.encode_prompt(prompt, device="cpu")
        states, rest = encode(clip, prompt)
        expected = expected[:, :int(mask.sum())]  # the host does not pad
        assert states.shape == expected.shape and rel_l2(states, expected) < within
        assert rel_l2(rest["pooled_output"], pooled) < FORWARD


def assert_sdxl(clip, folder: Path, within: float = FORWARD, prompts=PROMPTS) -> None:
    pipeline = diffusers_pipeline(folder)
    for prompt in prompts:
        tokens = clip.tokenize(prompt)
        for name, tokenizer in (("l", pipeline.tokenizer), ("g", pipeline.tokenizer_2)):
            assert ids(tokens, name) == tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        with torch.inference_mode():
            expected, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        states, rest = encode(clip, prompt)
        assert states.shape == expected.shape and rel_l2(states, expected) < within
        assert rel_l2(rest["pooled_output"], pooled) < FORWARD


def assert_lumina2(clip, folder: Path, within: float = FORWARD, prompts=PROMPTS) -> None:
    """Of the text as it is: the pipeline's system prompt is the host's node's business."""
    pipeline = diffusers_pipeline(folder)
    for prompt in prompts:
        expected_ids = pipeline.tokenizer(prompt, padding="max_length", max_length=64).input_ids
        given = ids(clip.tokenize(prompt), "gemma2_2b")
        assert given == [number for number in expected_ids if number != pipeline.tokenizer.pad_token_id]
        with torch.inference_mode():
            expected, mask = pipeline._get_gemma_prompt_embeds(prompt, torch.device("cpu"), 64)
        states, _ = encode(clip, prompt)
        expected = expected[mask.bool()][None]
        assert states.shape == expected.shape and rel_l2(states, expected) < within


def assert_sd15(clip, folder: Path, within: float = FORWARD, prompts=PROMPTS) -> None:
    pipeline = diffusers_pipeline(folder)
    for prompt in prompts:
        expected_ids = pipeline.tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        assert ids(clip.tokenize(prompt), "l") == expected_ids
        with torch.inference_mode():
            expected, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
        states, _ = encode(clip, prompt)
        assert states.shape == expected.shape and rel_l2(states, expected) < within


def assert_sd3(clip, folder: Path, within: float = FORWARD, prompts=PROMPTS) -> None:
    """Of a base without T5 the first 77 states: diffusers has zeros behind them, the host nothing."""
    pipeline = diffusers_pipeline(folder)
    if pipeline.text_encoder_3 is None:  # diffusers asks the transformer how wide they are
        pipeline._get_t5_prompt_embeds = lambda **kwargs: torch.zeros(1, 256, 4096)
    for prompt in prompts:
        tokens = clip.tokenize(prompt)
        for name, tokenizer, length in (("l", pipeline.tokenizer, 77), ("g", pipeline.tokenizer_2, 77),
                                        ("t5xxl", pipeline.tokenizer_3, 256)):
            if tokenizer is not None:
                given = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
                assert ids(tokens, name) == given
        with torch.inference_mode():
            expected, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, device="cpu", do_classifier_free_guidance=False)
        states, rest = encode(clip, prompt)
        assert states.shape[1] == (77 if pipeline.text_encoder_3 is None else expected.shape[1])
        expected = expected[:, :states.shape[1]]
        assert states.shape == expected.shape and rel_l2(states, expected) < within
        assert rel_l2(states[:, :77], expected[:, :77]) < within and rel_l2(rest["pooled_output"], pooled) < FORWARD


def assert_hidream(clip, folder: Path, within: float = FORWARD, prompts=PROMPTS) -> None:
    pipeline = diffusers_pipeline(folder)
    for prompt in prompts:
        with torch.inference_mode():
            t5, _, llama, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        states, rest = encode(clip, prompt)
        given = pipeline.tokenizer_4(prompt, padding="max_length", max_length=128).input_ids
        assert ids(clip.tokenize(prompt), "llama") == given
        assert rel_l2(states, t5) < within and rel_l2(rest["pooled_output"], pooled) < FORWARD
        assert rel_l2(rest["conditioning_llama3"], llama.movedim(0, 1)) < FORWARD


def assert_hunyuan_dit(clip, folder: Path, within: float = FORWARD, prompts=PROMPTS) -> None:
    pipeline = diffusers_pipeline(folder)
    chinese = f"{HARD} 一只红色的猫，跑过古老的河"
    expected_ids = pipeline.tokenizer(chinese).input_ids
    assert ids(clip.tokenize(chinese), "hydit_clip")[:len(expected_ids)] == expected_ids
    for prompt in prompts:
        states, rest = encode(clip, prompt)
        parts = (("hydit_clip", 77, states, rest["attention_mask"]),
                 ("mt5xl", 256, rest["conditioning_mt5xl"], rest["attention_mask_mt5xl"]))
        for index, (name, length, given, seen) in enumerate(parts):
            tokenizer = (pipeline.tokenizer, pipeline.tokenizer_2)[index]
            expected_ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
            assert ids(clip.tokenize(prompt), name) == expected_ids
            with torch.inference_mode():
                expected, _, mask, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False,
                                                              text_encoder_index=index)
            assert given.shape == expected.shape and rel_l2(given, expected) < within and torch.equal(seen, mask)


def assert_t5(clip, folder: Path, within: float = FORWARD, prompts=PROMPTS) -> None:
    """The pipelines with T5 alone; those of them that pad a prompt in the host pad it to the same length."""
    pipeline = diffusers_pipeline(folder)
    length, padded = T5_LENGTHS[type(pipeline).__name__]
    (name,) = clip.tokenize("")
    for prompt in prompts:
        inputs = pipeline.tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt")
        count = length if padded else int(inputs.attention_mask.sum())
        assert ids(clip.tokenize(prompt), name) == inputs.input_ids[0, :count].tolist()
        with torch.inference_mode():
            if type(pipeline).__name__ == "LTXPipeline":  # diffusers' encoder sees its padding, LTX-Video's own does not
                expected = pipeline.text_encoder(**inputs)[0]
            elif hasattr(pipeline, "_get_t5_prompt_embeds"):
                expected = pipeline._get_t5_prompt_embeds(prompt, max_sequence_length=length, device="cpu")
            else:
                expected = pipeline.encode_prompt(prompt, False, device="cpu")
        expected = (expected[0] if isinstance(expected, tuple) else expected)[:, :count]
        states, rest = encode(clip, prompt)
        assert states.shape == expected.shape and rel_l2(states, expected) < within
        if "attention_mask" in rest:
            assert torch.equal(rest["attention_mask"], inputs.attention_mask)


# pipeline -> the tokens of a prompt, and whether the host pads to them
T5_LENGTHS = {"ChromaPipeline": (512, False), "PixArtSigmaPipeline": (300, False), "LTXPipeline": (128, True),
              "MochiPipeline": (256, True), "CogVideoXPipeline": (226, True), "Cosmos2TextToImagePipeline": (512, True),
              "AuraFlowPipeline": (256, True)}
CHECKS = {"flux1": assert_flux, "wan": assert_wan, "hunyuan_video": assert_hunyuan_video, "sdxl": assert_sdxl,
          "lumina2": assert_lumina2, "sd15": assert_sd15, "sd3": assert_sd3, "hidream": assert_hidream,
          "hunyuan_dit": assert_hunyuan_dit,
          **dict.fromkeys(("chroma", "pixart", "ltx", "mochi", "cogvideox", "cosmos", "aura_flow"), assert_t5)}


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "base"))
