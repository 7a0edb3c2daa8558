"""Server Model, Server LoRA: what a server of SGLang's must serve. Nothing is asked of one here."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import inputs

CATEGORY = f"{inputs.CATEGORY}/server"
Server = io.Custom("QT_SERVER")


class QT_ServerModel(io.ComfyNode):
    """A base and an override, as a server of SGLang's is to serve them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_ServerModel", display_name="Server Model", category=CATEGORY,
            description="Names the server of SGLang-Diffusion that draws, and what it must serve: the base and the "
                        "override of Apply Transformer Override. Server Image and Server Video verify it before every "
                        "job. Start one with: python <pack> serve BASE --override REF --run",
            search_aliases=["sglang", "remote", "multi gpu", "sequence parallel", "server", "distributed"],
            inputs=[
                inputs.checkpoints("base_model", "server_bases",
                                   tooltip="The pipeline that the server was started with."),
                inputs.checkpoints("override", "server_overrides",
                                   tooltip="What replaces its transformer; none for the base itself."),
                io.Combo.Input("kind", optional=True, options=["auto", "component", "weights"], default="auto",
                               tooltip="As for Apply Transformer Override, and for serve --kind."),
                io.String.Input("server", optional=True, default="",
                                tooltip="Empty: the one that QT_SERVER_URL names, else http://127.0.0.1:30000. A name "
                                        "of QT_SERVERS. Or the address of this machine, or of a host in QT_SERVERS."),
                inputs.reference(),
                io.String.Input("override_reference", optional=True, default="", tooltip=inputs.REFERENCE_TIP),
                io.String.Input("weights_name", optional=True, default="", advanced=True,
                                tooltip="File inside the override's folder or repo, where there are several."),
                io.String.Input("transformer_2", optional=True, default="", advanced=True,
                                tooltip="What replaces transformer_2 of a base with two (Wan2.2 A14B): a path or repo "
                                        "id."),
                io.String.Input("revision", optional=True, default="", advanced=True,
                                tooltip="Commit of the base. Empty: the one on this machine, else any."),
                io.Combo.Input("check", optional=True, options=["exact", "base only", "none"], default="exact",
                               advanced=True,
                               tooltip="exact: base and overrides, by the name that serve gives a server. base only: "
                                       "for a server that was started by hand. none: whatever it serves."),
            ],
            outputs=[Server.Output("server_model", display_name="server_model"),
                     io.String.Output("report", display_name="report")])

    @classmethod
    def validate_inputs(cls, base_model: str | None = "", override: str | None = "", server: str | None = "",
                        reference: str | None = "") -> bool | str:
        """Syntax alone: the files may be on the server only."""
        from ..engines.sglang.address import address_of
        from ..loaders.errors import CheckpointError

        try:
            if server is not None:
                address_of(server)
        except CheckpointError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **given: Any) -> str:
        try:
            return repr(_wanted(**given))
        except ValueError as error:  # said when it runs
            return repr(error)

    @classmethod
    def execute(cls, base_model: str = "", override: str = "", kind: str = "auto", server: str = "",
                reference: str = "", override_reference: str = "", weights_name: str = "", transformer_2: str = "",
                revision: str = "", check: str = "exact") -> io.NodeOutput:
        from ..engines.sglang.address import address_of
        from ..host.texts import Text, joined

        wanted = _wanted(base_model, override, kind, server, reference, override_reference, weights_name, transformer_2,
                         revision, check)
        report = [Text("{url}: to be verified before every job", url=address_of(server).url),
                  Text("wanted: {name} ({check})", name=wanted.name, check=check),
                  Text("start such a server with: {command}", command=wanted.command)]
        return inputs.loaded(wanted.to_json(), joined("\n", report))


def _wanted(base_model: str = "", override: str = "", kind: str = "auto", server: str = "", reference: str = "",
            override_reference: str = "", weights_name: str = "", transformer_2: str = "", revision: str = "",
            check: str = "exact") -> Any:
    from ..engines.sglang.wanted import wanted
    from .checks import chosen

    return wanted(server, chosen(reference, base_model), chosen(override_reference, override), transformer_2, kind,
                  weights_name, revision, check)


class QT_ServerLoRA(io.ComfyNode):
    """One more LoRA that a server is to draw with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_ServerLoRA", display_name="Server LoRA", category=CATEGORY,
            description="Has the server draw with a LoRA. Several in a row are put on together. A server has one set "
                        "of LoRAs for all of its clients: it is looked at before and after every picture.",
            search_aliases=["sglang lora", "remote lora", "lora"],
            inputs=[
                Server.Input("server_model", tooltip="From Server Model or another Server LoRA."),
                io.String.Input("lora", default="", tooltip="A repo id, or the path of a .safetensors file on the "
                                                            "server's machine."),
                io.Float.Input("strength", default=1.0, min=-100.0, max=100.0, step=0.01,
                               tooltip="How much of it; may be negative. 0: without it."),
                io.Combo.Input("target", options=["all", "transformer", "transformer_2"], default="all",
                               tooltip="Of a model with two transformers (Wan2.2 A14B): which of them."),
                io.Combo.Input("merge_mode", optional=True, options=["auto", "merge", "dynamic"], default="auto",
                               advanced=True,
                               tooltip="merge: into the weights. dynamic: beside them, for quantized weights; one LoRA "
                                       "at most. auto: the server chooses."),
                io.Int.Input("alpha", optional=True, default=0, min=0, max=1 << 16, advanced=True,
                             tooltip="Scale of a file that does not tell its own. 0: the file's."),
            ],
            outputs=[Server.Output("server_model", display_name="server_model")])

    @classmethod
    def validate_inputs(cls, lora: str | None = "") -> bool | str:
        from ..host.texts import Text, said

        return True if lora is None or lora.strip() else said(Text("no LoRA is given: a repo id, or a path on the "
                                                                   "server's machine"))

    @classmethod
    def execute(cls, server_model: Any, lora: str, strength: float = 1.0, target: str = "all", merge_mode: str = "auto",
                alpha: int = 0) -> io.NodeOutput:
        from ..engines.sglang.loras import LoRA
        from ..engines.sglang.wanted import Server as Wanted
        from ..loaders.files.places import cleaned

        wanted = Wanted.of_json(server_model)
        return io.NodeOutput(wanted.with_lora(LoRA(cleaned(lora), strength, target, merge_mode, alpha)).to_json())
