"""The documents say what is true: links, quoted messages, formats and nodes that exist."""

from __future__ import annotations

import re
import subprocess

import pytest

from support.pack import FOLDERS, PACK

pytestmark = pytest.mark.unit

PAGES = [PACK / "README.md", PACK / "CONTRIBUTING.md", *sorted((PACK / "docs").rglob("*.md"))]


def source() -> str:
    """All string literals of the pack's messages, adjacent ones joined and placeholders cut to one space."""
    text = "\n".join(path.read_text(encoding="utf-8") for folder in FOLDERS
                     for path in sorted((PACK / folder).rglob("*.py")))
    joined = re.sub(r"""["']\s*\n\s*(?:\+ )?f?["']""", "", text)
    return re.sub(r"\{[^{}]*\}", " ", joined)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PACK).as_posix())
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PACK).as_posix())
def test_named_files_exist(page):
    """Paths of this repository in back quotes; <...> stands for a name, * for any, and folders end with a slash."""
    tops = {path.name for path in PACK.iterdir()} - {"output"}
    for name in re.findall(r"`([\w./*<>-]+)`", page.read_text(encoding="utf-8")):
        if "/" in name and name.split("/")[0] in tops and "<" not in name and not name.startswith("loaders/quantized"):
            assert any(PACK.glob(name.rstrip("/"))), name


def test_quoted_messages_are_the_programs():
    text = (PACK / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [line[4:] for line in text.splitlines() if line.startswith("### ") and line[4].islower() or "..." in line
                and line.startswith("### ")]
    assert len(messages) > 15
    words = source()
    missing = [part for message in messages for part in map(str.strip, message.split("..."))
               if len(part) > 3 and part.strip("(), ") not in words]
    assert not missing


def test_every_format_has_a_page():
    from quantized_transformers.quant.ascend.schemes import SCHEMES
    from quantized_transformers.quant.formats import formats
    from quantized_transformers.quant.host_formats import NAMES

    pages = " ".join(path.read_text(encoding="utf-8") for path in (PACK / "docs" / "formats").glob("*.md")).lower()
    own = {"BF16": "bf16"}
    for name in [own.get(fmt.name, fmt.name) for fmt in formats()] + [name for name in SCHEMES if name != "FLOAT"] \
            + list(NAMES):
        assert name.lower() in pages, name


def test_every_node_has_help():
    from quantized_transformers.nodes import NODES

    for name in [name for names in NODES.values() for name in names]:
        assert (PACK / "web" / "docs" / f"{name}.md").is_file(), name
        assert (PACK / "web" / "docs" / name / "zh.md").is_file(), name


def test_what_a_windows_console_cannot_print_is_in_no_python_file():
    """Reports go to consoles in code page 1252; comfy-test asks for the same."""
    for folder in (*FOLDERS, "."):
        for path in (PACK / folder).rglob("*.py") if folder != "." else PACK.glob("*.py"):
            path.read_text(encoding="utf-8").encode("cp1252")


def test_comments_cite_what_is_in_the_repository():
    """A page under docs/ and, in quotes behind a comma, its headings; nothing of a folder outside."""
    if not (PACK / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are the repository's")
    files = subprocess.run(["git", "-C", str(PACK), "ls-files", "-z"], capture_output=True, text=True, check=True,
                           encoding="utf-8").stdout.split("\0")
    outside, wrong, cited = "specs" + "/", [], 0
    for name in filter(None, files):
        try:
            text = (PACK / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        if outside in text:
            wrong.append((name, outside))
        if not name.endswith(".py"):
            continue
        for page, quoted in re.findall(r"""(?<![\w/])(docs/[\w./-]+\.md)((?:(?:,|\s+and)[\s#]+"[^"]+")*)""", text):
            cited += 1
            if not (PACK / page).is_file():
                wrong.append((name, page))
                continue
            headings = re.findall(r"^#+ (.+)$", (PACK / page).read_text(encoding="utf-8"), re.MULTILINE)
            wrong += [(name, page, heading) for heading in re.findall(r'"([^"]+)"', quoted)
                      if re.sub(r"\s*\n[\s#]*", " ", heading) not in headings]
    assert not wrong
    assert cited > 50
