"""Requests to the pack's routes on a real server."""

from __future__ import annotations

import asyncio
from urllib.parse import urlencode

import aiohttp

from .server import Server


def ask(server: Server, method: str, path: str, prefix: str = "/quantized_transformers/", **options) -> tuple[int, dict]:
    """(status, JSON) of a request."""
    async def send() -> tuple[int, dict]:
        async with aiohttp.ClientSession() as session, session.request(
                method, f"http://127.0.0.1:{server.port}{prefix}{path}", **options) as response:
            assert response.content_type == "application/json", await response.text()
            return response.status, await response.json()

    return asyncio.run(send())


def describe(server: Server, reference: str, **more: str) -> dict:
    status, card = ask(server, "GET", f"describe?{urlencode({'reference': reference, **more})}")
    assert status == 200, card
    return card
