"""What downloads need of a hub: its list of a repo's files, their bytes, and its own words for what goes wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ...errors import CheckpointError
from ..hub_file import HashedFile, RemoteFile
from ..stores import Store


@dataclass(frozen=True)
class Listing:
    """A repo at one commit: its files by name, and whether its licence must be accepted."""

    commit: str
    files: dict[str, RemoteFile]
    gated: bool


class Hub(Protocol):
    """A hub, as a module of this package.

    `KEY` names it in folders ("huggingface"), `TITLE` in messages; `PREFIX` begins its references ("" for the one that
    needs none). `failures` are the exceptions that `explained` turns into a CheckpointError.
    """

    KEY: str
    TITLE: str
    PREFIX: str

    def page(self, repo: str) -> str:
        """The address of a repo's page, where its licence is."""
        ...

    def failures(self) -> tuple[type[Exception], ...]: ...

    def cache(self, repo: str, revision: str) -> Store:
        """The place in the hub's own cache, which other tools share."""
        ...

    def listing(self, repo: str, revision: str | None) -> Listing:
        """Ask for a repo's files. Raises one of `failures`, or CheckpointError for an answer that cannot be used."""
        ...

    def transfer(self, repo: str, name: str, commit: str, file: RemoteFile, target: HashedFile) -> None:
        """Write what `target` has not yet of a file. A server that cannot go on truncates it and starts over."""
        ...

    def gated(self, repo: str, command: str) -> CheckpointError:
        """The error for a repo whose licence was not accepted."""
        ...

    def refuses_licence(self, error: Exception) -> bool:
        """Whether a failure means that the licence was not accepted."""
        ...

    def explained(self, error: Exception, repo: str, revision: str, store: Store, command: str) -> CheckpointError:
        """What went wrong between here and the hub, in the user's words."""
        ...
