"""Nodes that write checkpoints."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs


class QT_RepackModelSlimWan(io.ComfyNode):
    """A ModelSlim export of Wan in a diffusers repo, and back."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QT_RepackModelSlimWan", display_name="Repack ModelSlim Wan", category=f"{inputs.CATEGORY}/build",
            is_output_node=True,
            description="Writes a ModelSlim export of Wan2.x, which has the vendor's names, as a diffusers repo: both "
                        "transformers and their descriptions renamed, everything else from the base; or the inverse. "
                        "Data are copied byte for byte.",
            search_aliases=["wan_repack", "ascend", "msmodelslim", "diffusers layout", "convert wan"],
            inputs=[
                io.String.Input("source", default="",
                                tooltip="The export: a folder with high_noise_model and low_noise_model, or of a "
                                        "single model. A path, or a repo id that is on this machine."),
                io.String.Input("base", default="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
                                tooltip="The diffusers repo that config.json, VAE, text encoder and the rest come "
                                        "from. To original: the vendor's repo, or nothing."),
                io.String.Input("output", default="",
                                tooltip="A new folder. A relative path is below models/diffusers_components."),
                io.Combo.Input("direction", options=["to diffusers", "to original"], default="to diffusers",
                               tooltip="to diffusers: the vendor's names become diffusers'. to original: the inverse."),
                io.Combo.Input("link", options=["link", "copy"], default="link",
                               tooltip="What of the base is not a transformer: links to its files, or copies."),
            ],
            outputs=[io.String.Output("report", display_name="report")])

    @classmethod
    def validate_inputs(cls, source: str = "", base: str = "", output: str | None = None,
                        direction: str = "to diffusers") -> bool | str:
        from ..loaders.errors import CheckpointError
        from ..loaders.files.places import cleaned
        from ..makers.publish import target_folder
        from . import checks

        needed = {"source": source} if direction == "to original" and base is not None and not cleaned(base) \
            else {"source": source, "base": base}
        try:
            checks.check_new(output, needed, target_folder)
        except CheckpointError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, source: str, base: str, output: str, direction: str = "to diffusers",
                link: str = "link") -> io.NodeOutput:
        from ..makers.repack_wan import repack
        from . import checks

        report = repack(source, base, checks.new_name(output), direction, link == "link")
        return inputs.reported(report)
