"""`fleet`: ComfyUI workers with this pack behind one door for jobs, on Ray Serve. Ends with Ctrl+C or SIGTERM. Exit
code 0: it was ended; 1: it cannot start, or a pool's workflow names what is not here."""

from __future__ import annotations

import argparse
import sys
import threading

HELP = "many ComfyUI workers behind one door for jobs (Ray Serve)"
NEEDS_HOST = "folders"
MORE = True  # what stands behind -- is ComfyUI's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="how many, for jobs that no pool is for")
    parser.add_argument("--pool", default=[], action="append", metavar="NAME=WORKFLOW.json:K",
                        help="K workers for jobs of this workflow's models, and no others")
    parser.add_argument("--gpus-per-worker", type=float, default=1, metavar="G",
                        help="1; 0.5: two workers share one; 0: on the CPU")
    parser.add_argument("--results", default="fleet-results", metavar="DIR", help="where results go, a folder per job")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on: who reaches it runs any workflow")
    parser.add_argument("--base-directory", default="", metavar="DIR",
                        help="ComfyUI's own option: the folder of models, custom_nodes and input of all workers")
    parser.add_argument("--extra-model-paths-config", default=[], action="append", metavar="FILE",
                        help="ComfyUI's own option, beside its extra_model_paths.yaml")


def run(options: argparse.Namespace) -> int:
    from ..engines.worker.fleet import Asked, prepare, running
    from ..host.texts import said

    fleet = prepare(Asked(options.comfyui, options.workers, options.pool, options.gpus_per_worker, options.results,
                          options.host, options.port, options.base_directory, options.extra_model_paths_config,
                          options.more))
    for warning in fleet.warnings:
        print(said(warning), file=sys.stderr, flush=True)
    with running(fleet) as ready:
        print(said(ready), flush=True)
        threading.Event().wait()
    return 0
