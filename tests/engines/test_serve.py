"""`serve`: the nine validated rows and others as commands, and what it refuses. Pipelines and overrides are those of the example
workflows in small, made by the real tools, laid out as the Hugging Face cache has them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantized_transformers.engines.sglang import flags, installed, known
from quantized_transformers.engines.sglang.checks import REFUSED, WARNING
from quantized_transformers.engines.sglang.client import State
from quantized_transformers.engines.sglang.flags import Request, command
from quantized_transformers.engines.sglang.identity import parse
from quantized_transformers.engines.sglang.installed import GPU, Installed
from quantized_transformers.engines.sglang.layout import Layout
from quantized_transformers.engines.sglang.wanted import wanted
from quantized_transformers.loaders.errors import CheckpointError
from support import bases
from support.pack import PACK

pytestmark = pytest.mark.host
FLUX1, WAN = "black-forest-labs/FLUX.1-dev", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
FP8, NVFP4 = "lmsys/flux1-dev-modelopt-fp8-sglang-transformer", "lmsys/flux1-dev-modelopt-nvfp4-sglang-transformer"
FLUX2_FP8 = "lmsys/flux2-dev-modelopt-fp8-sglang-transformer"
B200 = GPU("B200", (10, 0), 180 << 30)
MACHINE = Installed("/opt/sglang/bin/sglang", known.VERSION, "2.14.1", "0.6", "", False, False, (B200,) * 8)
WORKFLOWS = {"flux.1": "flux1_dev_svdq", "flux1": "flux1_dev_svdq", "flux.2": "flux2_dev", "flux2": "flux2_dev", "wan": "wan22",
             "hunyuan": "hunyuanvideo", "qwen": "qwen_image"}


def commit(repo: str) -> str:
    return hashlib.sha1(repo.encode()).hexdigest()


class Hub:
    """A Hugging Face cache that gets what is asked for. Rows other than FLUX.1's and FLUX.2's take long to make."""

    def __init__(self, made: Path, cache: Path) -> None:
        self.bases, self.cache = bases.Bases(made), cache

    def __call__(self, repo: str) -> str:
        """Where a repo's files are."""
        place = self.cache / f"models--{repo.replace('/', '--')}"
        if not place.is_dir():
            self.bases.place(next(workflow for word, workflow in WORKFLOWS.items() if word in repo.lower()))
            for folder in sorted(self.bases.models.glob("*/*")):
                self._put(folder, f"{folder.parent.name}/{folder.name}")
        return str(place / "snapshots" / commit(repo))

    def _put(self, folder: Path, repo: str) -> None:
        place = self.cache / f"models--{repo.replace('/', '--')}"
        if not place.is_dir():
            (place / "refs").mkdir(parents=True)
            (place / "refs" / "main").write_text(commit(repo))
            (place / "snapshots").mkdir()
            shutil.copytree(folder, place / "snapshots" / commit(repo))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return Hub(tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("hub"))


@pytest.fixture(autouse=True)
def here(hub, monkeypatch):
    from huggingface_hub import constants

    hub(FLUX1)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setattr(flags, "find", lambda given: MACHINE)


@pytest.fixture
def on(monkeypatch):
    """On a machine with another installation."""
    return lambda found: monkeypatch.setattr(flags, "find", lambda given: found)


def options(argv: list[str]) -> dict[str, str]:
    """Flag -> value."""
    assert argv[:2] == [MACHINE.command, "serve"]
    return dict(zip(argv[2::2], argv[3::2], strict=True))


def problems(found, level=REFUSED) -> list[str]:
    return [check.what for check in found.checks if check.level == level]


@pytest.mark.parametrize("base, override", [pytest.param(*row, marks=() if "flux" in row[0].lower() else pytest.mark.full)
                                            for row in sorted(known.VALIDATED)])
def test_the_nine_rows(hub, base, override):
    hub(base)
    found = command(Request(base, override))
    given = options(found.argv)
    raw = "FLUX.2-dev-NVFP4" in override
    assert given["--model-path"] == hub(base) and given["--model-id"] == base.rpartition("/")[2]
    flag = "--transformer-weights-path" if raw else "--transformer-path"
    assert {name: value for name, value in given.items() if name.startswith("--transformer")}.keys() == {flag}
    assert given[flag] == hub(override) + ("/flux2-dev-nvfp4.safetensors" if raw else ""), "not the -mixed file"
    name = given["--served-model-name"]
    assert name == str(found.identity) == f"qt:{base}@{commit(base)[:12]}+transformer={found.identity.overrides[0][1]}"
    assert found.identity.overrides[0][1].name.startswith(override) and found.identity.overrides[0][1].mark == commit(override)[:12]
    assert parse(name) == found.identity
    served = State(name, found.identity, known.VERSION, 1, ())
    for wanted_ in (wanted("", base, override), wanted("", base, override, check="base only")):
        assert wanted_.verify(served, "") and wanted_.verify(served, "")[0].count(base), "the nodes want what serve starts"
    with pytest.raises(CheckpointError, match="the server serves"):
        wanted("", base).verify(served, "")
    assert (given["--host"], given["--port"], given["--strict-ports"]) == ("127.0.0.1", "30000", "true")
    assert given["--input-save-path"] == "" and (given["--output-path"] == "") == (base not in (WAN, "hunyuanvideo-community/HunyuanVideo"))
    assert found.env["HF_HUB_OFFLINE"] == "1" and (known.FP4_BACKEND in found.env) == ("wan22" in override and "nvfp4" in override)
    assert not found.refused and any("validated by SGLang's makers" in what and "not" not in what for what in problems(found, "note"))


@pytest.mark.full
def test_both_experts_of_wan(hub):
    hub(WAN)
    fp8, nvfp4 = (f"lmsys/wan22-t2v-a14b-modelopt-{kind}-sglang-transformer" for kind in ("fp8", "nvfp4"))
    found = command(Request(WAN, fp8, override_2=nvfp4))
    given = options(found.argv)
    assert given["--transformer-path"] == hub(fp8) and given["--transformer-2-path"] == hub(nvfp4)
    assert [role for role, _ in found.identity.overrides] == ["transformer", "transformer_2"]


def test_quantized_weights_given_as_the_base_are_its_override(hub):
    """FLUX.2-dev-NVFP4 names a base of its own: SGLang would take the folder, and serve what it finds in it."""
    raw = "black-forest-labs/FLUX.2-dev-NVFP4"
    hub(raw)
    found = command(Request(raw))
    assert found.identity.base.name == "black-forest-labs/FLUX.2-dev" and found.identity.overrides[0][1].name.startswith(raw)
    assert wanted("", raw).verify(State(str(found.identity), found.identity, "", 1, ()), "")


@pytest.fixture(scope="module")
def svdq(hub, tmp_path_factory) -> tuple[str, str]:
    """(a base, its SVDQuant transformer), both of one block a kind."""
    base = tmp_path_factory.mktemp("svdq") / "FLUX.1-dev"
    shutil.copytree(hub(FLUX1), base)
    config = json.loads((base / "transformer" / "config.json").read_text())
    (base / "transformer" / "config.json").write_text(json.dumps({**config, "num_layers": 1, "num_single_layers": 1}))
    return str(base), str(next(hub.cache.rglob("svdq-int4_r*flux*.safetensors")))


def test_svdq_by_its_file_name(svdq, on):
    ada = MACHINE._replace(gpus=(GPU("RTX 4090", (8, 9), 24 << 30),), nunchaku="1.2", engine=True)
    on(ada)
    found = command(Request(*svdq))
    assert options(found.argv)["--transformer-weights-path"] == svdq[1] and not found.refused


def test_degrees_ports_and_offload_become_flags():
    given = options(command(Request(FLUX1, FP8, layout=Layout(8, 2, 2, 2, 0, 1), offload="layerwise", port=31000)).argv)
    assert given["--num-gpus"] == "8" and given["--tp-size"] == "2" and given["--dit-layerwise-offload"] == "true"
    ports = [int(given[name]) for name in ("--port", "--scheduler-port", "--master-port")]
    assert ports[0] == 31000 and len({*ports, 31001}) == 4
    copies = options(command(Request(FLUX1, FP8, layout=Layout(4, data=4))).argv)
    first, master = int(copies["--scheduler-port"]), int(copies["--master-port"])
    assert not first <= master < first + 4


def test_a_lora_is_part_of_the_name(hub, tmp_path):
    from safetensors.torch import save_file

    from support import flux

    pair = {"transformer.x_embedder.lora_A.weight": flux.make().x_embedder.weight[:4].contiguous()}
    save_file(pair, str(tmp_path / "style.safetensors"))
    found = command(Request(FLUX1, FP8, loras=((str(tmp_path / "style.safetensors"), 0.8),)))
    given = options(found.argv)
    assert given["--lora-path"] == str(tmp_path / "style.safetensors") and given["--lora-scale"] == "0.8"
    mark = found.identity.loras[0][0].mark
    assert str(found.identity).endswith(f"+lora=style.safetensors@{mark}*0.8") and given["--lora-nickname"] == f"qt-{mark}"


def test_sglangs_own_arguments_come_last():
    assert command(Request(FLUX1, FP8, more=("--warmup-mode", "off"))).argv[-2:] == ["--warmup-mode", "off"]


@pytest.mark.parametrize("more, flag", [
    (("--transformr-path", "/x"), "--transformr-path"), (("--transformer-path=/x",), "--transformer-path"), (("--vae-path", "/x"), "--vae-path"),
    (("--transformer-2-weights-path", "/x"), "--transformer-2-weights-path"), (("--component-paths.transformer", "/x"), "--component-paths.transformer"),
    (("--host", "0.0.0.0"), "--host"), (("--served-model-name=x",), "--served-model-name"), (("--num_gpus", "4"), "--num-gpus"),
    (("--lora-path", "/x"), "--lora-path"), (("--quantization", "fp8"), "--quantization"), (("--config", "x.yaml"), "--config"),
    (("--served-mod=x",), "--served-mod"), (("--transformer-quantization", "fp8"), "--transformer-quantization")])
def test_what_would_undo_the_name_is_refused(more, flag):
    found = command(Request(FLUX1, FP8, more=more))
    assert found.refused and [what for what in problems(found) if what.startswith(flag)]


@pytest.mark.parametrize("request_, word", [
    (Request(FLUX1, FP8, host="10.0.0.5"), "opens the socket of SGLang's scheduler"), (Request(FLUX1, FP8, port=65500), "leaves no room"),
    (Request(FLUX1, FP8, layout=Layout(4, ulysses=3)), "does not divide"), (Request(FLUX1, FP8, layout=Layout(2, cfg=2)), "has one"),
    (Request(FLUX1, FP8, layout=Layout(16)), "sees 8")])
def test_what_the_server_would_run_wrong_is_refused(request_, word):
    found = command(request_)
    assert found.refused and any(word in what for what in problems(found)), found.checks


@pytest.mark.parametrize("override, card, word", [
    (NVFP4, GPU("H100", (9, 0), 80 << 30), "NVFP4 on SM 10.0"), (FP8, None, "sees none")])
def test_cards_that_do_not_run_it(override, card, word, on):
    on(MACHINE._replace(gpus=(card,) if card else ()))
    assert any(word in what for what in problems(command(Request(FLUX1, override))))


@pytest.mark.parametrize("change, word", [
    ({"gpus": (GPU("H100", (9, 0), 80 << 30),)}, "SM 8.x and 12.x"), ({"nunchaku": "0.16", "engine": False}, "a statistics library"),
    ({"nunchaku": "", "engine": False}, "not installed")])
def test_svdq_needs_its_engine_and_cards(svdq, change, word, on):
    fits = MACHINE._replace(gpus=(GPU("RTX 5090", (12, 0), 32 << 30),), nunchaku="1.2", engine=True)
    on(fits._replace(**change))
    assert any(word in what for what in problems(command(Request(*svdq))))


@pytest.mark.parametrize("layout, offload, warned", [
    (Layout(2), "auto", True), (Layout(2), "layerwise", False), (Layout(), "auto", False), (Layout(), "none", True),
    (Layout(2, tensor=2), "none", False)])
def test_weights_that_one_card_does_not_hold(on, layout, offload, warned):
    on(MACHINE._replace(gpus=(GPU("tiny", (10, 0), 1000),) * 2))
    said = problems(command(Request(FLUX1, FP8, layout=layout, offload=offload)), WARNING)
    assert any("GB on each GPU" in what for what in said) is warned


@pytest.mark.full
def test_warnings(hub, on):
    hub(WAN)
    on(MACHINE._replace(sglang="0.5.30"))
    found = command(Request(WAN, layout=Layout(2, cfg=2), host="0.0.0.0"))
    said = problems(found, WARNING)
    assert not found.refused and any("0.5.30" in what for what in said) and any("CFG 1" in what for what in said)
    assert any("asks for no password" in what for what in said)


def test_nvfp4_files_without_some_activation_scales_are_refused(hub, tmp_path):
    """SGLang fills 1.0 (its pull request 23625): the published '-mixed' file of FLUX.2 is such a one."""
    mixed = "flux2-dev-nvfp4-mixed.safetensors"
    shutil.copy(Path(hub("black-forest-labs/FLUX.2-dev-NVFP4"), mixed), tmp_path / mixed)
    found = command(Request("black-forest-labs/FLUX.2-dev", str(tmp_path / mixed)))
    assert found.refused and any("takes 1.0" in what and mixed in what for what in problems(found))
    named = command(Request("black-forest-labs/FLUX.2-dev", "black-forest-labs/FLUX.2-dev-NVFP4", weights_name=mixed))
    assert named.refused


@pytest.mark.parametrize("request_, word", [
    (Request(FLUX1, FLUX2_FP8), "FLUX.2"), (Request(FLUX1, override_2=FP8), "has no transformer_2"),
    (Request("nobody/nothing"), "not on this machine"), (Request(FP8), "no diffusers pipeline"), (Request(FLUX1, "nobody/nothing"), "not on this machine")])
def test_references_that_do_not_fit(hub, request_, word):
    hub(FLUX2_FP8)
    with pytest.raises(CheckpointError, match=word):
        command(request_)


def test_a_pipeline_that_lacks_a_component_is_not_served(hub, tmp_path):
    shutil.copytree(hub(FLUX1), tmp_path / "FLUX.1-dev")
    shutil.rmtree(tmp_path / "FLUX.1-dev" / "vae")
    with pytest.raises(CheckpointError, match="vae"):
        command(Request(str(tmp_path / "FLUX.1-dev")))


def test_a_local_copy_goes_by_its_content(hub, tmp_path):
    shutil.copytree(hub(FLUX1), tmp_path / "mine")
    found = command(Request(str(tmp_path / "mine"), FP8))
    assert found.identity.base.name == "mine" and options(found.argv)["--model-id"] == "FLUX.1-dev"
    (tmp_path / "mine" / "README.md").write_text("more")
    assert command(Request(str(tmp_path / "mine"), FP8)).identity == found.identity
    config = json.loads((tmp_path / "mine" / "vae" / "config.json").read_text())
    (tmp_path / "mine" / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    assert command(Request(str(tmp_path / "mine"), FP8)).identity != found.identity


def serve(hub, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    import os

    return subprocess.run([sys.executable, str(PACK), "serve", *map(str, arguments)], capture_output=True, text=True, check=False,
                          env={**os.environ, "HF_HUB_CACHE": str(hub.cache), "PATH": "/usr/bin:/bin", **(env or {})})


def test_the_command_prints_what_it_would_run(hub):
    done = serve(hub, FLUX1, "--override", FP8, "--gpus", 2, "--", "--warmup-mode", "off")
    assert done.returncode == 0, done.stderr
    line = done.stdout.strip().splitlines()[-1]
    assert line.startswith("HF_HUB_OFFLINE=1 sglang serve --model-path ") and line.endswith("--warmup-mode off")
    assert "there is no sglang on this machine" in done.stdout
    told = json.loads(serve(hub, FLUX1, "--override", FP8, "--json").stdout)
    assert told["identity"].startswith(f"qt:{FLUX1}@") and told["argv"][0] == "sglang" and told["env"]["HF_HUB_OFFLINE"] == "1"


def test_the_command_does_not_run_what_it_refuses(hub, tmp_path):
    """A program of sglang's name leaves a mark when it runs."""
    program, mark = tmp_path / "sglang", tmp_path / "ran"
    program.write_text(f"#!{sys.executable}\nimport json, os, sys\n"
                       f"open({str(mark)!r}, 'w').write(json.dumps([sys.argv[1:], os.environ['HF_HUB_OFFLINE']]))\n")
    program.chmod(0o755)
    given = (FLUX1, "--sglang", program, "--run", "--port", 31234)
    done = serve(hub, *given, "--", "--transformr-path", "/x")
    assert done.returncode == 1 and not mark.exists() and "--transformr-path behind --" in done.stdout
    refused = serve(hub, *given)
    assert refused.returncode == 1 and not mark.exists() and "a Python without SGLang" in refused.stdout


def test_an_installation_is_asked_by_its_own_python(tmp_path):
    """This Python has no SGLang, and says so; a script's first line says which it is."""
    program = tmp_path / "sglang"
    program.write_text(f"#!{sys.executable}\n")
    program.chmod(0o755)
    found = installed.find(str(program))
    assert found is not None and found.command == str(program) and found.sglang == "" and found.torch and found.gpus == ()
    with pytest.raises(CheckpointError, match="no such command"):
        installed.find(str(tmp_path / "gone"))


def test_what_is_missing_is_fetched_on_consent_and_whole(hub, tmp_path):
    """From a local hub, into an empty cache: all of the base but what nobody reads, and the override. The commits are the names."""
    from support.hub import COMMIT, FakeRepo
    from support.hub import Hub as Server

    base = FakeRepo.of(Path(hub(FLUX1)))
    base.files["README.md"] = b"about"
    with Server({FLUX1: base, FP8: FakeRepo.of(Path(hub(FP8)))}) as server:
        env = {"HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        asked = serve(hub, FLUX1, "--override", FP8, env=env)
        assert asked.returncode == 1 and "is not on this machine" in asked.stderr and not server.log
        done = serve(hub, FLUX1, "--override", FP8, "--download", "--json", env=env)
        assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["identity"] == f"qt:{FLUX1}@{COMMIT[:12]}+transformer={FP8}@{COMMIT[:12]}"
    folder = Path(told["argv"][told["argv"].index("--model-path") + 1])
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == set(base.files) - {"README.md"} and folder.is_relative_to(tmp_path)
    again = serve(hub, FLUX1, "--override", FP8, "--json", env={**env, "HF_ENDPOINT": "http://127.0.0.1:1"})
    assert json.loads(again.stdout) == told
