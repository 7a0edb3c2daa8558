"""States of SGLang's server that a client meets: what it serves, warming up, dead workers, LoRAs."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import numpy
import pytest
import requests

from support.sglang_stub.asking import generate, pictures

pytestmark = pytest.mark.server

# All that a name on the server's command line and in JSON might not survive: what an identity is made of, and more.
NAME = ("qt:black-forest-labs/FLUX.1-dev@0123456789ab+transformer=a_b/c-d~e.safetensors@ba9876543210"
        "+transformer_2=F:/ü (1)%20+lora=a/b@00112233445*-0.5 \"'\\{}[]$,;")


class TestStates:
    def test_warming_up(self, stub):
        """/health says 503 without a word, and other routes keep who asks waiting."""
        stub.restart(warm=False)
        answer = requests.get(f"{stub.url}/health", timeout=30)
        assert (answer.status_code, answer.content) == (503, b"")
        assert stub.request("/liveness") == (200, {"status": "ok"}) and stub.request("/server_info")[0] == 200
        with pytest.raises(requests.Timeout):
            requests.get(f"{stub.url}/v1/models", timeout=0.5)
        stub.told(warm=True)
        stub.until(lambda: stub.request("/health") == (200, {"status": "ok"}))

    def test_a_worker_dies(self, stub):
        stub.next({"hold": True})
        with concurrent.futures.ThreadPoolExecutor() as pool:
            running = pool.submit(generate, stub)
            stub.until(lambda: stub.drawn)
            stub.told(kill=True)
            answer = running.result(10)
        said = "Scheduler worker exited; restart the server."
        assert (answer.status_code, answer.text) == (500, "Internal Server Error")
        assert stub.request("/health") == (503, {"status": "unhealthy", "error": said})
        answer = generate(stub)
        assert (answer.status_code, answer.json()) == (503, {"error": said})
        assert stub.request("/liveness")[0] == stub.request("/v1/models")[0] == 200

    def test_the_name_that_it_was_given_comes_back_whole(self, stub):
        stub.restart(name=NAME)
        model, = stub.request("/v1/models")[1]["data"]
        assert model["id"] == stub.request("/server_info")[1]["served_model_name"] == NAME

    @pytest.mark.parametrize("model, task", [
        ("FLUX.1-dev", "T2I"), ("FLUX.2-dev", "TI2I"), ("Qwen-Image", "T2I"), ("Qwen-Image-Edit-2511", "I2I"),
        ("Wan2.1-T2V-1.3B-Diffusers", "T2V"), ("Wan2.2-I2V-A14B-Diffusers", "I2V"), ("Wan2.2-TI2V-5B-Diffusers", "TI2V")])
    def test_what_it_says_it_serves(self, stub, model, task):
        stub.restart(model=model, name=f"qt:{model}@0123456789ab+transformer=a/b")
        status, answer = stub.request("/v1/models")
        one, = answer["data"]
        assert status == 200 and (one["id"], one["task_type"], one["supported_task_types"]) == (
            f"qt:{model}@0123456789ab+transformer=a/b", task, [task])
        info = stub.request("/server_info")[1]
        assert info["version"] == "0.5.23" and info["model_path"].endswith(model) and info["served_model_name"] == one["id"]


class TestLoras:
    def put(self, stub, names: list[str], strengths: list[float], target: Any = "all") -> tuple[int, Any]:
        return stub.request("/v1/set_lora", {"lora_nickname": names, "lora_path": [f"/loras/{name}" for name in names],
                                             "strength": strengths, "target": target})

    def active(self, stub) -> dict[str, Any]:
        status, answer = stub.request("/v1/list_loras")
        assert status == 200
        return answer["active"]

    def names(self, stub) -> dict[str, list[str]]:
        return {module: one["nicknames"] for module, (one,) in self.active(stub).items()}

    def test_what_is_put_replaces_what_was(self, stub):
        assert self.active(stub) == {} and stub.request("/v1/unmerge_lora_weights", {"target": "all"})[0] == 200
        status, answer = self.put(stub, ["qt-a"], [1.0])
        assert status == 200 and answer["status"] == "ok"
        assert self.put(stub, ["qt-b", "qt-c"], [0.5, -0.25])[0] == 200
        assert self.active(stub) == {"transformer": [{
            "nickname": "qt-b,qt-c", "nicknames": ["qt-b", "qt-c"], "path": "/loras/qt-b,/loras/qt-c", "merged": True,
            "mode": "merged", "strength": 0.5, "strengths": [0.5, -0.25]}]}
        assert stub.request("/v1/list_loras")[1]["loaded_adapters"] == [
            {"nickname": name, "path": f"/loras/{name}"} for name in ("qt-a", "qt-b", "qt-c")]
        assert stub.request("/v1/unmerge_lora_weights", {"target": "all"})[0] == 200 and self.active(stub) == {}

    def test_a_transformer_that_the_model_has_not(self, stub):
        status, answer = self.put(stub, ["qt-a"], [1.0], "transformer_2")
        assert status == 200 and answer["status"] == "ok" and self.active(stub) == {}

    def test_of_two_transformers(self, stub):
        """A target takes the place of what its transformers had, even in one request; others keep theirs."""
        stub.restart(model="Wan2.2-T2V-A14B-Diffusers")
        self.put(stub, ["qt-a", "qt-b"], [1.0, 0.5], ["all", "transformer_2"])
        assert self.names(stub) == {"transformer": ["qt-a"], "transformer_2": ["qt-b"]}
        self.put(stub, ["qt-c"], [1.0], "transformer")
        assert self.names(stub) == {"transformer": ["qt-c"], "transformer_2": ["qt-b"]}

    def test_refusals_are_told(self, stub):
        stub.next_loras({"error": "no such file"})
        assert self.put(stub, ["qt-a"], [1.0]) == (500, {"detail": "Failed to set LoRA adapter: no such file"})
        assert "Length mismatch" in self.put(stub, ["qt-a"], [1.0, 2.0])[1]["detail"]
        assert "Invalid target" in self.put(stub, ["qt-a"], [1.0], "vae")[1]["detail"] and self.active(stub) == {}

    def test_ok_that_does_nothing_and_another_client(self, stub):
        stub.next_loras({"nothing": True})
        assert self.put(stub, ["qt-a"], [1.0])[0] == 200 and self.active(stub) == {}
        stub.next({"loras": [{"lora_nickname": "theirs", "lora_path": "/x", "strength": 0.5}]})
        changed, = pictures(generate(stub))
        assert self.active(stub)["transformer"][0]["nickname"] == "theirs"
        stub.request("/v1/unmerge_lora_weights", {})
        plain, = pictures(generate(stub))
        red = [numpy.asarray(one)[..., 0].mean() for one in (changed, plain)]
        assert red[0] < 0.8 * red[1], "the picture shows it"
