"""SGLang's own HTTP app without a model: every answer, error and state of its routes in milliseconds (front.py, workers.py).

Nothing of what a client meets is ours but the pictures: routes, checks, job store, encoders and texts are SGLang's.
"""

from __future__ import annotations

import json
import time
import urllib.error
from pathlib import Path
from typing import Any

from support import sglang


class Stub(sglang.Server):
    """`with Stub(folder) as stub:` starts it, in 20 s. Between tests: `stub.restart()`, which forgets all."""

    def __init__(self, folder: Path, name: str = "qt:stub") -> None:
        self.settings = {"folder": str(folder), "port": sglang.free_ports(4), "model": "FLUX.1-dev", "name": name}
        front = Path(__file__).resolve().parent / "front.py"
        super().__init__(folder, self.settings["port"], [str(sglang.program("python")), str(front), json.dumps(self.settings)])

    def told(self, **order: Any) -> dict[str, Any]:
        """{"life", "requests", "seen"} after an order (front.Front.change)."""
        return self.request("/stub", order or None)[1]

    def restart(self, **settings: Any) -> None:
        """Another life: "model" one of front.MODELS, "name" served; "warm" False: warming up until `told(warm=True)`;
        "keep" False: without an output folder. Settings not given are those of the start."""
        life = self.told()["life"]
        self.told(restart={"warm": True, "keep": True, **self.settings, **settings})
        self.until(lambda: self.told()["life"] > life)

    def next(self, *plans: dict[str, Any]) -> None:
        """How the next pictures or videos go (workers.Workers)."""
        self.told(plans=plans)

    def next_loras(self, *plans: dict[str, Any]) -> None:
        """How the next changes of LoRAs go: {"error": text} or {"nothing": True}."""
        self.told(lora_plans=plans)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """What came in, as it was sent: method, path, query, headers, json or parts."""
        return self.told()["requests"]

    @property
    def seen(self) -> list[dict[str, Any]]:
        """What came to the workers: "asked" (the class), and for a picture its sampling params, "images", "loras"."""
        return self.told()["seen"]

    @property
    def drawn(self) -> list[dict[str, Any]]:
        """Those of `seen` that are pictures or videos."""
        return [one for one in self.seen if one["asked"] == "Req"]

    def until(self, done: Any, seconds: float = 10) -> None:
        """Wait for `done()`; while nobody listens it is not."""
        end = time.time() + seconds
        while time.time() < end and self.process.poll() is None:
            try:
                if done():
                    return
            except (urllib.error.URLError, ConnectionError):
                pass
            time.sleep(0.02)
        raise TimeoutError(self.text()[-3000:])
