"""Models leave PyTorch's eager mode, full precision and their process unchanged."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, drawn, images, model
from torch import Tensor, nn
from torch.export import Dim

import leap_flatten as lf
from leap_flatten.convert import fuse_for_inference
from leap_shared.ops import use
from leap_shared.testing.operators import without_type_checks
from leap_shared.testing.processes import run_python

# Of the largest number: compiled and exported graphs compute the same in another order. Gradients of tables and norms
# are sums over all tokens that partly cancel.
SAME, GRADIENT = 2e-6, 1e-4
HALVES = (torch.float16, torch.bfloat16)
HW = (32, 64)
LARGE = ("swin", "pvt_v2", "cswin")
TRACED = [pytest.param(family, marks=pytest.mark.slow) if family in LARGE else family for family in FAMILIES]
OPERATOR = "leap_flatten.focused_linear_attention.default"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    with without_type_checks():
        yield


def apart(got: Any, wanted: Tensor) -> float:
    """Largest difference over the largest number."""
    difference = (torch.as_tensor(got) - wanted).detach().abs().max()
    return float(difference / wanted.detach().abs().max().clamp_min(1e-12))


@pytest.mark.parametrize("family", TRACED)
def test_models_compile_whole(family: str) -> None:
    network, x = model(family, HW), images(HW)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert apart(compiled(x), network(x)) < SAME


def test_models_compile_whole_in_training() -> None:
    network, x = model("deit", HW).train(), images(HW)
    network(x).square().sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    network.zero_grad()
    torch.compile(network, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    assert all(apart(parameter.grad, wanted[name]) < GRADIENT for name, parameter in network.named_parameters())


def test_folded_models_compile_whole() -> None:
    network, x = fuse_for_inference(model("deit", HW)), images(HW)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert apart(compiled(x), network(x)) < SAME


def test_one_compiled_graph_serves_every_batch() -> None:
    network, graphs = model("pvt", HW), []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=count)
    for batch in (2, 3, 5):
        assert apart(compiled(images(HW, batch)), network(images(HW, batch))) < SAME
    assert len(graphs) == 1


MACHINE_CODE = """
import torch
from tiny import images, model

network, x = model("swin", (32, 64)), images((32, 64))
with torch.no_grad():
    wanted = network(x)
    difference = torch.compile(network, fullgraph=True)(x) - wanted
print(float(difference.abs().max() / wanted.abs().max()))
"""


@pytest.mark.slow
def test_models_compile_to_machine_code() -> None:
    assert float(run_python(MACHINE_CODE, Path(__file__).parent)) < SAME


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_programs_take_every_batch_and_keep_the_operator(family: str) -> None:
    network = model(family, HW)
    shapes = ({0: Dim("batch", min=1, max=64)},)
    program = torch.export.export(network, (images(HW),), dynamic_shapes=shapes, strict=False)
    assert OPERATOR in {str(node.target) for node in program.graph.nodes}
    x = images(HW, batch=3, seed=4)
    assert apart(program.module()(x), network(x)) < SAME


def to_onnx(network: nn.Module, x: Tensor, **options: Any) -> Any:
    """The network in onnxruntime: a function of one array."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(network, (x,), dynamo=True, verbose=False, **options)
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    session = runtime.InferenceSession(buffer.getvalue())
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})[0]


@pytest.mark.parametrize("family", TRACED)
def test_models_run_in_onnxruntime(family: str) -> None:
    network, x = model(family, HW), images(HW)
    assert apart(to_onnx(network, x)(x), network(x)) < SAME


def test_folded_models_run_in_onnxruntime() -> None:
    network, x = model("deit", HW), images(HW)
    assert apart(to_onnx(fuse_for_inference(network), x)(x), network(x)) < SAME


@pytest.mark.slow
def test_models_run_in_onnxruntime_with_every_batch() -> None:
    if torch.__version__ < (2, 9):
        pytest.skip("older exporters don't translate addcmul where a size is dynamic")
    network = model("cswin", HW)
    run = to_onnx(network, images(HW), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    assert apart(run(images(HW, 5)), network(images(HW, 5))) < SAME


def dead(network: Any) -> Any:
    """The network with half of its linear heads' queries below 0 everywhere."""
    with torch.no_grad():
        for layer in network.modules():
            projection = getattr(layer, "q", getattr(layer, "qkv", None))
            if isinstance(projection, nn.Linear) and projection.bias is not None:
                projection.bias[: projection.in_features // 2] -= 50
    return network


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_models_are_finite_with_dead_heads(family: str, dtype: torch.dtype) -> None:
    network, x = dead(model(family, HW, qkv_bias=True)), images(HW)
    wanted = network(x)
    with torch.autocast("cpu", dtype=dtype):
        out = network(x)
    assert out.isfinite().all()
    assert apart(out.float(), wanted) < 32 * torch.finfo(dtype).eps
    out.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_models_are_finite_with_dead_heads(family: str, dtype: torch.dtype) -> None:
    network, x = dead(model(family, HW, qkv_bias=True)), images(HW)
    wanted = network(x)
    out = network.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert apart(out.float(), wanted) < 32 * torch.finfo(dtype).eps
    out.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_copied_pickled_and_restored(family: str, folded: bool) -> None:
    network = model(family, HW)
    network = fuse_for_inference(network) if folded else network
    other = drawn(model(family, HW), seed=7)
    other = fuse_for_inference(other) if folded else other
    other.load_state_dict(network.state_dict())
    x, unpickled = images(HW), pickle.loads(pickle.dumps(network))  # noqa: S301 - its own
    with torch.no_grad():
        wanted = network(x)
        for again in (copy.deepcopy(network), unpickled, other):
            assert torch.equal(again(x), wanted)


def test_every_backend_gives_the_half_model_the_same() -> None:
    network, x = dead(lf.FocusedLinearAttention(12, 6, (5, 7))).half(), torch.randn(2, 35, 12).half()
    with torch.no_grad():
        with use("reference"):
            wanted = network(x)
        with use("cpu"):
            assert apart(network(x), wanted) < 4 * torch.finfo(torch.float16).eps
