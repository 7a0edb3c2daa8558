"""`python3 dev.py drift PATH_TO_COMFYUI`: what of this pack works on a ComfyUI tree, without running it.

host/contract.py's lines are looked up in the tree's source; comfy-import-guard then looks for what the list does not
have: names of comfy that are gone and calls that no longer bind, anywhere in this repository. Exit code 1 when either
finds something.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PACK = Path(__file__).resolve().parents[1]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Found(NamedTuple):
    """A definition: a module's tree, a class, a function, or anything else that has a name; and the module it is in."""

    module: str
    node: ast.AST


class Tree:
    """The source of a ComfyUI tree, read as far as it is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, ast.Module | None] = {}

    def has_package(self, module: str) -> bool:
        top = self.root / module.split(".")[0]
        return top.is_dir() or top.with_suffix(".py").is_file()

    def module(self, name: str) -> ast.Module | None:
        if name not in self._modules:
            base = self.root.joinpath(*name.split("."))
            path = next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)
            self._modules[name] = ast.parse(path.read_text(encoding="utf-8")) if path else None
        return self._modules[name]

    def lookup(self, module: str, name: str, depth: int = 0) -> Found | None:
        """What a name is in a module, through imports of other modules of the tree."""
        tree = self.module(module)
        if tree is None or depth > 9:
            return None
        for node in statements(tree):
            if isinstance(node, ast.ImportFrom):
                package = self._package(module, node)
                for alias in node.names:
                    if alias.name == "*" or (alias.asname or alias.name) == name:
                        wanted = name if alias.name == "*" else alias.name
                        below = self.module(f"{package}.{wanted}")
                        found = Found(f"{package}.{wanted}", below) if below else self.lookup(package, wanted, depth + 1)
                        if found or alias.name != "*" and not self.has_package(package):
                            return found or Found(module, node)
            elif isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name == name or name in assigned(node):
                return Found(module, node)
        return None

    def _package(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        base = self.root.joinpath(*parts)
        parts = parts[:len(parts) - node.level + (1 if (base / "__init__.py").is_file() else 0)]
        return ".".join((*parts, *([node.module] if node.module else [])))

    def bases(self, found: Found) -> Iterator[Found]:
        """A class and those it is made of, as far as they are in the tree."""
        yield found
        assert isinstance(found.node, ast.ClassDef)
        for base in found.node.bases:
            parts = ast.unparse(base).split(".")
            known = self.lookup(found.module, parts[0]) if len(parts) == 1 else \
                self.lookup(".".join(parts[:-1]), parts[-1])
            if known and isinstance(known.node, ast.ClassDef) and known.node is not found.node:
                yield from self.bases(known)

    def member(self, found: Found, name: str) -> Found | None:
        """What a name is below a definition."""
        if isinstance(found.node, ast.Module):
            return self.lookup(found.module, name)
        if isinstance(found.node, ast.ClassDef):
            for cls in self.bases(found):
                for node in statements(cls.node):
                    if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name == name or name in assigned(node):
                        return Found(cls.module, node)
            return None
        # a value, as the parsed command line: what it has is said somewhere in its module
        text = ast.unparse(self.module(found.module) or found.node)
        return found if name in text or name.replace("_", "-") in text else None


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module or class, those within if, try and with included."""
    for node in getattr(tree, "body", ()):
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from statements(node)
            for more in (*getattr(node, "handlers", ()), ast.Module(getattr(node, "orelse", []), [])):
                yield from statements(more)


def assigned(node: ast.AST) -> set[str]:
    """The names that a statement gives a value, or imports as they are."""
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def made_by(function: ast.AST) -> ast.AST | None:
    """The class that a function defines and returns."""
    classes = {node.name: node for node in ast.walk(function) if isinstance(node, ast.ClassDef)}
    returned = [node.value.id for node in ast.walk(function)
                if isinstance(node, ast.Return) and isinstance(node.value, ast.Name)]
    return next((classes[name] for name in returned if name in classes), None)


def signature(tree: Tree, found: Found) -> inspect.Signature | None:
    """How a function or class is called; None where the source does not say."""
    node, drop = found.node, 0
    if isinstance(node, ast.ClassDef):
        init = tree.member(found, "__init__")
        if init is None:
            return None
        node, drop = init.node, 1
    if not isinstance(node, FUNCTIONS):
        return None
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    drop += "classmethod" in decorators
    kinds, arguments = inspect.Parameter, node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    optional = len(positional) - len(arguments.defaults)
    made = [kinds(a.arg, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if i < optional else None)
            for i, a in enumerate(positional)][drop:]
    if arguments.vararg:
        made.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    made += [kinds(a.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None)
             for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        made.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(made)


def problem(tree: Tree, touch: Any, binds: Any) -> str:
    """What the tree lacks of a line of the contract; empty when nothing, or when its package is no part of the tree."""
    if not tree.has_package(touch.module):
        return ""
    module = tree.module(touch.module)
    if module is None:
        return touch.module
    found: Found | None = Found(touch.module, module)
    if touch.maker:
        found = tree.member(found, touch.maker)
        made = made_by(found.node) if found else None
        found = Found(touch.module, made) if made else None
    for name in touch.path:
        found = tree.member(found, name) if found else None
    if found is None:
        return touch.name
    if touch.attribute:
        used = isinstance(found.node, ast.ClassDef) and any(
            isinstance(node, ast.Attribute) and node.attr == touch.attribute
            for cls in tree.bases(found) for node in ast.walk(cls.node))
        return "" if used or tree.member(found, touch.attribute) else touch.name
    known = signature(tree, found) if touch.call else None
    return "" if known is None or binds(known, touch.call) else f"{touch.name} (called otherwise)"


def lacks(root: Path) -> dict[str, str]:
    """Feature -> one sentence, or "" where the tree has all that it needs."""
    from quantized_transformers.host import touches
    from quantized_transformers.host.contract import FEATURES

    tree, sentences = Tree(root), {}
    for feature, contract in FEATURES.items():
        needed = [touch for touch in map(touches.parse, contract.touches) if not touch.optional]
        missing = [what for touch in needed if (what := problem(tree, touch, touches.binds))]
        sentences[feature] = f"lacks {', '.join(missing)}: {contract.stops}" if missing else ""
    return sentences


def guard(root: Path) -> tuple[int, str]:
    """comfy-import-guard's exit code and what it says of this repository on the tree, which it reads as a commit."""
    with tempfile.TemporaryDirectory() as temp:
        clone, install = Path(temp) / "ComfyUI", Path(temp) / "install" / "custom_nodes"
        install.mkdir(parents=True)
        (install / PACK.name).symlink_to(PACK, target_is_directory=True)
        who = {f"GIT_{role}_{what}": "drift@localhost" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        python = sorted(str(path.relative_to(root)) for folder in ("comfy", "comfy_api", "comfy_execution", "utils")
                        for path in (root / folder).rglob("*.py")) + sorted(path.name for path in root.glob("*.py"))
        for arguments in (["init", "-q", str(clone)], ["-C", str(clone), "config", "core.worktree", str(root)],
                          ["-C", str(clone), "add", "-f", "--pathspec-from-file=-"],
                          ["-C", str(clone), "commit", "-qm", "tree"]):
            subprocess.run(["git", *arguments], check=True, env={**os.environ, **who}, text=True, cwd=root,
                           input="\n".join(python) if "add" in arguments else None)
        done = subprocess.run([sys.executable, "-m", "comfy_import_guard.cli", "--offline", "--quiet", "--cache-dir", temp,
                               "check", "--comfy-dir", str(Path(temp) / "install"), "--no-update", "--target", "HEAD"],
                              capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr


def import_pack() -> None:
    """The pack as a package, without its node entry point (which needs ComfyUI)."""
    if "quantized_transformers" not in sys.modules:
        spec = importlib.util.spec_from_file_location("qt_command_line", PACK / "__main__.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.import_pack()


def main() -> int:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "comfy").is_dir():
        print("usage: python3 dev.py drift PATH_TO_COMFYUI (a folder that holds comfy/)")
        return 2
    import_pack()
    root = Path(sys.argv[1]).resolve()
    sentences = lacks(root)
    width = max(map(len, sentences))
    for feature, sentence in sentences.items():
        print(f"{feature:{width}}  {sentence or 'all there'}")
    code, said = guard(root)
    print(said.strip())
    return 1 if code or any(sentences.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
