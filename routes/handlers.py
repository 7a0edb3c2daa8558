"""What the routes answer; it is described at the top of the package."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING

from .. import host
from ..host.texts import Text, asked, spoken
from ..loaders import download_plans as plans
from ..loaders.errors import CheckpointError
from ..loaders.queries import Query
from ..views import variants
from ..views.card import judged
from ..views.helper import HelperError, shared
from . import downloads
from .catalog import CatalogView
from .requests import (
    MAX_WORKFLOW,
    RefusedError,
    check_origin,
    check_query,
    language,
    parse_object,
    read_body,
    to_download,
    to_query,
)
from .work import STATUS, Answer, BusyError, Pool, answer, error_value, guarded, refusal

if TYPE_CHECKING:
    from aiohttp import web

MAX_CLIENT = 100  # characters


class Routes:
    """The state behind the routes: the helper, threads, downloads. `respond` is what the server calls."""

    def __init__(self) -> None:
        self.helper = shared()
        self.reading = Pool(1, "qt-reading")  # asks the helper, which answers one question at a time
        self.asking = Pool(2, "qt-asking")  # asks the Hub, and this machine
        self.downloads = downloads.Downloads()
        self.catalog = CatalogView(self.reading, self.helper)
        self._facts: dict[str, Answer] = {}  # by language
        self._page: Answer | None = None
        self._warm: asyncio.Future[Answer] | None = None

    async def describe(self, request: web.Request) -> Answer:
        query = to_query(request.query)

        def work() -> Answer:
            job = self.downloads.under_way(query)
            return answer({**judged(self.helper.ask("describe", vars(query))), "downloading": job and job.id,
                           "model": variants.model_of(query.reference) or None})

        return await self.read(query, work)

    async def read(self, key: Hashable, work: Callable[[], Answer]) -> Answer:
        """Run what asks the helper; what goes wrong is an answer, too."""
        return await self.reading.run(key, partial(guarded, work))

    async def list_catalog(self, request: web.Request) -> Answer:
        return await self.catalog.answer()

    async def device(self, request: web.Request) -> Answer:
        def work() -> Answer:
            from ..views.doctor import facts

            return answer(facts())

        if spoken() not in self._facts:  # nothing of it changes while the server runs
            # a page that asks is going to show badges: the first does not wait for the helper's start
            self._warm = asyncio.ensure_future(self.read("warm", lambda: answer(self.helper.ask("nothing"))))
            self._facts[spoken()] = await self.asking.run("device", partial(guarded, work))
        return self._facts[spoken()]

    async def list_variants(self, request: web.Request) -> Answer:
        reference = request.query.get("reference", "")
        return await self.asking.run(("variants", reference), partial(
            guarded, lambda: answer(variants.forms(reference) or {"model": None, "items": []})))

    async def serve(self, request: web.Request) -> Answer:
        values = dict(request.query)
        return await self.read(("serve", *sorted(values.items())), lambda: answer(self.helper.ask("serve", values)))

    async def page(self, request: web.Request) -> Answer:
        def work() -> Answer:
            from ..nodes import node_classes
            from ..nodes.checks import referring
            from ..views.layer_map import css_colours

            return answer({"nodes": referring(node_classes()), "colours": css_colours()})

        if self._page is None:
            # beside our own threads: the page's start waits for this, and must not wait for the Hub
            self._page = await asyncio.to_thread(guarded, work)
        return self._page

    async def speak(self, request: web.Request) -> Answer:
        client = parse_object(await read_body(request)).get("client")
        if not isinstance(client, str) or not 0 < len(client) <= MAX_CLIENT:
            raise CheckpointError(Text("client is no id of a page"), Text("the request"), Text("correct it"))
        host.page_speaks(client, spoken())
        return answer({"language": spoken()})

    async def start_download(self, request: web.Request) -> Answer:
        values = parse_object(await read_body(request))
        asked = to_download(values)
        for query in asked.queries:
            refused = await self.read(("inside", query), partial(self._inside, query))
            if refused.status != 200:
                return refused
        if values.get("plan") is True:
            return await self.asking.run(("plan", asked), partial(guarded, lambda: answer(plans.answer(asked))))
        try:
            job = self.downloads.start(asked)
        except downloads.TooManyError as error:
            return refusal(409, error.what, error.where, error.do)
        return answer({"id": job.id}, 202)

    def _inside(self, query: Query) -> Answer:
        """Refuse what leads out of the folders; whether it is there does not matter."""
        try:
            self.helper.ask("describe", vars(query))
        except HelperError as error:
            if error.kind == "outside":
                raise
        return answer(None)

    async def watch_download(self, request: web.Request) -> Answer:
        return self.state(self.downloads.get(request.query.get("id", "")))

    async def cancel_download(self, request: web.Request) -> Answer:
        name = request.query.get("id", "") if request.method == "DELETE" \
            else parse_object(await read_body(request)).get("id")
        return self.state(self.downloads.cancel(str(name)))

    @staticmethod
    def state(job: downloads.Job | None) -> Answer:
        """A download as the page sees it."""
        if job is None:
            return refusal(404, Text("there is no such download"), "", Text("start it again"))
        return answer({"id": job.id, "state": job.state, "cancelling": job.cancel.is_set(), "done": job.done,
                       "total": job.total, "file": job.file,
                       "errors": [error_value(error.what, error.where, error.do) for error in job.errors]})

    async def migrate(self, request: web.Request) -> Answer:
        body = await read_body(request, MAX_WORKFLOW)
        try:
            text = body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(Text("the body is no UTF-8"), Text("the request's body"),
                                  Text("send JSON")) from error

        def work() -> Answer:
            done = self.helper.ask("migrate", text)
            said = answer({"changes": done["changes"], "left": done["left"]})
            # the workflow is JSON already: this process neither reads nor writes it
            return said._replace(body=b'{"workflow": ' + done["workflow"].encode("ascii") + b", " + said.body[1:])

        return await self.read(("migrate", text), work)

    async def respond(self, request: web.Request, name: str, writes: bool) -> web.Response:
        """What the method of this name answers: origin and size first, every refusal as JSON."""
        from aiohttp import web

        asked.set(language(request.headers.get("Accept-Language", "")))
        try:
            check_origin(request, writes)
            check_query(request)
            done = await getattr(self, name)(request)
        except RefusedError as error:
            done = error.answer
        except HelperError as error:
            done = refusal(STATUS[error.kind], error.what, error.where, error.do)
        except CheckpointError as error:
            done = refusal(400, error.what, error.where, error.do)
        except BusyError:
            done = refusal(429, Text("too many requests at once"), "", Text("try again in a moment"))
        return web.Response(status=done.status, body=done.body, content_type="application/json", charset="utf-8",
                            headers={"Cache-Control": "no-store"})
