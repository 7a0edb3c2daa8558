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

from ..host.texts import Text
from ..loaders import download_plans as plans
from ..loaders.errors import CheckpointError
from ..loaders.files import hub
from ..loaders.queries import Query, locate_parts

KEPT = 50  # finished jobs that can still be asked for
AT_ONCE = 2
WAITING = 20
logger = logging.getLogger(__name__)


class TooManyError(CheckpointError):
    """More downloads than wait in line."""


class _CancelledError(Exception):
    pass


@dataclass
class Job:
    """One download, of what several nodes load. `state`: waiting, running, done, failed or cancelled; `total` grows
    where more turns out to be needed than was planned; the `errors` of one query keep nothing else from arriving."""

    id: str
    asked: plans.Asked
    state: str = "waiting"
    done: int = 0
    total: int = 0
    announced: int = 0
    file: str = ""
    errors: list[CheckpointError] = field(default_factory=list)
    cancel: threading.Event = field(default_factory=threading.Event)

    def progress(self, total: int) -> Callable[..., None]:
        """hub.Watcher.progress: counts bytes, and hears the cancellation."""
        self.announced += total
        self.total = max(self.total, self.announced)

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

    def start(self, asked: plans.Asked) -> Job:
        """Begin a download, or return the one that is under way for the same files.

        Raises CheckpointError for what is no repo id, TooManyError when WAITING others are not done.
        """
        for query in asked.queries:
            plans.refuse_no_repo(query.reference)
        with self._lock:
            busy = self._busy()
            for job in busy:
                if job.asked._replace(licences=asked.licences) == asked and not job.cancel.is_set():
                    return job
            if len(busy) >= WAITING:
                raise TooManyError(Text("{count} downloads are not done yet", count=len(busy)),
                                   do=Text("wait, or cancel some"))
            finished = [job.id for job in self._jobs.values() if job not in busy]
            for old in finished[:max(0, len(finished) - KEPT + 1)]:
                del self._jobs[old]
            job = Job(token_hex(8), asked)
            self._jobs[job.id] = job
        # a daemon: the server can end meanwhile, and what has arrived is continued another time
        threading.Thread(target=self._run, args=(job,), name="qt-download", daemon=True).start()
        return job

    def under_way(self, query: Query) -> Job | None:
        """The download that fetches what this query's node loads, whatever base it must fit."""
        return next((job for job in self._busy() if _files_of(query) in map(_files_of, job.asked.queries)), None)

    def _busy(self) -> list[Job]:
        return [job for job in tuple(self._jobs.values()) if job.state in ("waiting", "running")]

    def get(self, name: str) -> Job | None:
        """The job of this id."""
        return self._jobs.get(name)

    def cancel(self, name: str) -> Job | None:
        """Ask a job to end; what has arrived stays where it is and is continued by the next download."""
        job = self._jobs.get(name)
        if job is not None and job.state in ("waiting", "running"):
            job.cancel.set()
        return job

    def _run(self, job: Job) -> None:
        while not self._turns.acquire(timeout=0.2):
            if job.cancel.is_set():
                job.state = "cancelled"
                return
        try:
            job.state = "running"
            watcher = hub.Watcher(job.progress, job.name, job.asked.licences)
            job.total = sum(self._planned(job, watcher).values())
            for query in job.asked.queries:
                try:
                    locate_parts(query, partial(hub.fetch, watcher=watcher, prefer=job.asked.hub,
                                                where=plans.where(query, job.asked.target)))
                except CheckpointError as error:
                    job.errors.append(error)
            if not job.errors:
                job.done = job.total
            job.state = "failed" if job.errors else "done"
        except _CancelledError:
            job.state = "cancelled"
        except Exception as error:
            logger.exception("the download of %s failed", ", ".join(query.reference for query in job.asked.queries))
            job.errors.append(CheckpointError(
                Text("the download failed: {kind}: {error}", kind=type(error).__name__, error=error), "",
                Text("try again, or report it")))
            job.state = "failed"
        finally:
            self._turns.release()

    @staticmethod
    def _planned(job: Job, watcher: hub.Watcher) -> dict[Path, int]:
        """The bytes that will arrive, each file once. What cannot be planned says why when it is fetched."""
        every: dict[Path, int] = {}
        for query in job.asked.queries:
            watcher.progress(0)
            try:
                for found in plans.of_query(query, job.asked, watcher):
                    every |= found.missing
            except CheckpointError:
                continue
        return every


def _files_of(query: Query) -> Query:
    return replace(query, base="", base_component="transformer", layers=False)
