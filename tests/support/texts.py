"""The sentences of the code and their translations, found by reading the code: `python3 tests/support/texts.py` lists
what is missing, what nothing says any more, and what is said without Text."""

from __future__ import annotations

import ast
import json
import re
import string
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
ROOMS = ("engines", "host", "loaders", "makers", "nodes", "quant", "routes", "views")
LANGUAGES = tuple(sorted(path.name for path in (PACK / "locales").iterdir() if path.name != "en"))
# Words that only English bends: another language may leave their placeholders out.
BENT = re.compile(r"s\d*")
# What is no sentence for a user, or is one of ComfyUI's own catalogues (locales/zh/nodeDefs.json).
NOT_SAID = ("help", "tooltip", "description", "search_aliases", "display_name", "epilog", "category", "options", "default")
NOT_READ = ("lacking", "needs", "require", "startswith", "endswith", "partition", "removeprefix", "split", "get",
            "compile", "fullmatch", "match", "search", "sub", "replace", "or_exact", "find", "import_module", "getattr")
LOGS = ("logger", "logging")
# Of the contract only what does not work is said, and that is Text; the others draw with fonts that know no Chinese, or
# are pages of the command `bench`, which speaks English as all commands' own words do.
ENGLISH = ("host/__init__.py", "host/texts.py", "host/contract.py", "makers/compare/plot.py", "views/bench_page.py")


def files() -> Iterator[tuple[str, Path]]:
    """(catalogue, file) of every module: "quant" for those of the folder itself, "quant-kernels" for one below."""
    for room in ROOMS:
        for path in sorted((PACK / room).rglob("*.py")):
            yield "-".join(path.relative_to(PACK).parts[:-1][:2]), path


def fields(template: str) -> list[str]:
    """The placeholders of a template."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def needs_words(template: str) -> bool:
    """Whether a template has words of its own, or only puts others together."""
    return bool(re.search(r"[A-Za-z]{2}", re.sub(r"\{[^{}]*\}", "", template)))


def templates() -> dict[str, dict[str, list[str]]]:
    """Catalogue -> template -> where it is said. Raises ValueError for a Text whose template is no literal."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for catalogue, path in files():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Text":
                where = f"{path.relative_to(PACK)}:{node.lineno}"
                if not (len(node.args) == 1 and isinstance(node.args[0], ast.Constant)):
                    if path.name == "texts.py":  # which puts others together
                        continue
                    raise ValueError(f"{where}: the template of a Text must be a literal")
                template = node.args[0].value
                given = [keyword.arg for keyword in node.keywords]
                if None not in given and (set(given) != set(fields(template)) or len(given) != len(set(given))):
                    raise ValueError(f"{where}: {template!r} is filled with {given}")
                if needs_words(template):
                    found[catalogue][template].append(where)
    return found


def catalogue(language: str, name: str) -> dict[str, str]:
    """A catalogue of a language; empty where there is none."""
    path = PACK / "locales" / language / "messages" / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def untold() -> Iterator[tuple[str, str]]:
    """(where, what) of every sentence that a user may read and that is no Text."""
    for _, path in files():
        if path.relative_to(PACK).as_posix() not in ENGLISH:
            yield from _untold(ast.parse(path.read_text("utf-8")), str(path.relative_to(PACK)))


def _untold(node: ast.AST, file: str) -> Iterator[tuple[str, str]]:
    text = _literal(node)
    if text is not None:
        if _is_sentence(text):
            yield f"{file}:{node.lineno}", text
        return
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        of = getattr(getattr(node.func, "value", None), "id", "")
        if name not in NOT_READ and of not in LOGS:
            for one in (node.func, *(() if name == "Text" else node.args),
                        *(keyword.value for keyword in node.keywords if keyword.arg not in NOT_SAID)):
                yield from _untold(one, file)
        return
    if isinstance(node, ast.Compare):
        return
    body = getattr(node, "body", None)
    documented = isinstance(body, list) and body and isinstance(body[0], ast.Expr) \
        and isinstance(body[0].value, ast.Constant)
    for one in ast.iter_child_nodes(node):
        if not (documented and one is body[0]):
            yield from _untold(one, file)


def _literal(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def _is_sentence(text: str) -> bool:
    if re.search(r"\(\?|\[-_", text):  # a regular expression
        return False
    return len(re.findall(r"(?<![\w.])[a-z]{2,}(?![\w.])", text)) >= 2 and " " in text.strip()


def main() -> None:
    """Print what is to be done."""
    said = templates()
    for language in LANGUAGES:
        for name in sorted({*said, *(path.stem for path in (PACK / "locales" / language / "messages").glob("*.json"))}):
            there = catalogue(language, name)
            for template, places in said.get(name, {}).items():
                if template not in there:
                    print(f"{language} {name} lacks {template!r} ({places[0]})")
            for template in there:
                if template not in said.get(name, {}):
                    print(f"{language} {name} has {template!r}, which nothing says")
    for where, text in untold():
        print(f"no Text: {where}: {text!r}")


if __name__ == "__main__":
    main()
