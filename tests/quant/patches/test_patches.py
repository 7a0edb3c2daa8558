"""Patches on every quantized format, in every state that the host's memory management has, against the dense twin.

Tolerance: both compute in F32, and an effect is a difference of outputs; 1e-4 of it is what is promised.
"""

from __future__ import annotations

import functools

import pytest
import torch

from support import patch_net as net

pytestmark = pytest.mark.unit
TOLERANCE = 1e-4
made = functools.cache(net.make)


@functools.cache
def before(name, state):
    ours, twin, columns = made(name)
    return net.STATES[state](ours, columns), net.full(twin, columns)


@functools.cache
def dense(name, kind, strength=1.0):
    _, twin, columns = made(name)
    return net.full(net.add(twin, net.files(columns)[kind], strength), columns)


@pytest.mark.parametrize("name", net.FORMATS)
def test_the_twin_is_one(name):
    ours, twin, columns = made(name)
    for state in net.STATES:
        first, other = before(name, state)
        assert net.rel(first, other) < 1e-5


@pytest.mark.parametrize("kind", net.KINDS)
@pytest.mark.parametrize("name", net.FORMATS)
def test_every_kind_of_lora_in_every_state(name, kind, caplog):
    ours, _, columns = made(name)
    patched = net.add(ours, net.files(columns)[kind])
    for state, run in net.STATES.items():
        mine, theirs = before(name, state)
        assert net.off(run(patched, columns), mine, dense(name, kind), theirs) < TOLERANCE, state
    assert torch.equal(net.full(ours, columns), before(name, "full")[0])  # taken off again
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")]


@pytest.mark.parametrize("name", net.FORMATS)
def test_strengths(name):
    ours, _, columns = made(name)
    for strength in (0.1, 0.3, 1.0, -0.7):
        for kind in ("kohya", "lokr"):
            patched = net.add(ours, net.files(columns)[kind], strength)
            for state in ("full", "low VRAM"):
                out = net.STATES[state](patched, columns)
                mine, theirs = before(name, state)
                assert net.off(out, mine, dense(name, kind, strength), theirs) < TOLERANCE


@pytest.mark.parametrize("name", net.FORMATS)
def test_several_loras(name):
    """A kohya one, one on some of the rows and a LoKr; and with one that needs the weight between them."""
    ours, twin, columns = made(name)
    kinds = net.files(columns)
    for chain in (("kohya", "rows", "lokr", "peft"), ("rows", "dora", "kohya")):
        a, b = ours, twin
        for i, kind in enumerate(chain):
            a, b = (net.add(one, kinds[kind], 0.8 - 0.3 * i) for one in (a, b))
        expected = net.full(b, columns)
        for state, run in net.STATES.items():
            mine, theirs = before(name, state)
            assert net.off(run(a, columns), mine, expected, theirs) < TOLERANCE


@pytest.mark.parametrize("name", net.FORMATS)
def test_a_scaled_model(name):
    ours, twin, columns = made(name)
    a, b = (net.add(one, net.files(columns)["kohya"], 0.5, 0.9) for one in (ours, twin))
    for state, run in net.STATES.items():
        mine, theirs = before(name, state)
        assert net.off(run(a, columns), mine, net.full(b, columns), theirs) < TOLERANCE


@pytest.mark.part(2)
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["default", "dtype set"])
@pytest.mark.parametrize("name", net.FORMATS)
def test_a_lora_survives_vram_changes(name, dtype):
    ours, twin, columns = made(name)
    ours, twin = ours.clone(), twin.clone()
    if dtype is not None:
        ours.set_model_compute_dtype(dtype)
    start, theirs = net.full(ours, columns), net.full(twin, columns)
    for kind in ("bias and norm", "dora"):
        file = net.files(columns)[kind]
        patched, expected = net.add(ours, file), net.full(net.add(twin, file), columns)
        for state in ("full", "low VRAM", "full", "partial", "low VRAM", "partial", "full"):
            assert net.off(net.STATES[state](patched, columns), start, expected, theirs) < TOLERANCE, state
        patched.patch_model(patched.load_device, lowvram_model_memory=1)
        try:  # as free memory comes and goes, without a new start
            for enough in (True, False, True, None):
                assert net.off(net.run(patched, columns), start, expected, theirs) < TOLERANCE
                if enough:
                    patched.partially_load(patched.load_device, extra_memory=1 << 40)
                elif enough is False:
                    patched.partially_unload(patched.offload_device, memory_to_free=1 << 30)
        finally:
            patched.unpatch_model(patched.offload_device)
    assert torch.equal(net.full(ours, columns), start)


@pytest.mark.parametrize("name", net.FORMATS)
def test_bf16(name):
    """Factors are rounded to 16 bits once, and activations; a LoRA is not lost in the rounding of the weights."""
    ours, _, columns = made(name)
    x = net.rand(17, columns, seed=9).bfloat16()
    layer = ours.model.diffusion_model.layer
    patched = net.add(ours, net.files(columns)["kohya"], 0.3)
    file = net.files(columns)["kohya"]
    effect = 0.3 * 0.5 * (x.float() @ file["layer.lora_down.weight"].t()) @ file["layer.lora_up.weight"].t()
    with torch.no_grad():
        start = layer(x).float()
        patched.patch_model(patched.load_device)
        after = layer(x).float()
        patched.unpatch_model(patched.offload_device)
    rounding = 2 ** -8 * start.norm()  # of two outputs, half a step each
    assert (after - start - effect).norm() < rounding + 2 ** -6 * effect.norm()


@pytest.mark.parametrize("name", net.FORMATS)
def test_nothing_is_dequantized_for_a_lora(name, monkeypatch):
    """A full load keeps the bytes as they are, and takes memory for the LoRA alone."""
    from comfy_kitchen.tensor import QuantizedTensor

    def never(*_):
        raise AssertionError("dequantized")

    ours, _, columns = made(name)
    layer = ours.model.diffusion_model.layer
    codes, size = layer.weight._qdata, sum(t.nbytes for t in layer.state_dict().values())
    patched = net.add(ours, net.files(columns)["kohya"])
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedTensor, "dequantize", never)
        patched.patch_model(patched.load_device)
        now = layer.weight._qdata
        grown = sum(t.nbytes for t in layer.state_dict().values()) - size
    patched.unpatch_model(patched.offload_device)
    assert torch.equal(now.view(torch.uint8), codes.view(torch.uint8))
    # the low-rank branch that SVDQuant has is F32 where the model computes in F32
    size = sum(t.nbytes for leaf, t in layer.state_dict().items() if leaf.endswith(("_down", "_up")))
    has_tile = name not in ("fp8 e5m2", "convrot w4a4")  # the state of those is the dense layer that a file would have
    assert not has_tile or grown < 3 * 4 * 4 * (net.ROWS + columns) + size + 2000  # shards have a pair each; markers


@pytest.mark.parametrize("name", ["fp8", "int8", "nvfp4 shards", "svdq int4"])
def test_a_weight_is_moved_once(name):
    """To another device the host copies a weight before it asks what it would be with a LoRA: that copy stays."""
    from comfy_kitchen.tensor import QuantizedTensor
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.copy_.default and isinstance(args[0], QuantizedTensor):
                copies.append(args[0]._qdata.data_ptr())
            elif any(isinstance(arg, QuantizedTensor) for arg in args):
                others.append(function)
            return function(*args, **(kwargs or {}))

    ours, _, columns = made(name)
    patched, copies, others = net.add(ours, net.files(columns)["kohya"]), [], []
    layer = patched.model.diffusion_model.layer
    codes, dtype = layer.weight._qdata, layer.weight.dtype
    with Seen():
        patched.patch_weight_to_device(net.KEY, device_to=torch.device("cpu", 0))  # which is not "cpu"
    try:
        assert copies == [layer.weight._qdata.data_ptr()] and others == [torch.ops.aten.empty_like.default]
        assert torch.equal(layer.weight._qdata.view(torch.uint8), codes.view(torch.uint8)) and layer.weight.dtype == dtype
    finally:
        patched.unpatch_model(patched.offload_device)
    assert layer.weight._qdata.data_ptr() == codes.data_ptr()


@pytest.mark.parametrize("name", net.FORMATS)
def test_a_move_to_where_it_is_copies_nothing(name):
    def pointers(weight):
        own = (getattr(weight._params, name) for name in weight._params._tensor_fields())
        return [tensor.data_ptr() for tensor in (weight._qdata, *own)]

    ours, _, columns = made(name)
    patched = net.add(ours, net.files(columns)["kohya"])
    layer = patched.model.diffusion_model.layer
    for patcher in (ours, patched):
        patcher.patch_model(patcher.load_device)
        try:
            start = pointers(layer.weight)
            layer.to("cpu")
            assert pointers(layer.weight) == start
            assert isinstance(layer.weight, torch.nn.Parameter) and "weight" in dict(layer.named_parameters())
        finally:
            patcher.unpatch_model(patcher.offload_device)


NATIVE = {"fp8": ("float8_e4m3fn", "TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
          "int8": ("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True}),
          "convrot": ("int8_tensorwise", "TensorWiseINT8Layout", {
              "per_channel": True, "convrot": True, "convrot_groupsize": 64,
              "conf": {"convrot": True, "convrot_groupsize": 64}}),
          "mxfp8": ("mxfp8", "TensorCoreMXFP8Layout", {})}


def native(name):
    """A net whose layer is multiplied with quantized activations, by ComfyUI's own code or by comfy-kitchen's SVDQuant.
    """
    import comfy.ops

    from quantized_transformers.quant.linear import with_tiles_of
    from quantized_transformers.quant.patches import loading

    mixed = comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32)
    if name in NATIVE:
        word, layout, options = NATIVE[name]
        tensors = net.host(word, layout, full=False, **options)
        tensors |= {"input_scale": torch.tensor(0.01)} if name == "fp8" else {}
        operations = with_tiles_of(mixed)
    else:
        tensors, operations = net.svdq("int4"), with_tiles_of(mixed, {"svdq_int4": "comfy_kitchen"})
    layer = net.linear_of({"bias": net.rand(net.ROWS, seed=2), **tensors}, 128, operations=operations)
    patcher = net.patcher_of(net.Net(layer, *net.rest(with_tiles_of(mixed))))
    loading.attach(patcher)
    return patcher, layer


@pytest.mark.parametrize("name", [*NATIVE, "svdq"])
def test_the_base_keeps_its_quantized_matmul(name):
    """With a LoRA in any state the layer gives what it gave, to the last bits, plus the LoRA; so it does when it is off
    again."""
    patcher, layer = native(name)
    x = net.rand(17, 128, seed=9)
    file = net.files(128)["kohya"]
    effect = 0.5 * (x @ file["layer.lora_down.weight"].t()) @ file["layer.lora_up.weight"].t()

    def out(p):
        with torch.inference_mode():
            return p.model.diffusion_model.layer(x)

    net_run, seen = net.run, {}
    try:
        net.run = lambda p, columns: out(p)
        for state in ("full", "low VRAM", "partial"):
            seen[state] = (net.STATES[state](patcher, 128), net.STATES[state](net.add(patcher, file), 128),
                           net.STATES[state](patcher, 128))
    finally:
        net.run = net_run
    plain = torch.nn.functional.linear(x, layer.weight.to(torch.float32).dequantize(), layer.bias.float())
    for before, after, again in seen.values():
        assert 1e-4 < net.rel(before, plain) < 0.3  # activations are quantized
        assert net.rel(after - before, effect) < 1e-5
        assert torch.equal(again, before)


@pytest.mark.parametrize("state", ["full", "low VRAM"])
def test_an_activation_that_the_host_fuses_with_int8(state):
    """ComfyUI sends INT8 weights past the Linear where an activation comes before it (Wan's and LTX's feed-forwards)."""
    import comfy.ops

    patcher, layer = native("int8")
    x, file = net.rand(17, 128, seed=9), net.files(128)["kohya"]
    act = torch.nn.functional.gelu(x, approximate="tanh")
    effect = 0.5 * (act @ file["layer.lora_down.weight"].t()) @ file["layer.lora_up.weight"].t()

    def out(p):
        p.patch_model(p.load_device, lowvram_model_memory=state == "low VRAM")
        try:
            with torch.inference_mode():
                return comfy.ops.linear_input_act(layer, x, "gelu_tanh")
        finally:
            p.unpatch_model(p.offload_device)

    before, after, again = out(patcher), out(net.add(patcher, file)), out(patcher)
    # the activation is quantized before or behind the host's own kernel's rounding: steps of 1 / 127
    assert net.rel(after - before, effect) < 2 ** -6
    assert torch.equal(again, before)


@pytest.mark.part(3)
@pytest.mark.parametrize("kind", ["kohya", "lokr", "dora", "bias and norm"])
@pytest.mark.parametrize("name", ["fp8", "int8", "nvfp4"])
def test_torch_compile_takes_a_layer_with_patches_whole(name, kind):
    ours, _, columns = made(name)
    patched = net.add(ours, net.files(columns)[kind])
    patched.patch_model(patched.load_device)
    try:
        expected = net.run(patched, columns)
        torch._dynamo.reset()
        with torch.inference_mode():
            compiled = torch.compile(patched.model.diffusion_model, backend="eager", fullgraph=True)
            assert torch.equal(compiled(net.rand(17, columns, seed=9)), expected)
    finally:
        patched.unpatch_model(patched.offload_device)
        torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["kohya", "dora"])
@pytest.mark.parametrize("name", ["fp8", "fp8 shards", "svdq int4"])
def test_the_host_counts_what_is_loaded(name, kind):
    """All that it has loaded is what it gets back, the patches with it."""
    ours, _, columns = made(name)
    patched = net.add(ours, net.files(columns)[kind])
    model = patched.model
    patched.patch_model(patched.load_device)
    try:
        loaded = model.model_loaded_weight_memory
        assert loaded >= sum(t.nbytes for t in model.state_dict().values()) - 4096  # markers
        freed = patched.partially_unload(patched.offload_device, memory_to_free=1 << 30)
        assert 0 <= model.model_loaded_weight_memory == loaded - freed <= 4096
    finally:
        patched.unpatch_model(patched.offload_device)
