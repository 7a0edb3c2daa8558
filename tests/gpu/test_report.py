"""`gpu-report`: what stage 2 found wrong has no times, the README gets its column, and until then it says so."""

from __future__ import annotations

import gpu_report
import pytest

from gpu.rows import Rows, read

pytestmark = pytest.mark.unit

VERSIONS = {"card": "NVIDIA H100 80GB HBM3", "date": "2026-12-01", "sm": "9.0", "memory": 85e9, "driver": "580.1", "cuda": "13.0",
            "python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0", "comfyui": "0.30.0", "kitchen": "0.2.26", "pack": "abc1234",
            "vram": "dynamic VRAM", "tiny": False}
README = f"""# Pack

| what | else |
|---|---|
| a | b |

| family | models | Ada | {gpu_report.LAST} |
|---|---|---|---|
| [ModelOpt FP8, `fp8`](docs/formats/fp8.md) | FLUX.1 | native | emulated |
| [ModelOpt NVFP4](docs/formats/nvfp4.md) | the same | emulated | emulated |
| ModelSlim [INT4](docs/formats/int4.md) | Wan | reference | reference |
| BF16, F16, F32 | all | as ComfyUI | as ComfyUI |

Before. <!-- gpu -->{gpu_report.NOT_YET}<!-- /gpu --> After.
"""


def step(arm, kernel, seconds):
    return {"arm": arm, "kernel": kernel, "step": seconds, "launch": seconds / 4, "held": 12e9, "peak": 15e9}


@pytest.fixture
def rows(tmp_path):
    """The file of a run in which NVFP4's tiles came out wrong, and a step of INT8 failed."""
    path = tmp_path / "h100.jsonl"
    Rows(path, 0).write("imports", modules=8)
    Rows(path, 0).write("versions", **VERSIONS)
    Rows(path, 1).write("copy", seconds=1e-3, bytes_per_second=3.1e12)
    Rows(path, 1).write("bf16 matmul", seconds=1e-3, launch=1e-5, flops=7.9e14)
    Rows(path, 2).write("fp8 host host", arm="fp8 host host", ok=True)
    Rows(path, 2).write("nvfp4 tiles comfy_kitchen", arm="nvfp4 tiles comfy_kitchen", ok=False, exact=0.7, bound=0.2, eager=0.6,
                        finite=True, untouched=False)
    Rows(path, 3).write("3072x3072 fp8", arm="fp8 host host",
                        times={"64": {"bf16": 2e-5, "seconds": 3e-5}, "4608": {"bf16": 4e-4, "seconds": 2e-4}})
    Rows(path, 4).write("bf16", **step("bf16", "host", 0.2))
    Rows(path, 4).write("fp8", **step("fp8 host auto", "comfy_kitchen", 0.13))
    Rows(path, 4).write("nvfp4", **step("nvfp4 host auto", "comfy_kitchen", 0.1))
    Rows(path, 4).write("int8", error="it ran out of memory")
    Rows(path, 5).write("512, bf16", **step("bf16", "host", 0.1))
    Rows(path, 5).write("512, fp8", **step("fp8 host auto", "comfy_kitchen", 0.05))
    Rows(path, 8).write("fp8", seconds=0.1, top=[["a|kernel", 0.06, 19]])
    return path


def test_the_page(rows):
    text = gpu_report.performance([gpu_report.Run(read(rows))])
    for part in ("## NVIDIA H100 80GB HBM3, 2026-12-01", "SM 9.0, 85.00 GB, driver 580.1, CUDA 13.0", "this pack abc1234, dynamic VRAM.",
                 "| copy | 3.10 TB/s |", "| bf16 matmul | 790 TFLOPS |", "1 of 2 kernels and layouts give",
                 "- nvfp4 tiles comfy_kitchen: 0.7 from F64 (bound 0.2), 0.6 from plain torch, writes into its weight",
                 "| fp8 | comfy_kitchen | 0.1300 s | 0.65x | 25 % | 12.00 GB | 15.00 GB |",
                 "| 512, fp8 | comfy_kitchen | 0.0500 s | 0.50x | 25 % | 12.00 GB | 15.00 GB |",
                 "| arm | 64 | 4608 |", "| fp8 host host | 1.50x | 0.50x |", "| fp8 | `a/kernel` | 60 % | 19 |",
                 "- stage 4, int8: it ran out of memory"):
        assert part in text, part
    assert "| nvfp4 |" not in text and "Not run on a GPU" not in text


def test_the_column(rows):
    run = gpu_report.Run(read(rows))
    text = gpu_report.readme(README, [run])
    assert run.card == "H100"
    table = [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("|")]
    assert table == ["else", "---", "b", "H100 step", "---", "0.65x", "-", "-", "1.00x"]
    assert "measured on H100" in text and "Not run on a GPU yet" not in text and text.startswith("# Pack\n")
    assert text.endswith("<!-- /gpu --> After.\n")
    assert gpu_report.readme(text, [run]) == text  # written again, it stays as it is
    assert gpu_report.readme(text, []) == README


@pytest.mark.parametrize("card, short", [("NVIDIA H200", "H200"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
                                         ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"), ("NVIDIA H100 PCIe", "H100"),
                                         ("AMD Instinct MI300X", "AMD Instinct MI300X")])
def test_names_of_cards(tmp_path, card, short):
    Rows(tmp_path / "x.jsonl", 0).write("versions", **{**VERSIONS, "card": card})
    assert gpu_report.Run(read(tmp_path / "x.jsonl")).card == short


def test_rows_of_a_cpu_or_of_tiny_layers_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "ROWS", tmp_path)
    for versions in ({**VERSIONS, "tiny": True}, {"card": "cpu", "tiny": False}, None):
        (tmp_path / "x.jsonl").write_text("", encoding="utf-8")
        if versions:
            Rows(tmp_path / "x.jsonl", 0).write("versions", **versions)
        with pytest.raises(SystemExit, match="not of a GPU at full size"):
            gpu_report.main()


def test_what_is_committed_is_what_was_measured():
    """docs/performance.md and the README are what `gpu-report` makes of docs/gpu."""
    runs = sorted((gpu_report.Run(read(path)) for path in gpu_report.ROWS.glob("*.jsonl")), key=lambda run: run.date, reverse=True)
    assert gpu_report.PERFORMANCE.read_text(encoding="utf-8") == gpu_report.performance(runs)
    readme = gpu_report.README.read_text(encoding="utf-8")
    assert gpu_report.readme(readme, runs) == readme
    assert ("Not run on a GPU yet" in readme) == (not runs)
    for label in gpu_report.IN_README:
        assert sum(line.split("|")[1].strip().startswith(label) for line in readme.splitlines() if line.startswith("|")) == 1, label
