"""What SGLang's own models of requests have, and have not: the fields that a client sends, and what it must not leave out."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.unit

# Of pictures and videos alike; a model's own fields are extras, which any name is.
BOTH = {"prompt", "negative_prompt", "width", "height", "size", "num_inference_steps", "guidance_scale", "true_cfg_scale",
        "seed", "generator_device", "flow_shift", "max_sequence_length", "task_type"}


def test_fields_of_a_picture(protocol):
    fields = protocol.ImageGenerationsRequest.model_fields
    assert fields.keys() >= BOTH | {"n", "output_format", "response_format", "quality"}
    assert protocol.ImageResponseData.model_fields.keys() >= {"b64_json", "url", "file_path"}


def test_fields_of_a_video(protocol):
    fields = protocol.VideoGenerationsRequest.model_fields
    assert fields.keys() >= BOTH | {"num_frames", "fps", "seconds", "guidance_scale_2", "input_reference", "video_path",
                                    "output_path"}
    assert protocol.VideoResponse.model_fields.keys() >= {"id", "status", "progress", "error", "num_outputs", "file_path"}


def test_what_a_request_gets_that_does_not_say(protocol):
    """No seed, no format, noise of the server's GPU, an answer by URL."""
    asked = protocol.ImageGenerationsRequest(prompt="a cat")
    assert (asked.seed, asked.output_format, asked.generator_device, asked.response_format) == (None, None, "cuda", "url")


def test_a_mistyped_field_is_taken(protocol):
    """So that a model of it that validates proves nothing: tests compare names with `model_fields`."""
    asked = protocol.ImageGenerationsRequest(prompt="a cat", num_inference_step=4)
    assert asked.model_extra == {"num_inference_step": 4} and asked.num_inference_steps is None
