"""The example workflows as data; `make_workflows.py` has the real frontend turn them into files.

Sizes in the notes follow from parameter counts: 2 bytes a BF16 weight, 1 an FP8 one, 9/16 an NVFP4 one (a code and a
sixteenth of an 8-bit scale), with the layers that each published recipe leaves in BF16 (docs/sources/sglang.md, "FP8
presets"; docs/sources/modelopt.md, "FLUX.2-dev-NVFP4"). Those of SVDQuant files are the sums of their tensors at rank
32 (docs/formats/svdquant-int4.md). msModelSlim quantizes the 14.05e9 weights of Wan's blocks (docs/sources/ascend.md,
"Wan's layers") of 14.29e9; MXFP8 is 33/32 bytes each. GGUF files are as large as published.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from browser.graph import (
    FRAMES,
    NEGATIVE,
    OUTSIDE,
    PROMPT,
    SAMPLED,
    SEED,
    SIZE,
    Column,
    Link,
    Node,
    Shown,
    Workflow,
    decode,
    encoder_and_vae,
    frames,
    ksampler,
    nothing,
    number,
    override,
    picture,
    report,
    sampled,
    shown,
    size,
    text,
    video,
)
from browser.notes import HIDREAM, HYPER, LIGHTNING, LTX2, NOTES

LOGO = "A Logo With Bold Large Text: SGL Diffusion"
FOX = "a fox walking through neon rain"
CAR = "A cinematic shot of a red sports car driving through rain at night"
ASTRONAUT = "A tiny astronaut reading a book under a glass greenhouse"
WATERCOLOR = "Turn the scene into a warm watercolor illustration"
PARTY = "A hedgehog in a tiny party hat among confetti, flash photograph of an early digital camera"
BOTTLE = "A glass bottle with a night sky full of stars inside it, on a wood table in a modern kitchen, bright sun outside"
TIGER = "A nature documentary close-up photograph of a tiger's eye, surrounded by finely detailed fur"
CHROMA_NEGATIVE = "low quality, unfinished sketch, blurred, lacking detail, chromatic aberrations, artifacts, oversaturated"
PUPPET = ("A close-up of a cheerful puppet with curly yarn hair under a small red umbrella in the rain. It looks up and sings in "
          'English: "It\'s raining, I love it when it\'s raining."')
LTX_NEGATIVE = "blurry, low quality, still frame, watermark, overlay, titles, subtitles"
TREE = "A lo-fi, grungy wide shot of a large red tree that leans to one side, alone under a pitch black sky, Polaroid"
PAPER = "A paper airplane glides from the top of a skyscraper through the streets of a city, seen from behind"
BOOKSHOP = 'The window of a small bookshop on a rainy evening, with a hand-painted sign that says "Open Late"'
WAN_NEGATIVE = "overexposed, blurry, static, subtitles, watermark, JPEG artifacts, deformed limbs, cluttered background"
GUIDED = shown("guidance", "guidance")
CFG = shown("cfg", "sample")
GUIDER_CFG = shown("cfg", "guider")
NOISE_SEED = shown("seed", "noise", "noise_seed")
SEEDED = {"seed": SEED, "control_after_generate": "randomize"}


def loaded(name: str, transformer: Column | None = None, **widgets: Any) -> tuple[list[Column], Link]:
    """All that is loaded, as columns, and its MODEL: of these nodes, or of an override."""
    base = NOTES[name].base
    nodes = transformer or override(base, NOTES[name].reference, **widgets)
    said = next(node.key for node in nodes if node.key in ("svdq", "override"))
    return [[*nodes, report(said)], encoder_and_vae(base)], (nodes[-1].key, 0)


def svdq(name: str, **widgets: Any) -> Column:
    return [Node("svdq", "QT_NunchakuSVDQLoader", {}, {"weights": NOTES[name].repo, **widgets}, width=OUTSIDE)]


def lora(model: dict[str, str], strength: float) -> Node:
    return Node("lora", "LoraLoaderModelOnly", {"model": ("svdq", 0)}, {"lora_name": model["name"], "strength_model": strength},
                width=OUTSIDE, height=90, models=(model,))


def flux1(name: str, transformer: Column | None = None, steps: int = 20) -> Workflow:
    """As ComfyUI's own FLUX.1 template: guidance 3.5, cfg 1, euler simple. At 1024 x 1024 its shift is diffusers'."""
    outside, model = loaded(name, transformer)
    return Workflow(name, NOTES[name].text(), "Text to image", outside, [
        [text("prompt", LOGO, "Prompt"), Node("guidance", "FluxGuidance", {"conditioning": ("prompt", 0)}, {"guidance": 3.5}),
         nothing(), Node("latent", "EmptySD3LatentImage", {}, {"width": 1024, "height": 1024})],
        [ksampler(model, ("guidance", 0), ("none", 0), ("latent", 0), steps, 1.0), decode()]],
        picture(name), (PROMPT, *SIZE, *SAMPLED, GUIDED))


def flux2(name: str, **widgets: Any) -> Workflow:
    """As ComfyUI's own FLUX.2 template: guidance 4, Flux2Scheduler, euler."""
    outside, model = loaded(name, **widgets)
    sides = {"width": ("width", 0), "height": ("height", 0)}
    return Workflow(name, NOTES[name].text(), "Text to image", outside, [
        [text("prompt", LOGO, "Prompt"), Node("guidance", "FluxGuidance", {"conditioning": ("prompt", 0)}, {"guidance": 4.0}),
         *size(1024, 1024), Node("latent", "EmptyFlux2LatentImage", sides)],
        [*sampled(("guidance", 0), model, Node("sigmas", "Flux2Scheduler", sides, {"steps": 20}), "latent"), decode()]],
        picture(name), (PROMPT, shown("width", "width", "value"), shown("height", "height", "value"),
                        shown("seed", "noise", "noise_seed"), shown("steps", "sigmas"), GUIDED))


HIGH, LOW = "High noise: transformer", "Low noise: transformer_2"


def wan_override(name: str, **widgets: Any) -> list[Column]:
    """The high-noise expert is an override, the low-noise one the base's."""
    base, repo = NOTES[name].base, NOTES[name].repo
    low = Node("low", "QT_LoadBaseModel", {}, {"base_model": base, "component": "transformer_2", "weights": "load"}, LOW,
               OUTSIDE)
    return [[*override(base, repo, title=HIGH, **widgets), report("override")], [low, *encoder_and_vae(base)]]


def wan_modelslim(name: str, listed: str) -> list[Column]:
    """Both experts of an msModelSlim export, which the input `listed` names."""
    experts = [Node(key, "QT_ModelSlimLoader", {}, {listed: NOTES[name].repo, "component": component}, title, OUTSIDE)
               for key, component, title in (("high", "transformer", HIGH), ("low_quantized", "transformer_2", LOW))]
    return [[*experts, report("high")], [*encoder_and_vae(NOTES[name].base), report("low_quantized", "transformer_2")]]


def wan_online(name: str) -> list[Column]:
    """Both experts of the base, quantized when the workflow runs."""
    base = NOTES[name].base

    def expert(key: str, component: str, title: str) -> Column:
        return [Node(f"{key}_base", "QT_LoadBaseModel", {}, {"base_model": base, "component": component, "weights": "load"},
                     width=OUTSIDE),
                Node(key, "QT_AscendMXFP8Quantize", {"model": (f"{key}_base", 0)}, {}, title, OUTSIDE, 170)]

    clip, vae = encoder_and_vae(base)
    return [[*expert("high", "transformer", HIGH), clip],
            [*expert("low", "transformer_2", LOW), vae, report("high", height=138)]]


def wan(name: str, load: Callable[..., list[Column]], **given: str) -> Workflow:
    """Wan's own defaults for T2V-A14B: 40 steps, shift 12, cfg 4 (high noise) and 3 (low noise), boundary 0.875.

    With shift 12 the first 26 of 40 steps of the simple schedule start at a sigma of 0.875 or more.
    """
    outside = load(name, **given)
    high, low = (node.key for column in outside for node in column if node.title in (HIGH, LOW))

    def half(key: str, model: str, latent: str, first: bool) -> Node:
        links = {"model": (model, 0), "positive": ("prompt", 0), "negative": ("negative", 0), "latent_image": (latent, 0),
                 "end_at_step" if first else "start_at_step": ("boundary", 0)}
        return Node(key, "KSamplerAdvanced", links, {
            "add_noise": "enable" if first else "disable", "noise_seed": SEED,
            "control_after_generate": "randomize" if first else "fixed", "steps": 40,
            "cfg": 4.0 if first else 3.0, "sampler_name": "euler", "scheduler": "simple",
            **({"start_at_step": 0} if first else {"end_at_step": 10000}), "return_with_leftover_noise": "enable" if first else "disable"},
            "High noise" if first else "Low noise")

    def shift(key: str, model: str) -> Node:
        return Node(key, "ModelSamplingSD3", {"model": (model, 0)}, {"shift": 12.0}, "Shift")

    return Workflow(name, NOTES[name].text(), "Text to video", outside, [
        [text("prompt", FOX, "Prompt"), text("negative", WAN_NEGATIVE, "Negative prompt"),
         Node("latent", "EmptyHunyuanLatentVideo", {}, {"width": 832, "height": 480, "length": 81}),
         number("boundary", 26, "High noise: steps")],
        [shift("high_shift", high), half("high_sample", "high_shift", "latent", True)],
        [shift("low_shift", low), half("sample", "low_shift", "high_sample", False)], [decode(), frames(16)]],
        video(name), (
            PROMPT, NEGATIVE, *FRAMES, shown("seed", "high_sample", "noise_seed"),
            Shown("steps", (("high_sample", "steps"), ("sample", "steps"))),
            shown("high noise: steps", "boundary", "value"),
            shown("high noise: cfg", "high_sample", "cfg"), shown("low noise: cfg", "sample", "cfg"),
            Shown("shift", (("high_shift", "shift"), ("low_shift", "shift")))),
        {high: "high noise", low: "low noise"})


def hunyuan_video(name: str) -> Workflow:
    """As ComfyUI's own HunyuanVideo template: guidance 6, shift 7, tiled decoding; 544 x 960, 17 frames."""
    outside, model = loaded(name)
    tiles = {"tile_size": 256, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    return Workflow(name, NOTES[name].text(), "Text to video", outside, [
        [text("prompt", CAR, "Prompt"), Node("guidance", "FluxGuidance", {"conditioning": ("prompt", 0)}, {"guidance": 6.0}),
         Node("latent", "EmptyHunyuanLatentVideo", {}, {"width": 960, "height": 544, "length": 17})],
        [Node("shift", "ModelSamplingSD3", {"model": model}, {"shift": 7.0}),
         *sampled(("guidance", 0), ("shift", 0),
                  Node("sigmas", "BasicScheduler", {"model": ("shift", 0)}, {"scheduler": "simple", "steps": 30}), "latent")],
        [Node("decode", "VAEDecodeTiled", {"samples": ("sample", 0), "vae": ("vae", 0)}, tiles), frames(24)]],
        video(name), (PROMPT, *FRAMES, shown("seed", "noise", "noise_seed"), shown("steps", "sigmas"), GUIDED,
                      shown("shift", "shift")))


def qwen_image(name: str) -> Workflow:
    """The model card's settings: 50 steps, true cfg 4, 1328 x 1328; shift 3.1 as in ComfyUI's own template."""
    outside, model = loaded(name)
    return Workflow(name, NOTES[name].text(), "Text to image", outside, [
        [text("prompt", ASTRONAUT, "Prompt"), text("negative", "", "Negative prompt"),
         Node("latent", "EmptySD3LatentImage", {}, {"width": 1328, "height": 1328})],
        [Node("shift", "ModelSamplingAuraFlow", {"model": model}, {"shift": 3.1}),
         ksampler(("shift", 0), ("prompt", 0), ("negative", 0), ("latent", 0), 50, 4.0), decode()]],
        picture(name), (PROMPT, NEGATIVE, *SIZE, *SAMPLED, CFG, shown("shift", "shift")))


def qwen_image_edit(name: str, transformer: Column | None = None, shift: float = 3.1) -> Workflow:
    """QwenImageEditPlusPipeline's way: one picture of a megapixel, sides multiples of 32, is reference and output size.

    The host's text node would scale the reference once more, to another size than the output. zero_cond_t comes with the
    transformer; 40 steps and true cfg 4 as on the model cards, the shift is that of ComfyUI's own template.
    """
    (models, others), model = loaded(name, transformer)

    def encode(key: str, prompt: str, title: str) -> Node:
        return Node(key, "TextEncodeQwenImageEditPlus", {"clip": ("clip", 0), "image1": ("scaled", 0)}, {"prompt": prompt},
                    title, height=170)

    def reference(key: str, conditioning: str, title: str) -> Node:
        return Node(key, "ReferenceLatent", {"conditioning": (conditioning, 0), "latent": ("latent", 0)}, title=title)

    load = Node("picture", "LoadImage", {}, {"image": "example.png"}, "Picture to edit", OUTSIDE, 322)
    return Workflow(name, NOTES[name].text(), "Edit a picture", [models, [*others, load]], [
        [Node("scaled", "ImageScaleToTotalPixels", {"image": ("picture", 0)},
              {"upscale_method": "lanczos", "megapixels": 1.0, "resolution_steps": 32}),
         Node("latent", "VAEEncode", {"pixels": ("scaled", 0), "vae": ("vae", 0)})],
        [encode("prompt", WATERCOLOR, "Prompt"), reference("prompt_picture", "prompt", "Prompt with picture"),
         encode("negative", "", "Negative prompt"),
         reference("negative_picture", "negative", "Negative prompt with picture")],
        [Node("shift", "ModelSamplingAuraFlow", {"model": model}, {"shift": shift}),
         Node("norm", "CFGNorm", {"model": ("shift", 0)}, {"strength": 1.0}),
         ksampler(("norm", 0), ("prompt_picture", 0), ("negative_picture", 0), ("latent", 0), 40, 4.0), decode()]],
        picture(name), (shown("prompt", "prompt"), shown("negative prompt", "negative", "prompt"),
                        shown("megapixels", "scaled"), *SAMPLED, CFG, shown("shift", "shift")))


def flux2_klein(name: str) -> Workflow:
    """As ComfyUI's own template for the distilled 4B (image_flux2_klein_text_to_image): 4 steps, cfg 1, euler."""
    outside, model = loaded(name, kind="weights")
    sides = {"width": ("width", 0), "height": ("height", 0)}
    return Workflow(name, NOTES[name].text(), "Text to image", outside, [
        [text("prompt", PARTY, "Prompt"), *size(1024, 1024), Node("latent", "EmptyFlux2LatentImage", sides)],
        [*sampled(("prompt", 0), model, Node("sigmas", "Flux2Scheduler", sides, {"steps": 4}), "latent"), decode()]],
        picture(name), (PROMPT, shown("width", "width", "value"), shown("height", "height", "value"), NOISE_SEED,
                        shown("steps", "sigmas")))


def sd35(name: str) -> Workflow:
    """As ComfyUI's own Stable Diffusion 3.5 template (sd3.5_simple_example): 20 steps, cfg 4.01, euler, sgm_uniform."""
    outside, model = loaded(name, kind="weights")
    return Workflow(name, NOTES[name].text(), "Text to image", outside, [
        [text("prompt", BOTTLE, "Prompt"), text("negative", "", "Negative prompt"),
         Node("latent", "EmptySD3LatentImage", {}, {"width": 1024, "height": 1024})],
        [ksampler(model, ("prompt", 0), ("negative", 0), ("latent", 0), 20, 4.01, scheduler="sgm_uniform"), decode()]],
        picture(name), (PROMPT, NEGATIVE, *SIZE, *SAMPLED, CFG))


def chroma(name: str) -> Workflow:
    """As ComfyUI's own Chroma template (image_chroma_text_to_image): 26 steps, cfg 3.5, shift 1, euler, beta; one token of
    padding behind a prompt, which it calls the official way, and diffusers has, too."""
    outside, model = loaded(name, kind="weights")
    return Workflow(name, NOTES[name].text(), "Text to image", outside, [
        [Node("padded", "T5TokenizerOptions", {"clip": ("clip", 0)}, {"min_padding": 1, "min_length": 0}),
         text("prompt", TIGER, "Prompt", "padded"), text("negative", CHROMA_NEGATIVE, "Negative prompt", "padded"),
         Node("latent", "EmptySD3LatentImage", {}, {"width": 1024, "height": 1024})],
        [Node("shift", "ModelSamplingAuraFlow", {"model": model}, {"shift": 1.0}),
         *sampled(("prompt", 0), ("shift", 0),
                  Node("sigmas", "BasicScheduler", {"model": ("shift", 0)}, {"scheduler": "beta", "steps": 26}), "latent",
                  ("negative", 0), 3.5), decode()]],
        picture(name), (PROMPT, NEGATIVE, *SIZE, NOISE_SEED, shown("steps", "sigmas"), GUIDER_CFG, shown("shift", "shift")))


def hidream(name: str) -> Workflow:
    """As ComfyUI's own HiDream-I1 Full template (hidream_i1_full): 50 steps, cfg 5, shift 3, uni_pc; its text encoders."""
    base = NOTES[name].base
    encoders = Node("clip", "QuadrupleCLIPLoader", {}, {f"clip_name{i}": file["name"] for i, file in enumerate(HIDREAM, 1)},
                    width=OUTSIDE, height=178, models=HIDREAM)
    outside = [[*override(base, NOTES[name].reference, "weights"), report("override")], [encoders, encoder_and_vae(base)[1]]]
    return Workflow(name, NOTES[name].text(), "Text to image", outside, [
        [text("prompt", TREE, "Prompt"), text("negative", "bad ugly jpeg artifacts", "Negative prompt"),
         Node("latent", "EmptySD3LatentImage", {}, {"width": 1024, "height": 1024})],
        [Node("shift", "ModelSamplingSD3", {"model": ("override", 0)}, {"shift": 3.0}),
         ksampler(("shift", 0), ("prompt", 0), ("negative", 0), ("latent", 0), 50, 5.0, "uni_pc"), decode()]],
        picture(name), (PROMPT, NEGATIVE, *SIZE, *SAMPLED, CFG, shown("shift", "shift")))


def wan_vace(name: str) -> Workflow:
    """As ComfyUI's own VACE template (video_wan_vace_14B_t2v) without its LoRA: 20 steps, cfg 6, shift 8, uni_pc, 16 frames
    a second; 480p, the smaller of the two sizes that it names."""
    outside, model = loaded(name, kind="weights")
    return Workflow(name, NOTES[name].text(), "Text to video", outside, [
        [text("prompt", FOX, "Prompt"), text("negative", WAN_NEGATIVE, "Negative prompt")],
        [Node("latent", "WanVaceToVideo", {"positive": ("prompt", 0), "negative": ("negative", 0), "vae": ("vae", 0)},
              {"width": 832, "height": 480, "length": 81}, "Control video, masks, reference"),
         Node("shift", "ModelSamplingSD3", {"model": model}, {"shift": 8.0}),
         ksampler(("shift", 0), ("latent", 0), ("latent", 1), ("latent", 2), 20, 6.0, "uni_pc")],
        [Node("trimmed", "TrimVideoLatent", {"samples": ("sample", 0), "trim_amount": ("latent", 3)}), decode("trimmed"), frames(16)]],
        video(name), (PROMPT, NEGATIVE, *FRAMES, *SAMPLED, CFG, shown("shift", "shift")))


def hunyuan_video_15(name: str) -> Workflow:
    """As ComfyUI's own template (video_hunyuan_video_1.5_720p_t2v): 20 steps, cfg 6, shift 7, euler; 720p, 121 frames."""
    outside, model = loaded(name, kind="weights")
    return Workflow(name, NOTES[name].text(), "Text to video", outside, [
        [text("prompt", PAPER, "Prompt"), text("negative", "", "Negative prompt"),
         Node("latent", "EmptyHunyuanVideo15Latent", {}, {"width": 1280, "height": 720, "length": 121})],
        [Node("shift", "ModelSamplingSD3", {"model": model}, {"shift": 7.0}),
         *sampled(("prompt", 0), ("shift", 0),
                  Node("sigmas", "BasicScheduler", {"model": ("shift", 0)}, {"scheduler": "simple", "steps": 20}), "latent",
                  ("negative", 0), 6.0)],
        [decode(), frames(24)]],
        video(name), (PROMPT, NEGATIVE, *FRAMES, NOISE_SEED, shown("steps", "sigmas"), GUIDER_CFG, shown("shift", "shift")))


def ltx2(name: str) -> Workflow:
    """As the first stage of ComfyUI's own LTX-2 template (video_ltx2_t2v), with sound: 20 steps, cfg 4, euler_ancestral, 121
    frames of 24 a second. The second, which doubles the sides, takes a LoRA and an upscaler more."""
    base = NOTES[name].base
    sound = Node("audio_vae", "LTXVAudioVAELoader", {}, {"ckpt_name": LTX2["name"]}, width=OUTSIDE, height=90, models=(LTX2,))
    outside = [[*override(base, NOTES[name].reference, "weights"), report("override")], [*encoder_and_vae(base), sound]]
    rate, length = ("rate", 0), ("length", 0)
    tiles = {"tile_size": 512, "overlap": 64, "temporal_size": 4096, "temporal_overlap": 8}
    return Workflow(name, NOTES[name].text(), "Text to video", outside, [
        [text("prompt", PUPPET, "Prompt"), text("negative", LTX_NEGATIVE, "Negative prompt"), number("length", 121, "length"),
         Node("rate", "PrimitiveFloat", {}, {"value": 24.0}, "frames per second")],
        [Node("timed", "LTXVConditioning", {"positive": ("prompt", 0), "negative": ("negative", 0), "frame_rate": rate}),
         Node("size", "EmptyLTXVLatentVideo", {"length": length}, {"width": 768, "height": 512}),
         Node("silence", "LTXVEmptyLatentAudio", {"frames_number": length, "frame_rate": rate, "audio_vae": ("audio_vae", 0)}),
         Node("latent", "LTXVConcatAVLatent", {"video_latent": ("size", 0), "audio_latent": ("silence", 0)})],
        sampled(("timed", 0), ("override", 0), Node("sigmas", "LTXVScheduler", {"latent": ("latent", 0)}, {"steps": 20}), "latent",
                ("timed", 1), 4.0, "euler_ancestral"),
        [Node("parts", "LTXVSeparateAVLatent", {"av_latent": ("sample", 0)}),
         Node("decode", "VAEDecodeTiled", {"samples": ("parts", 0), "vae": ("vae", 0)}, tiles),
         Node("heard", "LTXVAudioVAEDecode", {"samples": ("parts", 1), "audio_vae": ("audio_vae", 0)}),
         Node("video", "CreateVideo", {"images": ("decode", 0), "audio": ("heard", 0), "fps": rate})]],
        video(name), (PROMPT, NEGATIVE, shown("width", "size"), shown("height", "size"), shown("length", "length", "value"),
                      NOISE_SEED, shown("steps", "sigmas"), GUIDER_CFG))


def distilled(name: str, transformer: Column, prompt: str, side: int, steps: int) -> Workflow:
    """Qwen-Image-Lightning's and Z-Image-Turbo's own settings: shift 3, euler, cfg 1, which makes no use of a negative."""
    outside, model = loaded(name, transformer)
    return Workflow(name, NOTES[name].text(), "Text to image", outside, [
        [text("prompt", prompt, "Prompt"), nothing(),
         Node("latent", "EmptySD3LatentImage", {}, {"width": side, "height": side})],
        [Node("shift", "ModelSamplingAuraFlow", {"model": model}, {"shift": 3.0}),
         ksampler(("shift", 0), ("prompt", 0), ("none", 0), ("latent", 0), steps, 1.0), decode()]],
        picture(name), (PROMPT, *SIZE, *SAMPLED, shown("shift", "shift")))


def on_server(name: str, title: str, drawn: Node, save: Node, *before: Node) -> Workflow:
    """A node that draws on a server with what `name` names: all that the subgraph of another template would hold."""
    base, repo = NOTES[name].base, NOTES[name].repo
    server = Node("server", "QT_ServerModel", {}, {"base_model": base, "override": repo}, width=OUTSIDE)
    reports = [Node(f"report_{key}", "PreviewAny", {"source": (key, 1)}, {}, said, OUTSIDE, 200)
               for key, said in (("server", "Report: how to start it"), ("drawn", "Report: what was drawn"))]
    columns = [column for column in ([server, *reports], list(before)) if column]
    return Workflow(name, NOTES[name].text(), title, columns, [[drawn]], save, (), flat=True)


def server_flux1(name: str) -> Workflow:
    """The settings of the template without a server: 20 steps, guidance 3.5."""
    drawn = Node("drawn", "QT_ServerImage", {"server_model": ("server", 0)}, {
        "prompt": LOGO, "width": 1024, "height": 1024, "steps": 20, "cfg": 3.5, **SEEDED})
    return on_server(name, "Text to image", drawn, Node("save", "SaveImage", {"images": ("drawn", 0)}, {"filename_prefix": name}))


def server_wan(name: str) -> Workflow:
    """Wan's own defaults, as in the template without a server; the shift is the server's."""
    drawn = Node("drawn", "QT_ServerVideo", {"server_model": ("server", 0)}, {
        "prompt": FOX, "negative_prompt": WAN_NEGATIVE, "width": 832, "height": 480, "length": 81, "fps": 16, "steps": 40, "cfg": 4.0,
        "cfg_2": 3.0, **SEEDED})
    return on_server(name, "Text to video", drawn, Node("save", "SaveVideo", {"video": ("drawn", 0)}, {"filename_prefix": f"video/{name}"}))


def server_edit(name: str) -> Workflow:
    """The settings of the template without a server: a megapixel, sides multiples of 32, 40 steps, true cfg 4."""
    drawn = Node("drawn", "QT_ServerImage", {
        "server_model": ("server", 0), "images": ("scaled", 0), "width": ("size", 0), "height": ("size", 1)}, {
        "prompt": WATERCOLOR, "steps": 40, "cfg": 4.0, **SEEDED})
    before = [Node("picture", "LoadImage", {}, {"image": "example.png"}, "Picture to edit", OUTSIDE, 322),
              Node("scaled", "ImageScaleToTotalPixels", {"image": ("picture", 0)},
                   {"upscale_method": "lanczos", "megapixels": 1.0, "resolution_steps": 32}, width=OUTSIDE),
              Node("size", "GetImageSize", {"image": ("scaled", 0)}, width=OUTSIDE)]
    return on_server(name, "Edit a picture", drawn, Node("save", "SaveImage", {"images": ("drawn", 0)}, {"filename_prefix": name}), *before)


WORKFLOWS = [
    flux1("flux1_dev_modelopt_fp8"),
    flux2("flux2_dev_modelopt_fp8"),
    wan("wan22_t2v_a14b_modelopt_fp8", wan_override),
    hunyuan_video("hunyuanvideo_modelopt_fp8"),
    qwen_image("qwen_image_modelopt_fp8"),
    qwen_image_edit("qwen_image_edit_2511_modelopt_fp8"),
    flux1("flux1_dev_modelopt_nvfp4"),
    flux2("flux2_dev_nvfp4", kind="weights", weights_name="flux2-dev-nvfp4-mixed.safetensors"),
    wan("wan22_t2v_a14b_modelopt_nvfp4", wan_override, fp4_backend="flashinfer_cudnn"),
    wan("wan22_t2v_a14b_modelslim_w8a8", wan_modelslim, listed="folder"),
    # nobody has published one, so its folder is in nobody's list
    wan("wan22_t2v_a14b_modelslim_mxfp8", wan_modelslim, listed="reference"),
    wan("wan22_t2v_a14b_online_mxfp8", wan_online),
    flux1("flux1_dev_svdq_int4_lora", [*svdq("flux1_dev_svdq_int4_lora", precision="int4"), lora(HYPER, 0.125)], steps=8),
    distilled("qwen_image_svdq_lightning_4steps", svdq("qwen_image_svdq_lightning_4steps", weights_name=LIGHTNING),
              ASTRONAUT, 1328, 4),
    qwen_image_edit("qwen_image_edit_svdq", svdq("qwen_image_edit_svdq"), 3.0),
    # "9 steps" of diffusers' pipeline end with one of no length
    distilled("z_image_turbo_svdq", svdq("z_image_turbo_svdq"), BOOKSHOP, 1024, 8),
    flux2_klein("flux2_klein_4b_fp8"),
    sd35("sd35_large_fp8"),
    chroma("chroma1_hd_fp8"),
    wan_vace("wan21_vace_14b_gguf"),
    hunyuan_video_15("hunyuanvideo15_720p_gguf"),
    hidream("hidream_i1_full_fp8"),
    ltx2("ltx2_fp8"),
    server_flux1("server_flux1_dev_modelopt_fp8"),
    server_wan("server_wan22_t2v_a14b_modelopt_fp8"),
    server_edit("server_qwen_image_edit_2511_modelopt_fp8"),
]


def place_models(base: Path) -> None:
    """Files in `base`/models for the files that nodes name, so that their lists hold them: empty ones, but for the one that
    this pack finds, and describes, too. That is a tiny LTX-2."""
    from support.pack import start_comfy

    start_comfy()
    from safetensors.torch import save_file

    from support import host_models

    for model in [model for workflow in WORKFLOWS for node in workflow.nodes for model in node.models]:
        path = base / "models" / model["directory"] / model["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if model == LTX2:
            save_file(host_models.make("LTX-2"), str(path), host_models.metadata_of("LTX-2"))
