"""What SGLang's routes of videos answer, without a model, and the one that gives pictures and videos without loss."""

from __future__ import annotations

import io
import json
import subprocess

import pytest
import requests

from support import sglang
from support.sglang_stub.asking import COLOURS, FILM, film, follow, png

pytestmark = pytest.mark.server


class TestVideos:
    def test_a_job_from_its_queue_to_its_file(self, stub):
        import av

        stub.restart(model="Wan2.2-T2V-A14B-Diffusers", name="qt:wan")
        stub.next({"delay": 1.2, "steps": 4})
        job = film(stub, "in_progress")
        assert (job["object"], job["model"], job["size"], job["error"]) == ("video", "qt:wan", "64x48", None)
        assert stub.request(f"/v1/videos/{job['id']}/content") == (404, {"detail": "Generation is still in-progress"})
        told = []
        while job["status"] == "in_progress":
            told.append(job["progress"])
            job = stub.request(f"/v1/videos/{job['id']}")[1]
        assert sorted(told) == told and {25, 50, 75} < set(told) <= {0, 25, 50, 75, 99}
        assert (job["status"], job["progress"], job["num_outputs"], job["inference_time_s"]) == ("completed", 100, 1, 1.2)
        answer = requests.get(f"{stub.url}/v1/videos/{job['id']}/content", timeout=30)
        assert answer.headers["content-type"] == "video/mp4"
        with av.open(io.BytesIO(answer.content)) as opened:
            stream = opened.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in opened.decode(stream)]
            assert stream.average_rate == 8 and stream.codec_context.name == "h264"
        assert [frame.shape for frame in frames] == 5 * [(48, 64, 3)] and frames[0].mean() < frames[4].mean()

    def test_progress_without_steps(self, stub):
        """As with diffusers' backend."""
        stub.restart(model="Wan2.1-T2V-1.3B-Diffusers")
        stub.next({"hold": True, "steps": 0})
        job = film(stub, "in_progress")
        assert job["progress"] == 0
        stub.told(release=True)
        assert follow(stub, job["id"], "completed")["progress"] == 100

    def test_a_job_that_fails(self, stub):
        stub.restart(model="Wan2.1-T2V-1.3B-Diffusers")
        stub.next({"error": "height must be divisible by 16"})
        job = film(stub, "failed")
        assert job["error"] == {"message": "Model generation failed. Error from scheduler: height must be divisible by 16"}
        assert stub.request(f"/v1/videos/{job['id']}/content")[0] == 404

    def test_without_an_output_folder(self, stub):
        stub.restart(model="Wan2.1-T2V-1.3B-Diffusers", keep=False)
        assert "no output_path is configured" in film(stub, "failed")["error"]["message"]

    def test_a_deleted_job_runs_on(self, stub):
        stub.restart(model="Wan2.1-T2V-1.3B-Diffusers")
        stub.next({"hold": True})
        job = film(stub, "in_progress")
        answer = requests.delete(f"{stub.url}/v1/videos/{job['id']}", timeout=30)
        assert answer.status_code == 200 and answer.json()["status"] == "deleted"
        assert stub.request(f"/v1/videos/{job['id']}") == (404, {"detail": "Video not found"})
        with pytest.raises(requests.Timeout):  # it holds the workers up
            requests.get(f"{stub.url}/v1/list_loras", timeout=0.5)

    def test_a_restart_forgets_jobs(self, stub):
        stub.restart(model="Wan2.1-T2V-1.3B-Diffusers")
        stub.next({"hold": True})
        job = film(stub, "in_progress")
        stub.restart(model="Wan2.1-T2V-1.3B-Diffusers")
        assert stub.request(f"/v1/videos/{job['id']}") == (404, {"detail": "Video not found"})

    def test_a_first_frame_and_a_clip(self, stub):
        stub.restart(model="Wan2.2-I2V-A14B-Diffusers")
        answer = requests.post(f"{stub.url}/v1/videos", data=FILM, timeout=30,
                               files=[("input_reference", ("0.png", png(COLOURS[1]), "image/png"))])
        assert answer.status_code == 200, answer.text
        follow(stub, answer.json()["id"], "completed")
        drawn, = stub.drawn
        assert drawn["images"] == [{"size": [32, 24], "mean": list(map(float, COLOURS[1]))}]
        answer = requests.post(f"{stub.url}/v1/videos", data=FILM, timeout=30)
        assert answer.status_code == 400, "a model that needs one"


@pytest.mark.parametrize("model, shape, dtype", [("FLUX.1-dev", [3, 48, 64], "bfloat16"),
                                                 ("Wan2.1-T2V-1.3B-Diffusers", [3, 5, 48, 64], "float32")])
def test_pictures_without_loss(stub, model, shape, dtype):
    stub.restart(model=model)
    body = {"prompt": "a cat", "width": 64, "height": 48, "num_frames": shape[1] if len(shape) == 4 else 1, "seed": 7,
            "num_inference_steps": 4, "generator_device": "cpu", "rollout": False}
    answer = requests.post(f"{stub.url}/rollout/generate", json=body, timeout=30)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/msgpack"), answer.text
    unpacked = subprocess.run(
        [str(sglang.program("python")), "-c", "import json, msgspec, sys; from safetensors.torch import load\n"
         "one, = msgspec.msgpack.decode(sys.stdin.buffer.read()); made = one['generated_output']\n"
         "print(json.dumps([made['__tensor__'], made['shape'], made['dtype'], list(load(made['data'])['t'].shape)]))"],
        input=answer.content, capture_output=True, check=True).stdout
    assert json.loads(unpacked) == [True, shape, f"torch.{dtype}", shape]
    stub.next({"error": "out of memory"})
    answer = requests.post(f"{stub.url}/rollout/generate", json=body, timeout=30)
    assert (answer.status_code, answer.json()) == (500, {"detail": "out of memory"}), "unlike the other routes"
