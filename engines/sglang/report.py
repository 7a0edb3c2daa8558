"""What `doctor` says of a server, and of an installation of SGLang."""

from __future__ import annotations

import asyncio
from typing import Any

from ...host.texts import Text
from ...loaders.errors import CheckpointError
from . import client, jobs, known
from .address import TOKEN, Address, address_of, parsed, servers
from .checks import NOTE, REFUSED, WARNING, Check, of_version
from .identity import SCHEME
from .installed import Installed


def of_server(url: str, picture: bool = False) -> dict[str, Any]:
    """{"url", "healthy", "identity", "version", "num_gpus", "tasks", "loras", "checks": [{"level", "what", "do"}]}.

    `url` is an address, a name of QT_SERVERS, or "" for the usual one; whoever types it may call any. Raises
    CheckpointError for an address that is none. With `picture` it has to draw one, too.
    """
    address = address_of("") if not url.strip() else servers().get(url.strip()) or parsed(url)
    found: dict[str, Any] = {
        "url": address.url,
        "healthy": False,
        "identity": "",
        "version": "",
        "num_gpus": 0,
        "tasks": [],
        "loras": {},
    }
    checks: list[Check] = list(_of_address(address))
    try:
        state = asyncio.run(client.state(address))
        loras = asyncio.run(_loras(address))
    except CheckpointError as error:
        checks.append(Check(REFUSED, error.what, error.do))
    else:
        found |= {
            "healthy": True,
            "identity": state.name,
            "version": state.version,
            "num_gpus": state.gpus,
            "tasks": list(state.tasks),
            "loras": loras or {},
        }
        if state.identity is None:
            checks.append(
                Check(
                    WARNING,
                    Text("its name {name} does not say what it serves", name=state.name),
                    Text("start it with `serve`, which names it {scheme}...", scheme=SCHEME),
                )
            )
        if state.version != known.VERSION:
            checks.append(
                Check(
                    WARNING,
                    Text(
                        "this is SGLang {found}; this pack was tried with {version}",
                        found=state.version or Text("of an unknown version"),
                        version=known.VERSION,
                    ),
                    Text("install that version, or look at the first pictures"),
                )
            )
        if loras is None:
            checks.append(Check(NOTE, Text("it draws, and does not say before the end which LoRAs are on")))
        elif loras:
            checks.append(Check(NOTE, Text("LoRAs are on, for all of its clients")))
        if picture:
            try:
                checks.append(Check(NOTE, Text("it drew something small in {seconds:.1f} s",
                                               seconds=asyncio.run(jobs.try_out(address)))))
            except CheckpointError as error:
                checks.append(Check(REFUSED, error.what, error.do))
    return {**found, "checks": _plain(checks)}


async def _loras(address: Address) -> dict[str, Any] | None:
    """Those that are on; None where it draws, and does not say before the end."""
    try:
        return await client.loras(address)
    except client.Silent:
        return None


def _of_address(address: Address) -> list[Check]:
    if address.is_local or client.headers():
        return []
    return [
        Check(
            WARNING,
            Text("the server is on another machine, and no token is sent to it"),
            Text("put it behind a proxy that asks for one, and set {variable}", variable=TOKEN),
        )
    ]


def of_installed(found: Installed) -> dict[str, Any]:
    """What an installation is, and which of the validated rows its cards run: {"command", versions, "gpus", "rows",
    "checks"}."""
    capability = min((card.capability for card in found.gpus), default=None)
    rows = []
    for base, override in sorted(known.VALIDATED):
        fp4 = "nvfp4" in override.lower()
        needs = (10, 0) if fp4 else (8, 9)
        rows.append(
            {
                "base": base,
                "override": override,
                "runs": capability is not None and capability >= needs,
                "needs": f"SM {needs[0]}.{needs[1]}",
            }
        )
    checks = list(of_version(found))
    if not found.gpus:
        checks.append(Check(NOTE, Text("its Python sees no GPU: BF16 alone, and slowly")))
    if found.nunchaku and not found.engine:
        checks.append(
            Check(
                WARNING,
                Text("the package named nunchaku there is another one, a statistics library"),
                Text("install the SVDQuant engine: https://github.com/nunchaku-ai/nunchaku/releases"),
            )
        )
    versions = {
        "sglang": found.sglang,
        "torch": found.torch,
        "flashinfer": found.flashinfer,
        "nunchaku": found.nunchaku,
    }
    gpus = [
        {"name": card.name, "capability": ".".join(map(str, card.capability)), "bytes": card.bytes}
        for card in found.gpus
    ]
    return {"command": found.command, **versions, "gpus": gpus, "rows": rows, "checks": _plain(checks)}


def lines(found: dict[str, Any]) -> list[str]:
    """Either of them as text, one a line."""
    out: list[str] = []
    for key, value in found.items():
        if key not in ("checks", "rows", "gpus"):
            shown = ", ".join(map(str, value)) if isinstance(value, (list, dict)) else value
            out.append(Text("{key}: {value}", key=key, value=Text("none") if value in ("", [], {}) else shown))
    for card in found.get("gpus", ()):
        out.append(
            Text(
                "GPU: {name}, SM {capability}, {memory:.0f} GB",
                name=card["name"],
                capability=card["capability"],
                memory=card["bytes"] / 1e9,
            )
        )
    for row in found.get("rows", ()):
        runs = Text("runs") if row["runs"] else Text("does not run (needs {needs})", needs=row["needs"])
        out.append(Text("{override} on {base}: {runs}", override=row["override"], base=row["base"], runs=runs))
    for check in found["checks"]:
        out.append(Text("{level}: {what}", level=check["level"], what=check["what"]))
        if check["do"]:
            out.append(f"  {check['do']}")
    return out


def _plain(checks: list[Check]) -> list[dict[str, Any]]:
    return [check._asdict() for check in checks]
