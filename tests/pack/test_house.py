"""What holds the house together, beside the contracts of import-linter (`dev.py lint`)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from support.pack import COMFYUI, PACK

pytestmark = pytest.mark.unit

FOLDERS = ("host", "quant", "loaders", "makers", "views", "engines", "routes", "nodes", "commands")
FILES = [path for folder in FOLDERS for path in sorted((PACK / folder).rglob("*.py"))]
# Who may name one format: its codec and those made of it, the kernels that have a matmul for it, ComfyUI's own names, the
# families that write it, its builder with node and command, what SGLang does with it, and the markers of 0.1.
NAMES_NVFP4 = ("host/", "loaders/families/", "quant/kernels/", "quant/codecs/", "quant/packed/", "quant/ggml/", "quant/svdquant/", "quant/convert/nvfp4",
               "quant/layouts/old.py", "engines/sglang/", "makers/builders/", "nodes/build_quantized.py", "nodes/__init__.py",
               "nodes/apply_override.py", "nodes/load_base.py", "nodes/inputs.py", "nodes/nunchaku.py", "commands/build_nvfp4.py", "commands/__init__.py",
               "engines/worker/loaders.py")
REPOS = ("loaders/locate.py", "loaders/files/addresses.py", "views/variants.py")  # published under a name that has it


def words(path: Path) -> set[str]:
    """Names and texts of a file, without its docstrings and comments."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.body[0].value) for node in ast.walk(tree)
                  if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
                  and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found.add(node.value)
        for name in ("id", "attr", "name", "arg", "module"):
            if isinstance(value := getattr(node, name, None), str):
                found.add(value)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACK).as_posix())
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_nvfp4_is_named_where_it_belongs():
    named = [path.relative_to(PACK).as_posix() for path in FILES if any("nvfp4" in word.lower() for word in words(path))]
    assert len(named) > 10
    strangers = [name for name in named if not name.startswith(NAMES_NVFP4) and name not in REPOS]
    assert not strangers


def test_generic_code_asks_no_family_by_name():
    """Rooms above and below the families know them by their registry alone."""
    from quantized_transformers.loaders.families import FAMILIES

    rooms = [path for path in FILES if path.relative_to(PACK).as_posix().startswith(
        ("loaders/assemble", "loaders/plan", "loaders/prepare", "loaders/describe", "loaders/report", "loaders/locate",
         "loaders/files/", "loaders/containers/", "views/", "quant/layouts/", "quant/linear", "quant/multiply", "quant/patches/"))]
    assert len(rooms) > 20
    for path in rooms:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        compared = {value.value for node in ast.walk(tree) if isinstance(node, ast.Compare)
                    for value in (node.left, *node.comparators) if isinstance(value, ast.Constant)}
        assert not compared & set(FAMILIES), path


# What may be missing, beside the extras of pyproject.toml: a report, the doctor or the command (fleet) says so. certifi and hf_xet come with
# huggingface_hub on most systems; without them the system's certificates are taken, and HTTP.
OPTIONAL = {"certifi", "diffusers", "flashinfer", "hf_xet", "lpips", "msgpack", "nunchaku", "ray", "starlette", "torch_npu", "triton"}


def imported(path: Path) -> Iterator[str]:
    """The packages that a file imports anywhere, by name or by a text that import_module gets."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module" \
                and isinstance(name := node.args[0], ast.Constant) and not name.value.startswith("."):
            yield name.value.partition(".")[0]


def test_what_is_imported_is_declared():
    """Every package is this pack's requirement or extra, or one of ComfyUI's, or may be missing. Reading and downloading
    work without ComfyUI (`inspect`), so there, what is not torch or numpy is this pack's own requirement."""
    from dev import requirement

    def required(file: Path) -> set[str]:
        return {requirement(line)[0] for line in file.read_text(encoding="utf-8").splitlines()} - {""}

    project = (PACK / "pyproject.toml").read_text(encoding="utf-8")
    extras = {requirement(line)[0] for line in ast.literal_eval(
        project.partition("[project.optional-dependencies]\nplot = ")[2].partition("]")[0] + "]")}
    own, host = required(PACK / "requirements.txt"), required(COMFYUI / "requirements.txt")
    distributions, found = packages_distributions(), {}
    for path in (*FILES, PACK / "__init__.py", PACK / "__main__.py"):
        for name in imported(path):
            of_the_host = (COMFYUI / name).is_dir() or (COMFYUI / f"{name}.py").is_file()
            if name not in sys.stdlib_module_names and name not in OPTIONAL | {"quantized_transformers"} and not of_the_host:
                found.setdefault(requirement(distributions.get(name, [name])[0])[0], []).append(
                    path.relative_to(PACK).as_posix())
    assert not {name: files for name, files in found.items() if name not in own | extras | host}
    assert own | extras <= set(found), "declared, and not imported"
    alone = {name for name, files in found.items() for file in files if file.startswith(("loaders/files/", "loaders/containers/"))}
    assert {"filelock", "huggingface-hub"} <= alone <= own | {"torch", "numpy"}, alone
