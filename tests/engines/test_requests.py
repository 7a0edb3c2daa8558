"""What the nodes ask of a server, held against SGLang's own models of its requests: no field that it does not know, and all that it
would choose in silence said."""

from __future__ import annotations

import json

import pytest

from quantized_transformers.engines.sglang import known, requests
from quantized_transformers.engines.sglang.requests import Drawing
from quantized_transformers.loaders.errors import CheckpointError
from support import sglang

pytestmark = pytest.mark.unit

PLAIN = Drawing("a cat")
ALL = Drawing("a cat", "rain", 640, 384, 20, 3.5, 7, 4.0, "exact", 81, 16, 2.5, 5.0, '{"max_sequence_length": 256}')
IMAGE = Drawing("a cat", "rain", 640, 384, 20, 3.5, 7, 4.0, "high", extra='{"max_sequence_length": 256, "flow_shift": 3.0}')
FLUX, WAN, QWEN = "FluxPipeline", "WanPipeline", "QwenImageEditPlusPipeline"


@pytest.fixture(scope="module")
def rollout(protocol):
    return sglang.module("io_struct", "sglang/multimodal_gen/runtime/entrypoints/post_training").RolloutRequest


@pytest.mark.parametrize("drawing", [PLAIN, IMAGE])
@pytest.mark.parametrize("pipeline", [FLUX, WAN, QWEN])
def test_a_picture(protocol, drawing, pipeline):
    body = json.loads(json.dumps(requests.image(drawing, pipeline)))
    model = protocol.ImageGenerationsRequest
    asked = model(**body)
    assert body.keys() <= model.model_fields.keys() and not asked.model_extra
    assert (asked.output_format, asked.response_format, asked.generator_device, asked.n) == ("png", "b64_json", "cpu", 1)
    assert asked.seed == drawing.seed and asked.size == f"{drawing.width}x{drawing.height}" and "seed" in body
    assert asked.quality in ("auto", drawing.quality) and (drawing is PLAIN) == (asked.num_inference_steps is None)


@pytest.mark.parametrize("pipeline", [FLUX, WAN])
def test_a_video(protocol, pipeline):
    body = json.loads(json.dumps(requests.video(ALL, pipeline)))
    model = protocol.VideoGenerationsRequest
    asked = model(**body)
    unknown = body.keys() - model.model_fields.keys()
    assert unknown == {"quality"}, "which a route reads as an extra"
    assert asked.model_extra == {"quality": "exact"}
    assert (asked.num_frames, asked.fps, asked.size, asked.seed, asked.generator_device) == (81, 16, "640x384", 7, "cpu")
    assert (asked.guidance_scale_2, asked.flow_shift, asked.n) == (2.5, 5.0, 1)
    assert not body.keys() & {"output_path", "input_reference", "video_path", "seconds"}


def test_decoded_frames(rollout):
    body = json.loads(json.dumps(requests.frames(ALL, WAN)))
    asked = rollout(**body)
    assert body.keys() <= rollout.model_fields.keys()
    assert (asked.rollout, asked.width, asked.height, asked.num_frames, asked.seed, asked.generator_device) == (False, 640, 384, 81, 7, "cpu")
    assert asked.extra_sampling_params == {"guidance_scale_2": 2.5, "flow_shift": 5.0, "quality": "exact", "max_sequence_length": 256}


def test_forms_have_the_fields_of_the_routes(protocol):
    taken = sglang.parameters("image_api", "edits")
    assert taken >= known.EDIT_FIELDS
    unread = taken - known.EDIT_FIELDS - requests.OURS - {"raw_request", "image_array", "url_array", "perf_dump_path", "upscaling_model_path"}
    assert not unread, "a form that takes more by now"
    fields = dict(requests.edit(Drawing("a cat", "", 640, 384, quality="high"), QWEN))
    assert fields.keys() <= taken
    assert fields["negative_prompt"] == " ", "an empty one would count as none, which is the model's own"
    assert fields["output_format"] == "png" and fields["seed"] == "0" and fields["generator_device"] == "cpu"
    video = dict(requests.video_form(ALL, WAN))
    assert video.keys() - sglang.parameters("video_api", "create_video") == {"quality"}, "an extra of the form, too"
    assert json.loads(video["guidance_scale"]) == 3.5 and video["prompt"] == "a cat"


def test_an_edit_refuses_what_its_form_does_not_take():
    with pytest.raises(CheckpointError, match="do not take flow_shift"):
        requests.edit(IMAGE.__class__("a", extra='{"flow_shift": 3.0}'), QWEN)


@pytest.mark.parametrize("pipeline, negative, true_cfg, sent", [
    (FLUX, "", 0, None), (FLUX, " \n", 0, None), (FLUX, "rain", 0, "rain"), (FLUX, "", 4.0, ""), ("Flux2Pipeline", "", 0, None),
    ("HunyuanVideoPipeline", "", 0, None), (WAN, "", 0, ""), (WAN, "rain", 0, "rain"), (QWEN, "", 0, ""), ("DiffusersPipeline", "", 0, "")])
def test_an_empty_negative_prompt_is_said_where_it_changes_no_more_than_the_models_own(pipeline, negative, true_cfg, sent):
    """Where guidance is distilled even an empty one turns a second evaluation on; elsewhere none is the model's, which is long."""
    body = requests.image(Drawing("a cat", negative, true_cfg=true_cfg), pipeline)
    assert body.get("negative_prompt") == sent
    warned = any("true CFG" in line for line in Drawing("a cat", negative).notes(pipeline))
    assert warned == (sent == "rain" and pipeline == FLUX)


def test_cfg_is_what_the_model_calls_guidance():
    assert requests.image(Drawing("a", cfg=3.0), FLUX)["guidance_scale"] == 3.0
    qwen = requests.image(Drawing("a", cfg=3.0), QWEN)
    assert qwen["true_cfg_scale"] == 3.0 and "guidance_scale" not in qwen
    both = requests.image(Drawing("a", cfg=3.0, true_cfg=2.0), QWEN)
    assert (both["guidance_scale"], both["true_cfg_scale"]) == (3.0, 2.0)


@pytest.mark.parametrize("extra, word", [
    ('{"seed": 1}', "seed"), ('{"output_format": "jpeg"}', "output_format"), ('{"output_path": "/etc"}', "output_path"),
    ('{"reference_url": "http://x"}', "reference_url"), ('{"extra_body": {}}', "extra_body"), ('{"n": 4}', "n"), ('{"model": "x"}', "model"),
    ('{"diffusers_kwargs": {"generator_device": "cuda"}}', "generator_device"), ('{"upscaling_model_path": "/x"}', "upscaling_model_path"),
    ('{"a": [{"video_url": "file:///etc/passwd"}]}', "video_url"), ('{"num_inference_steps": 4}', "use steps"), ("[1]", "no JSON object"),
    ("{", "no JSON"), ("[" * 100_000, "no JSON")])
def test_what_extra_must_not_say(extra, word):
    with pytest.raises(CheckpointError, match=word):
        requests.image(Drawing("a", steps=8, extra=extra), FLUX)


def test_extra_is_sent_and_its_own_word_is_not():
    drawing = Drawing("a", extra=' {"accept_size": true, "enable_teacache": true} ')
    body = requests.image(drawing, FLUX)
    assert body["enable_teacache"] is True and "accept_size" not in body and drawing.accepts_size
    assert not Drawing("a").accepts_size and not Drawing("a", extra='{"accept_size": 1}').accepts_size
