"""The process that reads files (routes/answers.py) for pages and for the checks of a prompt: started when it is needed,
ended when idle, and ended when an answer takes too long or too much memory. What it was reading then is refused at once
from there on, until its files change or some time has passed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from .. import host
from ..host.texts import Text, unpacked

SECONDS = 30.0  # for one answer, on the clock: disks may be slow, and ComfyUI's start is
PROCESSOR = 5.0  # seconds of the processor for reading what one question is about
MEMORY = 600_000_000  # bytes that this may take
ANSWER = 24_000_000  # bytes of an answer: a workflow of 2 MB, every letter of it escaped
IDLE = 600  # seconds without a question
REFUSED = 512  # questions that ended the process, remembered for so many
AGAIN = 600.0  # seconds
_EVERY = 0.1  # seconds between two looks at the process
_MAIN = Path(__file__).resolve().parents[1] / "__main__.py"
# The pack as a package by path, as its command line has it; no node and no ComfyUI is imported.
_START = ("import runpy, sys; runpy.run_path(sys.argv[1])['import_pack'](); "
          "from quantized_transformers.routes.answers import serve; serve(sys.argv[2])")


class HelperError(Exception):
    """What the helper refused; `kind` is one of routes.answers.KINDS, or "failed"."""

    def __init__(self, kind: str, what: str, where: str = "", do: str = "") -> None:
        super().__init__(what)
        self.kind, self.what, self.where, self.do = kind, what, where, do


class Helper:
    """Asks the process, for any thread; one question at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._idle: threading.Timer | None = None
        self._turn = threading.Lock()
        # of what ended the process: a question's hash or the stamp of its files -> when, and the refusal
        self._ended: OrderedDict[str, tuple[float, HelperError]] = OrderedDict()

    def ask(self, question: str, of: Any = None) -> Any:
        """The answer to one of the questions of routes/answers.py. Raises HelperError."""
        asked = {"ask": question, "of": of, "folders": host.model_folders(), "texts": host.text_folders(),
                 "capability": host.capability()}
        key = sha256(json.dumps(asked).encode("ascii")).hexdigest()
        with self._turn:
            self._refuse_again(key)
            if self._idle is not None:
                self._idle.cancel()
            line = json.dumps(asked | {"refused": list(self._ended)}).encode("ascii") + b"\n"
            watch = _Watch()
            # a process that was ended between two questions is no reason to refuse the second
            reply = self._exchange(line, watch) or (b"" if watch.why else self._exchange(line, watch))
            if not reply:
                raise self._refusal(watch, key)
            self._idle = threading.Timer(IDLE, self._end_idle)
            self._idle.daemon = True
            self._idle.start()
        answer = json.loads(reply, object_hook=unpacked)
        if answer.get("error") == "again":
            self._refuse_again(answer["stamp"])
            raise HelperError("failed", Text("ask again"))  # it was forgotten in between
        if "error" in answer:
            raise HelperError(answer["error"], answer["what"], answer["where"], answer["do"])
        return answer["answer"]

    def _refuse_again(self, key: str) -> None:
        """Raise what is remembered of a question, or of the files of a stamp."""
        now = time.monotonic()
        for old in [old for old, (since, _) in self._ended.items() if now - since > AGAIN]:
            self._ended.pop(old, None)
        if key in self._ended:
            raise self._ended[key][1].with_traceback(None)

    def _refusal(self, watch: _Watch, key: str) -> HelperError:
        """What is said of a question without an answer, now and when it is asked again."""
        if not watch.why:
            return HelperError("failed", Text("the process that reads files ends at once"), "",
                               Text("look at ComfyUI's log"))
        error = HelperError("bad", watch.why, "", watch.do)
        self._ended[watch.stamp or key] = time.monotonic(), error
        while len(self._ended) > REFUSED:
            self._ended.popitem(last=False)
        return error

    def _exchange(self, line: bytes, watch: _Watch) -> bytes:
        """Send a line and read the answer; empty when the process ended, which it does when `watch` says why."""
        reply = b""
        process: subprocess.Popen[bytes] | None = None
        done = threading.Event()
        try:
            process = self._running()
            threading.Thread(target=watch.over, args=(process, done), name="qt-watch", daemon=True).start()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(line)
            process.stdin.flush()
            while (reply := process.stdout.readline(ANSWER)).startswith(b'{"now": '):
                watch.hears(process, **json.loads(reply))
            if reply and not reply.endswith(b"\n"):
                if len(reply) >= ANSWER:
                    watch.why = Text("what is to be said of it is longer than {most:,} bytes", most=ANSWER)
                reply = b""
        except OSError:
            reply = b""
        finally:
            done.set()
        if not reply:
            self.close()
        return reply

    def _end_idle(self) -> None:
        if self._turn.acquire(blocking=False):
            try:
                self.close()
            finally:
                self._turn.release()

    def close(self) -> None:
        """End the process; the next question starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):  # of what was not sent
                        pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        process = self._process
        if process is None or process.poll() is not None:
            self.close()
            # its stderr is the server's
            process = subprocess.Popen([sys.executable, "-c", _START, str(_MAIN), host.comfyui_path()],
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
            self._process = process
        return process


class _Watch:
    """One question: ends the process that takes too long over it, and says `why`. `stamp` is that of the files that
    were read then."""

    def __init__(self) -> None:
        self.stamp, self.why, self.do = "", "", Text("take another file; this one may be made to do harm")
        self._before: tuple[float, int] | None = None  # when its reading began: seconds of the processor, memory

    def hears(self, process: subprocess.Popen[bytes], now: str, stamp: str = "") -> None:
        """What the process says before its answer: it is "reading" the files of a stamp from now on; or "starting"
        ComfyUI, which takes more than any file."""
        self.stamp = stamp or self.stamp
        self._before = _spent(process.pid) if now == "reading" else None

    def over(self, process: subprocess.Popen[bytes], done: threading.Event) -> None:
        """Look at the process until the question is answered."""
        deadline = time.monotonic() + SECONDS
        while not done.wait(_EVERY):
            before, spent = self._before, _spent(process.pid)
            if time.monotonic() > deadline:
                self.why = Text("the files could not be read within {seconds:g} s", seconds=SECONDS)
                self.do = Text("look at ComfyUI's log; is the disk slow?")
            elif before and spent and spent[0] - before[0] > PROCESSOR:
                self.why = Text("to read it takes the processor more than {seconds:g} s", seconds=PROCESSOR)
            elif before and spent and spent[1] - before[1] > MEMORY:
                self.why = Text("to read it takes more than {most:,} bytes of memory", most=MEMORY)
            if self.why:
                process.kill()
                return


def _spent(pid: int) -> tuple[float, int] | None:
    """(seconds of the processor, bytes of memory) of a process; None where that is not known."""
    try:
        import psutil  # ComfyUI's
    except ImportError:  # the clock has to do
        return None
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        return times.user + times.system, process.memory_info().rss
    except psutil.Error:  # it has ended
        return None


@cache
def shared() -> Helper:
    """That of this server."""
    return Helper()


@cache
def checking() -> ThreadPoolExecutor:
    """The thread in which the checks of prompts wait for it."""
    return ThreadPoolExecutor(1, "qt-checking")
