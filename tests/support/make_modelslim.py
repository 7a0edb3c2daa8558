"""Write tests/data/modelslim: REAL msmodelslim 26.1.0 exports of the tiny Wan of support/modelslim.py, on the CPU.

    pip install --no-deps --target SLIM msmodelslim==26.1.0 easydict==1.13 wcmatch bracex pygtrie
    COMFYUI_PATH=... PYTHONPATH=SLIM PYTHON tests/support/make_modelslim.py [NAME...]

PYTHON is the one of dev.py's environment. What runs is msmodelslim's own MultimodalSDModelslimV1QuantService with its
processors and savers; the adapter below stands in for the stock Wan2.2 one, which needs an NPU (it moves modules to
'npu') and MindIE's fork of Wan. It borrows that adapter's own methods where they run without.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.pack import start_comfy

start_comfy()

import msmodelslim.ir as ir
import torch
from msmodelslim.core.const import DeviceType
from msmodelslim.core.context import ContextFactory
from msmodelslim.core.quant_service.interface import BaseQuantConfig
from msmodelslim.core.quant_service.modelslim_v1.save.interface import AscendV1GlobalModelDtypeInterface
from msmodelslim.core.quant_service.multimodal_sd_v1.pipeline_interface import MultimodalPipelineInterface
from msmodelslim.core.quant_service.multimodal_sd_v1.quant_service import (
    MultimodalSDModelslimV1QuantService,
    MultimodalSDModelslimV1QuantServiceConfig,
)
from msmodelslim.core.quantizer.base import AutoActQuantizer
from msmodelslim.core.quantizer.impl.minmax import ActPerTokenMinmax
from msmodelslim.ir.qal import QABCRegistry
from msmodelslim.model.base import BaseModelAdapter
from msmodelslim.model.interface_hub import IterSmoothInterface, OnlineQuaRotInterface
from msmodelslim.model.wan2_2.base_model_adapter import Wan2_2BaseModelAdapter
from msmodelslim.utils.cache.memory import clear_cache
from pydantic import BaseModel, ConfigDict

from support import modelslim
from support.modelslim import DATA, EXPORTS, FFN, HIDDEN, TEXT, Export


# msmodelslim registers no minmax quantizer for int4 per-token activations, so W4A4_DYNAMIC comes out of its autoround
# and flatquant recipes only. The weights are quantized by its own code; the activation's quantizer writes no tensor.
@QABCRegistry.multi_register(dispatch_key=[(ir.int4_per_token_sym, "minmax")], abc_type=AutoActQuantizer)
class _Int4PerToken(ActPerTokenMinmax):
    pass


def quant(dtype: str, scope: str, **kwargs) -> dict:
    return {"scope": scope, "dtype": dtype, "symmetric": True, "method": "minmax", **kwargs}


def linear(activation: dict, weight: dict, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = ()) -> dict:
    return {"type": "linear_quant", "qconfig": {"act": activation, "weight": weight}, "include": list(include),
            **({"exclude": list(exclude)} if exclude else {})}


MX8, MX4 = quant("mxfp8", "per_block"), quant("mxfp4", "per_block")
DUAL = quant("mxfp4", "dual_scale", method="dualscale", ext={"dual_block_size": 512})
TOKEN8, CHANNEL8, CHANNEL4 = quant("int8", "per_token"), quant("int8", "per_channel"), quant("int4", "per_channel")
STATIC8 = quant("int8", "per_tensor", symmetric=False)
FLOAT = quant("float", "per_tensor", method="none")
MINDIE, ASCENDV1, = {"type": "mindie_format_saver", "part_file_size": 0}, {"type": "ascendv1_saver", "part_file_size": 0}
# name -> (processors, saver, whether it calibrates)
RECIPES = {
    "mxfp8": ([linear(MX8, MX8), {"type": "online_quarot", "include": ["*.self_attn.*"]}], MINDIE, False),
    "mxfp8_ascendv1": ([linear(MX8, {**MX8, "method": "mse_round"})], {**ASCENDV1, "part_file_size": 4}, False),
    # layers left alone, as in wan2_1_w8a8_dynamic.yaml, but not ffn.2: its 512 columns are wanted here
    "w8a8_dynamic": ([linear(TOKEN8, CHANNEL8, exclude=("*cross_attn.o*",))], MINDIE, False),
    "w8a8": ([linear(STATIC8, CHANNEL8)], MINDIE, True),
    "w8a8_fp16": ([linear(STATIC8, CHANNEL8)], ASCENDV1, True),
    "w4a4_dynamic": ([linear(quant("int4", "per_token"), CHANNEL4)], ASCENDV1, False),
    "mxfp4": ([linear(MX4, {**MX4, "method": "ceil_x", "ext": {"enable_search": True}})], MINDIE, False),
    "mxfp4_smooth": ([{"type": "iter_smooth", "alpha": 0.5, "enable_subgraph_type": ["norm-linear"]},
                      linear(MX4, MX4)], MINDIE, True),
    "dual": ([linear(DUAL, DUAL, ("*ffn.2*",)), linear(MX8, MX8, exclude=("*ffn.2*",))], MINDIE, False),
    "mixed": ([linear(TOKEN8, CHANNEL4, ("*ffn.0*",)), linear(FLOAT, CHANNEL8, ("*self_attn.*",)),
               linear(quant("fp8_e4m3", "per_token"), quant("fp8_e4m3", "per_channel"), ("*cross_attn.*",)),
               linear(MX8, MX4, ("*ffn.2*",))], ASCENDV1, False),
}


class InferenceConfig(BaseModel):
    model_config = ConfigDict(extra="allow")


class TinyWan(BaseModelAdapter, MultimodalPipelineInterface, AscendV1GlobalModelDtypeInterface, OnlineQuaRotInterface,
              IterSmoothInterface):
    def __init__(self, path: Path, export: Export) -> None:
        super().__init__("Wan2.2-T2V-A14B", path, True)
        self.export = export
        self.models = {expert: modelslim.source(export, expert) for expert in export.experts}

    def get_global_model_torch_dtype(self):
        return self.export.dtype

    def get_inference_config_class(self):
        return InferenceConfig

    def configure_runtime(self, config) -> None:
        pass

    def handle_dataset(self, dataset, device=DeviceType.NPU):
        return dataset or []

    def inference_dump_calib_data(self, dataset=None, inference_config=None) -> None:
        pass

    def init_model(self, device=DeviceType.NPU):
        return self.models

    def prepare_calib_data(self, models, dump_config, save_path, dataset, inference_config):
        if not dump_config.enable_dump:
            return dict.fromkeys(models)
        # two calls, drawn as the tests draw what they run
        drawn = [modelslim.inputs(self.export.channels, seed=seed) for seed in range(100, 102)]
        dtype = self.export.dtype
        return {expert: [(x["x"].to(dtype), x["sigma"] * 1000, x["text"][..., :TEXT].to(dtype)) for x in drawn]
                for expert in models}

    def generate_model_forward(self, model, inputs):
        return Wan2_2BaseModelAdapter.generate_model_forward(self, model, inputs)

    def generate_model_visit(self, model):
        return Wan2_2BaseModelAdapter.generate_model_visit(self, model)

    def enable_kv_cache(self, model, need_kv_cache) -> None:
        pass

    def get_online_rotation_configs(self, model=None):
        return Wan2_2BaseModelAdapter.get_online_rotation_configs(self, model or next(iter(self.models.values())))

    def get_adapter_config_for_subgraph(self):
        return Wan2_2BaseModelAdapter.get_adapter_config_for_subgraph(self, self.export.layers)

    @contextmanager
    def quantization_context(self):
        with torch.no_grad():
            yield


def make(name: str) -> None:
    """Write one export, replacing what was there."""
    export = EXPORTS[name]
    process, saver, calibrates = RECIPES[name]
    with tempfile.TemporaryDirectory() as temp:
        original, target = Path(temp, "original"), Path(temp, "export")
        for path in (original, target):
            path.mkdir(mode=0o750)  # it refuses folders that others may write
        # the keys of Wan's own config.json
        config = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": HIDDEN, "eps": 1e-06,
                  "ffn_dim": FFN, "freq_dim": 256, "in_dim": export.channels,
                  "model_type": "ti2v" if export.channels == 48 else "t2v", "num_heads": 1,
                  "num_layers": export.layers, "out_dim": export.channels, "text_len": 32}
        (original / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        os.chmod(original / "config.json", 0o640)
        spec = {"process": copy.deepcopy(process), "save": [dict(saver)], "dataset": "none", "multimodal_sd_config": {
            "dump_config": {"enable_dump": calibrates}, "inference_config": {"task": "t2v-A14B"}}}
        datasets = type("Datasets", (), {"get_dataset_by_name": lambda self, name: []})()
        service = MultimodalSDModelslimV1QuantService(MultimodalSDModelslimV1QuantServiceConfig(), datasets,
                                                      ContextFactory())
        clear_cache()  # the calibration list is kept for the whole process
        service.quantize(BaseQuantConfig(apiversion="multimodal_sd_modelslim_v1", spec=spec),
                         TinyWan(original, export), target, device=DeviceType.CPU)
        shutil.rmtree(DATA / name, ignore_errors=True)
        shutil.copytree(target, DATA / name)
    for path in (DATA / name).rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        if path.is_file() and path.stat().st_size > 1_000_000:
            raise SystemExit(f"{path} has {path.stat().st_size:,} bytes, more than 1 MB")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or RECIPES:
        make(wanted)
        print(wanted, sorted((p.name, p.stat().st_size) for p in (DATA / wanted).rglob("*") if p.is_file()))
