"""HTTP routes for the web part, below /quantized_transformers/ (and /api/quantized_transformers/, as every host route).

JSON in and out. Sentences are in the language of Accept-Language, as far as there is one (host/texts.py). Read-only
except `download`; confined to ComfyUI's model folders and the hubs' caches
(views/confine.py), though nodes take any path. Errors are {"error": what, "where": ..., "todo": ...}, each one line
or "", with 400 (bad input, unreadable files), 403 (another origin, a path outside), 404, 409 (too many downloads wait),
413 (too large), 415 (no JSON), 429 (too many requests at once).

GET describe?reference=R&node=QT_X
    more, as the node's widgets: component, weights_name, revision, precision, rank, weights ("load", "defer to
    override"); base (a reference) and base_component: what it must fit; layers=1: with the layer map.
    -> reference, on_disk, title, family (a badge's text, "deferred" for a base without weights), architecture ("" where
    unknown), formats [{format, layers, bytes}], size (bytes on disk), vram (bytes its weights take on this device;
    activations and LoRAs come on top), verdict green | amber | red, verdict_text, precision "int4" | "nvfp4" | null,
    rank (ranks: all of them), hint (steps of a Lightning file) | null, problems, notes (20 of each at most), mismatch
    (why it does not fit the base) | null, download {repo, hubs [keys of those known to have it], files: null,
    bytes: null, gated: "unknown", command} | null (a plan asks the hub), downloading (id of the download of these files
    that is under way) | null, model (title of the known model that it is a form of) | null, layer_map {rows, columns,
    cells [[format | null]], colours {format: "#rrggbb"}}.
    Files that cannot be read are 400; a repo id that is not here is 200 with on_disk false, any other name 404.
GET catalog
    -> items [{reference, title, kind "base" | "override" | "svdq" | "modelslim", node, input, architecture, family,
    formats [names], hubs [keys of those known to have it], size, on_disk, foreign (a whole file of another kind, such
    as a LoRA: its verdict is null), verdict, verdict_text}], architectures, formats, pending (true while items are
    described in the background: their architecture is null; "" is: not recognised), kinds [in the order to show].
GET variants?reference= -> the forms in which the model that this is one of is published (views/variants.py): model
    (title) | null, device, memory (bytes), items [{reference, format, kind, node, input, values {widget: value}, size,
    fits, verdict, verdict_text, on_disk}], the best for this machine first. Nothing is asked of a hub.
GET serve?base=&override=&override_2=&kind=&weights_name=&revision=&near= -> what a server of SGLang's starts with for
    them (served.py): base, pipeline (its class, "" where not known), makes "image" | "video", distilled, command. No
    server is asked.
GET device -> views/doctor.facts ("hub": the key of the preferred one). The first one also starts the process that reads
    files, which a first badge would else wait for.
GET page -> what a page asks once: nodes {node: {input, others [inputs], kind | null}} (nodes/checks.referring), colours
    {format: "#rrggbb"}, "" being that of a format that no report knows.
POST download {"items": [{"reference", "node", ... as describe}], "target": "cache" | "models", "hub": "huggingface" |
    "modelscope", "plan": true}
    -> 200 {rows [{items [numbers of those that need it], hub, repo, commit, files {name: bytes} still missing, bytes,
    least (whether it may be more: the hub does not show it without access, or it depends on what is not here), gated,
    licence (address) | null, folder, error null}, {items, repo, error {error, where, todo}}], bytes (each file once),
    free (bytes) | null}. Asks the hub and writes nothing. Rows are of repos that lack something. "cache" is the hub's
    own, "models" a folder owner/name in ComfyUI's models: of diffusers_components, or, for repos of single files,
    diffusion_models or text_encoders. A revision always goes to the cache. "hub" is that of references that name none
    and may be on any: without it, the one of QT_HUB.
POST download {"items", "target", "hub", "licences": [repos whose licence was accepted]} -> 202 {"id"}
GET download?id= -> {id, state "waiting" | "running" | "done" | "failed" | "cancelled", cancelling, done and total
    (bytes), file, errors [{error, where, todo}]}. What fails keeps nothing else from arriving.
DELETE download?id=, POST download/cancel {"id"} -> the same; cancelled once the thread has let go.
POST language {"client": the id with which a page queues prompts} -> {"language"}: what its prompts say is said in the
    language of this request, too.
POST migrate {workflow} -> {workflow, changes [lines], left [lines]} (makers/migrate).

POST and DELETE need an Origin that is this host, or none; POST a JSON body of type application/json.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiohttp import web

    from .handlers import Routes

PREFIX = "/quantized_transformers"
# Method, path, and the method of handlers.Routes that answers. What answers is imported with the first request.
ROUTES = (
    ("GET", "describe", "describe"), ("GET", "catalog", "list_catalog"), ("GET", "device", "device"),
    ("GET", "variants", "list_variants"), ("GET", "serve", "serve"), ("GET", "page", "page"),
    ("POST", "language", "speak"), ("POST", "download", "start_download"), ("GET", "download", "watch_download"),
    ("DELETE", "download", "cancel_download"), ("POST", "download/cancel", "cancel_download"),
    ("POST", "migrate", "migrate"))


def add_routes(table: Any) -> None:
    """Add the routes to the host's table (web.RouteTableDef)."""
    @cache
    def routes() -> Routes:
        from .handlers import Routes

        return Routes()

    for method, path, name in ROUTES:
        table.route(method, f"{PREFIX}/{path}")(_handler(routes, name, method != "GET"))


def _handler(routes: Callable[[], Routes], name: str, writes: bool) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def respond(request: web.Request) -> web.Response:
        return await routes().respond(request, name, writes)

    return respond
