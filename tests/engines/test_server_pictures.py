"""What SGLang's routes of pictures answer, without a model: its own app over made ones."""

from __future__ import annotations

import base64

import numpy
import pytest
import requests

from support.sglang_stub.asking import ASKED, COLOURS, edit, film, generate, pictures, png

pytestmark = pytest.mark.server


class TestPictures:
    def test_what_comes_back(self, stub):
        answer = generate(stub, n=2)
        found = pictures(answer)
        assert [(one.format, one.size) for one in found] == 2 * [("PNG", (64, 48))]
        told = answer.json()
        assert told.keys() >= {"id", "created", "data", "inference_time_s", "peak_memory_mb"} and len(told["data"]) == 2
        assert all(one["revised_prompt"] == "a cat" and one["url"] is None for one in told["data"])

    def test_what_was_sent_is_there_to_read(self, stub):
        requests.post(f"{stub.url}/v1/images/generations", json=ASKED, headers={"Authorization": "Bearer secret"}, timeout=30)
        came, = [one for one in stub.requests if one["method"] == "POST"]
        assert (came["path"], came["json"], came["headers"]["authorization"]) == ("/v1/images/generations", ASKED, "Bearer secret")
        drawn, = stub.drawn
        assert (drawn["width"], drawn["height"], drawn["seed"], drawn["generator_device"]) == (64, 48, 7, "cpu")

    def test_another_size_than_asked_for_comes_without_a_word(self, stub):
        stub.next({"size": [96, 96]})
        found, = pictures(generate(stub, size="100x100"))
        assert found.size == (96, 96)

    def test_fewer_than_asked_for(self, stub):
        stub.next({"count": 1})
        assert len(pictures(generate(stub, n=2))) == 1

    def test_a_failure_of_the_workers_has_no_cause(self, stub):
        stub.next({"error": "out of memory"})
        answer = generate(stub)
        assert (answer.status_code, answer.headers["content-type"], answer.text) == (
            500, "text/plain; charset=utf-8", "Internal Server Error")
        assert generate(stub).status_code == 200, "and the next one is drawn"

    @pytest.mark.parametrize("changed, status, said", [
        ({"seed": -1}, 400, "seed"), ({"size": "wide"}, 400, "size must be formatted as positive WIDTHxHEIGHT"),
        ({"num_inference_steps": 0}, 400, "num_inference_steps must be positive"), ({"response_format": "xml"}, 400, "xml"),
        ({"task_type": "T2V"}, 400, "T2V")])
    def test_a_request_that_it_refuses(self, stub, changed, status, said):
        answer = generate(stub, **changed)
        assert answer.status_code == status and isinstance(answer.json()["detail"], str) and said in answer.json()["detail"]
        assert stub.drawn == []

    def test_fields_of_a_wrong_type_are_named(self, stub):
        answer = generate(stub, num_inference_steps="many", seed={})
        assert answer.status_code == 422
        assert {error["loc"][1] for error in answer.json()["detail"]} == {"num_inference_steps", "seed"}
        assert all(error.keys() >= {"loc", "msg", "type"} for error in answer.json()["detail"])


class TestNegativePrompts:
    def test_an_empty_one_in_json_is_one(self, stub):
        """And with it FLUX.1's distilled guidance becomes true CFG."""
        for changed in ({}, {"negative_prompt": ""}):
            generate(stub, guidance_scale=3.5, **changed)
        plain, empty = stub.drawn
        assert (plain["negative_prompt"], plain["cfg"]) == (None, False) and (empty["negative_prompt"], empty["cfg"]) == ("", True)

    def test_without_one_the_models_own(self, stub):
        stub.restart(model="Wan2.1-T2V-1.3B-Diffusers")
        for changed in ({}, {"negative_prompt": ""}):
            film(stub, **changed)
        plain, empty = stub.drawn
        assert len(plain["negative_prompt"]) > 50 and empty["negative_prompt"] == ""

    def test_an_empty_one_in_a_form_is_none(self, stub):
        stub.restart(model="Qwen-Image-Edit-2511")
        for changed in ({}, {"negative_prompt": ""}, {"negative_prompt": " "}):
            pictures(edit(stub, [png(COLOURS[0])], **changed))
        plain, empty, space = (one["negative_prompt"] for one in stub.drawn)
        assert empty == plain and space == " "


class TestEdits:
    @pytest.mark.parametrize("name", ["image", "image[]"])
    @pytest.mark.parametrize("count", [1, 3])
    def test_images_keep_their_order(self, stub, name, count):
        stub.restart(model="Qwen-Image-Edit-2511")
        found, = pictures(edit(stub, [png(rgb) for rgb in COLOURS[:count]], name))
        drawn, = stub.drawn
        assert drawn["images"] == [{"size": [32, 24], "mean": list(map(float, rgb))} for rgb in COLOURS[:count]]
        came, = [one for one in stub.requests if one["method"] == "POST"]
        sent = [part for part in came["parts"] if part["name"] == name]
        assert [base64.b64decode(part["data"]) for part in sent] == [png(rgb) for rgb in COLOURS[:count]]
        lower = numpy.asarray(found)[-1, 64 // count // 2::64 // count]
        assert abs(lower.astype(int) - numpy.array(COLOURS[:count])).max() <= 1, "the picture says so, too"

    def test_without_an_image(self, stub):
        answer = requests.post(f"{stub.url}/v1/images/edits", data=ASKED, timeout=30)
        assert answer.status_code == 422 and answer.json() == {"detail": "Field 'image' or 'url' is required"}

    def test_a_model_that_cannot(self, stub):
        answer = edit(stub, [png(COLOURS[0])])
        assert answer.status_code == 400 and "T2I" in answer.json()["detail"] and stub.drawn == []
