"""The process that reads files for the routes (routes/answers.py): started when it is needed, ended when idle."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from .. import host
from ..host.texts import Text, unpacked

SECONDS = 30  # for one answer; then the process is ended, and the next question starts another
IDLE = 600  # seconds without a question
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
    """Asks the process. `ask` blocks, and is for one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._idle: threading.Timer | None = None

    def ask(self, question: str, of: Any = None) -> Any:
        """The answer to "describe", "migrate", "serve" or "nothing" (routes/answers.py). Raises HelperError."""
        if self._idle is not None:
            self._idle.cancel()
        request = {"ask": question, "of": of, "folders": host.model_folders(),
                   "texts": host.text_folders(), "capability": host.capability()}
        line = json.dumps(request).encode("ascii") + b"\n"
        late = threading.Event()
        # a process that was ended between two questions is no reason to refuse the second
        reply = self._exchange(line, late) or (b"" if late.is_set() else self._exchange(line, late))
        if not reply:
            what = Text("the files could not be read within {seconds} s", seconds=SECONDS) if late.is_set() else \
                Text("the process that reads files ends at once")
            raise HelperError("failed", what, "", Text("look at ComfyUI's log; is the disk slow?"))
        self._idle = threading.Timer(IDLE, self.close)
        self._idle.daemon = True
        self._idle.start()
        answer = json.loads(reply, object_hook=unpacked)
        if "error" in answer:
            raise HelperError(answer["error"], answer["what"], answer["where"], answer["do"])
        return answer["answer"]

    def _exchange(self, line: bytes, late: threading.Event) -> bytes:
        """Send a line and read one; empty when the process ended, which it does after SECONDS (then `late` is set)."""
        def end() -> None:
            late.set()
            self.close()

        timer = threading.Timer(SECONDS, end)
        timer.daemon = True
        try:
            process = self._running()
            timer.start()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(line)
            process.stdin.flush()
            reply = process.stdout.readline()
        except OSError:
            reply = b""
        finally:
            timer.cancel()
        if not reply:
            self.close()
        return reply

    def close(self) -> None:
        """End the process; the next question starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        process = self._process
        if process is None or process.poll() is not None:
            # its stderr is the server's
            process = subprocess.Popen([sys.executable, "-c", _START, str(_MAIN), host.comfyui_path()],
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
            self._process = process
        return process
