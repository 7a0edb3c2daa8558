"""Downloads that run beside the server: started, watched and cancelled over HTTP, made by hub.fetch."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

from ..loaders.errors import CheckpointError
from ..loaders.files import hub
from ..loaders.files.places import is_repo
from ..views.card import Query, locate_parts

KEPT = 50  # finished jobs that can still be asked for
AT_ONCE = 2
WAITING = 20
logger = logging.getLogger(__name__)


class TooManyError(CheckpointError):
    """More downloads than wait in line."""


class _CancelledError(Exception):
    pass


class _Planned(Exception):  # noqa: N818  # not an error: it ends locate where the download would begin
    def __init__(self, plan: hub.Plan) -> None:
        self.plan = plan


@dataclass
class Job:
    """One download. `state`: waiting, running, done, failed or cancelled; `total` grows as more is known."""

    id: str
    query: Query
    state: str = "waiting"
    done: int = 0
    total: int = 0
    file: str = ""
    error: CheckpointError | None = None
    cancel: threading.Event = field(default_factory=threading.Event)

    def progress(self, total: int) -> Callable[..., None]:
        """hub.Watcher.progress: counts bytes, and hears the cancellation."""
        self.total += total

        def step(amount: int = 1) -> None:
            if self.cancel.is_set():
                raise _CancelledError
            self.done = min(self.done + amount, self.total)

        step(0)
        return step

    def name(self, file: str) -> None:
        """hub.Watcher.file."""
        self.file = file


class Downloads:
    """The downloads of this process. All methods may be called from any thread and return at once."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(AT_ONCE)

    def start(self, query: Query, licence_accepted: bool) -> Job:
        """Begin a download, or return the one that is under way for the same query.

        Raises CheckpointError for what is no repo id, TooManyError when WAITING others are not done.
        """
        refuse_no_repo(query.reference)
        with self._lock:
            busy = self._busy()
            for job in busy:
                if job.query == query and not job.cancel.is_set():
                    return job
            if len(busy) >= WAITING:
                raise TooManyError(f"{len(busy)} downloads are not done yet", do="wait, or cancel some")
            finished = [job.id for job in self._jobs.values() if job not in busy]
            for old in finished[:max(0, len(finished) - KEPT + 1)]:
                del self._jobs[old]
            job = Job(token_hex(8), query)
            self._jobs[job.id] = job
        # a daemon: the server can end meanwhile, and what has arrived is continued another time
        threading.Thread(target=self._run, args=(job, licence_accepted), name="qt-download", daemon=True).start()
        return job

    def under_way(self, query: Query) -> Job | None:
        """The download that fetches what this query's node loads, whatever base it must fit."""
        return next((job for job in self._busy() if _files_of(job.query) == _files_of(query)), None)

    def _busy(self) -> list[Job]:
        return [job for job in tuple(self._jobs.values()) if job.state in ("waiting", "running")]

    def get(self, name: str) -> Job | None:
        """The job of this id."""
        return self._jobs.get(name)

    def cancel(self, name: str) -> Job | None:
        """Ask a job to end; what has arrived stays in the cache and is continued by the next download."""
        job = self._jobs.get(name)
        if job is not None and job.state in ("waiting", "running"):
            job.cancel.set()
        return job

    def _run(self, job: Job, licence_accepted: bool) -> None:
        while not self._turns.acquire(timeout=0.2):
            if job.cancel.is_set():
                job.state = "cancelled"
                return
        try:
            job.state = "running"
            watcher = hub.Watcher(job.progress, job.name, licence_accepted)
            locate_parts(job.query, partial(hub.fetch, watcher=watcher))
            job.done, job.state = job.total, "done"
        except _CancelledError:
            job.state = "cancelled"
        except CheckpointError as error:
            job.error, job.state = error, "failed"
        except Exception as error:
            logger.exception("the download of %s failed", job.query.reference)
            job.error = CheckpointError(f"the download failed: {type(error).__name__}: {error}", job.query.reference,
                                        "try again, or report it")
            job.state = "failed"
        finally:
            self._turns.release()


def _files_of(query: Query) -> Query:
    return replace(query, base="", base_component="transformer", layers=False)


def refuse_no_repo(reference: str) -> None:
    """Raise CheckpointError unless the reference is a repo id that can be downloaded."""
    if not is_repo(reference):
        raise CheckpointError("only a repo id of the Hugging Face Hub can be downloaded", repr(reference[:200]),
                              "give owner/name")


def plan(query: Query) -> dict[str, Any]:
    """What a download of a query's files would fetch, asked of the Hub: repo, commit, files by size, bytes that are
    missing here, whether it is gated and where its licence is, and the free space in bytes.

    Raises CheckpointError as a download does.
    """
    import os
    import shutil

    from huggingface_hub import constants

    refuse_no_repo(query.reference)

    def ask(*arguments: Any) -> Path:
        raise _Planned(hub.plan(*arguments))

    try:
        locate_parts(query, ask)
    except _Planned as planned:
        found = planned.plan
    else:
        found = hub.Plan("/".join(query.reference.split("/")[:2]), "", {}, 0, False)
    near = constants.HF_HUB_CACHE
    while not os.path.isdir(near) and near != os.path.dirname(near):
        near = os.path.dirname(near)
    return {"repo": found.repo, "commit": found.commit, "files": found.files, "bytes": found.missing,
            "gated": found.gated, "licence": f"https://huggingface.co/{found.repo}" if found.gated else None,
            "free": shutil.disk_usage(near).free}
