"""What downloads need of a hub: its list of a repo's files, their bytes, and its own words for what goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import SplitResult

from ...errors import CheckpointError
from ..hub_file import HashedFile, RemoteFile
from ..stores import Store
from .http import Step


@dataclass(frozen=True)
class Listing:
    """A repo at one commit: its files by name, and whether its licence must be accepted."""

    commit: str
    files: dict[str, RemoteFile]
    gated: bool


class Hub(Protocol):
    """A hub, as a module of this package.

    `KEY` names it in references and folders ("huggingface"), `TITLE` in messages; `MAIN` is the branch of repos without
    a revision, `LOG_IN` how one logs in, as words behind "or". What goes wrong is one of the failures of http.py.
    """

    KEY: str
    TITLE: str
    MAIN: str
    LOG_IN: str

    def address(self, url: SplitResult) -> tuple[str, str] | None:
        """(reference, revision or empty) of the address of a model's page; None for any other address."""
        ...

    def page(self, repo: str) -> str:
        """The address of a repo's page, where its licence is."""
        ...

    def command(self, repo: str, revision: str, includes: Sequence[str]) -> str:
        """The line of the hub's own tool that downloads the files of these globs."""
        ...

    def root(self) -> Path:
        """The folder of the hub's own cache, which other tools share. Raises ImportError without its client."""
        ...

    def cached(self, repo: str, revision: str) -> list[Path]:
        """The folders of a repo in that cache, complete or not, the best first. Never opens a connection."""
        ...

    def cache(self, repo: str, revision: str) -> Store:
        """The place in that cache where downloads go."""
        ...

    def site(self) -> str:
        """The address that is asked; several as one text."""
        ...

    def listing(self, repo: str, revision: str | None, step: Step) -> Listing:
        """Ask for a repo's files. Raises a failure, or CheckpointError for a list that cannot be used."""
        ...

    def transfer(self, repo: str, name: str, commit: str, file: RemoteFile, target: HashedFile) -> None:
        """Write what `target` has not yet of a file. A server that cannot go on truncates it and starts over."""
        ...

    def gated(self, repo: str, command: str) -> CheckpointError:
        """The error for a repo whose licence was not accepted."""
        ...
