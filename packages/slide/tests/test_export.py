"""Models leave PyTorch's eager mode, their process and their thread unchanged."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, images, model
from torch import Tensor, nn
from torch.export import Dim

import leap_slide as ls
from leap_shared.cli import App
from leap_shared.errors import UserError
from leap_shared.testing.operators import without_type_checks
from leap_shared.testing.processes import run_python
from leap_slide import export
from leap_slide.checkpoints import create_model, save_safetensors
from leap_slide.convert import reparameterize
from leap_slide.export import deployable, export_coreml, export_onnx
from leap_slide.functional import BACKENDS, resolved
from leap_slide.verbs.pictures import Export

# Of the largest number: compiled and exported graphs compute the same in another order. Gradients of tables and kernels
# are sums over all tokens that partly cancel.
SAME, GRADIENT = 2e-6, 1e-4
HW = (32, 64)
OPERATOR = "leap_slide.slide_attention.default"
onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")), reason="needs onnx"
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    with without_type_checks():
        yield


def apart(got: Any, wanted: Tensor) -> float:
    """Largest difference over the largest number."""
    difference = (torch.as_tensor(got) - wanted).detach().abs().max()
    return float(difference / wanted.detach().abs().max().clamp_min(1e-12))


def layer(**options: Any) -> ls.SlideAttention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ls.SlideAttention(12, 3, **options)


def given(layout: str) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 20, 12, generator=generator)
    return (tokens, (4, 5)) if layout == "tokens" else (tokens.transpose(1, 2).reshape(2, 12, 4, 5),)


def gradients(network: nn.Module, call: Callable[..., Tensor], *inputs: Any) -> dict[str, Tensor]:
    network.zero_grad()
    call(*inputs).square().sum().backward()
    return {name: x.grad.clone() for name, x in network.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("backend", ["auto", "conv"])
@pytest.mark.parametrize("layout", ["tokens", "maps"])
def test_layers_compile_whole_in_training(layout: str, backend: str, merged: bool) -> None:
    network = layer(backend=backend)
    if merged:
        network.reparameterize()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert apart(compiled(*given(layout)), network(*given(layout))) < SAME
    wanted, found = (gradients(network, call, *given(layout)) for call in (network, compiled))
    assert wanted.keys() == found.keys()
    assert all(apart(found[name], wanted[name]) < GRADIENT for name in wanted if name != "dep_conv.weight")


@pytest.mark.parametrize("family", FAMILIES)
def test_models_compile_whole(family: str) -> None:
    network, x = model(family, HW), images(HW)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert apart(compiled(x), network(x)) < SAME


def test_models_compile_whole_in_training() -> None:
    network, x = model("pvt", HW).train(), images(HW)
    wanted = gradients(network, network, x)
    found = gradients(network, torch.compile(network, fullgraph=True, backend="aot_eager"), x)
    assert all(apart(found[name], wanted[name]) < GRADIENT for name in wanted)


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

network, x = model("pvt", (32, 64)), images((32, 64))
with torch.no_grad():
    wanted = network(x)
    difference = torch.compile(network, fullgraph=True)(x) - wanted
print(float(difference.abs().max() / wanted.abs().max()))
"""


@pytest.mark.slow
def test_models_compile_to_machine_code() -> None:
    assert float(run_python(MACHINE_CODE, Path(__file__).parent)) < SAME


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_programs_take_every_batch_and_only_ordinary_operations(family: str) -> None:
    network = model(family, HW)
    shapes = ({0: Dim("batch", min=1, max=64)},)
    program = torch.export.export(network, (images(HW),), dynamic_shapes=shapes, strict=False)
    assert not any("leap_slide" in str(node.target) for node in program.graph.nodes)
    x = images(HW, batch=3, seed=4)
    assert apart(program.module()(x), network(x)) < SAME


def test_exported_programs_keep_the_operator_that_gemm_asks_for() -> None:
    network = deployable(model("swin", HW), "gemm")
    shapes = ({0: Dim("batch", min=1, max=64)},)
    program = torch.export.export(network, (images(HW),), dynamic_shapes=shapes, strict=False)
    assert OPERATOR in {str(node.target) for node in program.graph.nodes}
    x = images(HW, batch=3, seed=4)
    assert apart(program.module()(x), network(x)) < SAME


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_automatic_becomes_convolutions_on_mps(backend: str) -> None:
    assert resolved(backend, torch.device("mps")) == ("conv" if backend == "auto" else backend)
    assert resolved(backend, torch.device("cpu")) == resolved(backend, torch.device("cuda")) == backend


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("backend", export.BACKENDS)
def test_what_is_deployed_is_a_copy_that_gives_the_same(backend: str, merged: bool) -> None:
    network, x = model("pvt", HW).train().double(), images((64, 64))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    deployed = deployable(network, backend, 64, merged)
    assert not deployed.training
    assert network.training
    for attention in (found for found in deployed.modules() if isinstance(found, ls.SlideAttention)):
        assert (attention.backend, attention.reparameterized) == (backend, merged)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.set_input_size(64)
    assert apart(deployed(x), network.eval()(x.double())) < SAME


def test_what_is_merged_already_is_deployed_too() -> None:
    network = reparameterize(model("pvt", HW))
    assert torch.equal(deployable(network)(images(HW)), deployable(network)(images(HW)))
    assert apart(deployable(network)(images(HW)), network(images(HW))) < SAME


def run(path: Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


ALL = [
    pytest.param(family, backend, marks=() if (family, backend) == ("pvt", "conv") else pytest.mark.slow)
    for family in FAMILIES
    for backend in export.BACKENDS
]


@onnx
@pytest.mark.parametrize(("family", "backend"), ALL)
def test_models_run_in_onnxruntime_with_every_batch(family: str, backend: str, tmp_path: Path) -> None:
    if torch.__version__ < (2, 9) and family != "pvt":
        pytest.skip("older exporters don't translate all operations where a size is dynamic")
    network, path = model(family, HW), tmp_path / "m.onnx"
    done = export_onnx(network, path, backend)
    for batch in (1, 5):
        x = images(HW, batch, seed=batch)
        assert apart(run(path, x), network(x)) < 2 * SAME
    assert done.path == path
    assert done.opset == export.OPSET
    assert done.difference is not None
    assert 0 < done.difference < 1e-4
    assert not any("::" in name for name in done.operators)
    assert ("Einsum" in done.operators) == (backend == "gemm")
    assert [found.name for found in tmp_path.iterdir()] == ["m.onnx"]


@onnx
def test_two_paths_of_one_picture_run_at_another_size_and_opset(tmp_path: Path) -> None:
    network, path = model("pvt", HW), tmp_path / "m.onnx"
    done = export_onnx(network, path, img_size=32, opset=20, dynamic_batch=False, reparameterize=False)
    assert network.img_size == HW
    network.set_input_size(32)
    x = images((32, 32), 1)
    assert apart(run(path, x), network(x)) < 2 * SAME
    assert done.opset == 20


class Alone(nn.Module):
    """A layer that pictures go into, for the shortest of exports."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = ls.SlideAttention(3, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x + self.attention(x), x.mean(1)]


@onnx
def test_a_layer_in_another_model_is_exported_with_all_outputs(tmp_path: Path) -> None:
    done = export_onnx(Alone(), tmp_path / "m.onnx", img_size=(4, 6))
    assert done.operators["Conv"] == 2
    assert done.difference is not None
    unchecked = export_onnx(Alone(), tmp_path / "n.onnx", img_size=(4, 6), check=False)
    assert unchecked.difference is None


@onnx
def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*args: Any) -> nn.Module:
        other = deployable(*args)
        other.attention.proj.bias.add_(0.1)
        return other

    monkeypatch.setattr(export, "deployable", spoilt)
    with pytest.raises(RuntimeError, match=r"the \.onnx is 0\.1 away from the model"):
        export_onnx(Alone(), tmp_path / "m.onnx", img_size=(4, 6))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda at: export_onnx(Alone(), at / "m.onnx", "triton", 8), "backend 'triton' is none to export with"),
        (lambda at: export_onnx(Alone(), at / "m.pt", img_size=8), "m.pt: expected a name that ends in .onnx"),
        (lambda at: export_onnx(Alone(), at / "m.onnx"), "Alone has no img_size: give img_size=(height, width)"),
        (lambda at: export_onnx(Alone(), at / "m.onnx", img_size=8, opset=17), "opset 17: the exporter and the onnx"),
        (lambda at: export_onnx(model("pvt"), at / "m.onnx", img_size=40), "must be multiples of 32"),
        (lambda at: export_onnx(Alone(), at / "no" / "m.onnx", img_size=8), "cannot write"),
    ],
)
@onnx
def test_a_bad_option_is_named(call: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        call(tmp_path)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("missing", "call"),
    [
        ("onnx", lambda: export_onnx(Alone(), "m.onnx", img_size=8)),
        ("onnxscript", lambda: export_onnx(Alone(), "m.onnx", img_size=8)),
        ("coremltools", lambda: export_coreml(Alone(), "m.mlpackage", img_size=8)),
    ],
)
def test_a_missing_library_is_named(missing: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UserError, match=f"needs {missing}: pip install"):
        call()


@pytest.mark.parametrize("family", FAMILIES)
def test_convolutions_have_at_most_the_five_dimensions_of_core_ml(family: str) -> None:
    network = deployable(model(family, HW))
    widest = {}
    for attention in (found for found in network.modules() if isinstance(found, ls.SlideAttention)):
        program = torch.export.export(attention, (torch.randn(1, 32, attention.dim), (4, 8)), strict=False)
        for node in program.graph.nodes:
            if node.op == "call_function" and isinstance(node.meta["val"], Tensor):
                widest[str(node)] = node.meta["val"].ndim
    assert max(widest.values()) == 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of coremltools and of torch.jit
@pytest.mark.parametrize("family", FAMILIES)
def test_models_become_packages_of_core_ml(family: str, tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    done = export_coreml(model(family, HW), path := tmp_path / "m.mlpackage")
    assert path.is_dir()
    assert done.operators["conv"] >= 4
    assert [found.name for found in tmp_path.iterdir()] == ["m.mlpackage"]
    with pytest.raises(UserError, match="exists already"):
        export_coreml(model(family, HW), path)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_copied_pickled_and_restored(family: str, merged: bool) -> None:
    network, other = model(family, HW), model(family, HW)
    for parameter in other.parameters():
        parameter.data.zero_()
    if merged:
        network, other = reparameterize(network), reparameterize(other)
    other.load_state_dict(network.state_dict())
    x, unpickled = images(HW), pickle.loads(pickle.dumps(network))  # noqa: S301 - its own
    with torch.no_grad():
        wanted = network(x)
        for again in (copy.deepcopy(network), unpickled, other):
            assert torch.equal(again(x), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_train_after_inference_mode(family: str) -> None:
    network, x = model(family, HW), images(HW)
    with torch.inference_mode():
        wanted = network(x).clone()
    network.train()
    found = gradients(network, network, x)
    assert found
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert apart(network.eval()(x), wanted) < SAME


@pytest.mark.parametrize("family", FAMILIES)
def test_models_run_and_train_in_threads_at_once(family: str) -> None:
    inputs = [images(HW, batch=1 + number % 3, seed=number) for number in range(6)]
    networks = [model(family, HW) for _ in inputs]

    def both(number: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            out = networks[number](inputs[number])
        return out, gradients(networks[number], networks[number], inputs[number])

    wanted = [both(number) for number in range(len(inputs))]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(both, range(len(inputs))))
    for (out, gradient), (other, own) in zip(found, wanted, strict=True):
        assert apart(out, other) < SAME
        assert all(apart(gradient[name], own[name]) < GRADIENT for name in own)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        App("leap-slide", "leap_slide", (Export,)).main(("export", *arguments))
    return int(stopped.value.code or 0)


@onnx
@pytest.mark.slow
def test_the_verb_writes_the_weights_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    network = create_model("slide_pvt_tiny", img_size=32).eval()
    save_safetensors(network, Path("w.safetensors"))
    arguments = ("slide_pvt_tiny", "m.onnx", "--img-size", "32", "--backend", "conv")
    assert call(*arguments, "--checkpoint", "w.safetensors", "--json") == 0
    told = capsys.readouterr()
    facts = json.loads(told.out)
    assert (facts["file"], facts["weights"], facts["image_size"]) == ("m.onnx", "w.safetensors", [32, 32])
    assert facts["largest_difference"] < 1e-4
    assert "random" not in told.err
    x = images((32, 32))
    assert apart(run(Path("m.onnx"), x), network(x)) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("slide_pvt_tini", "m.onnx"), "did you mean slide_pvt_tiny"),
        (("slide_pvt_tiny", "m.pt"), "expected a name that ends in .onnx"),
        (("slide_pvt_tiny", "m.onnx", "--checkpoint", "absent.pth"), "absent.pth"),
        (("slide_pvt_tiny", "m.onnx", "--img-size", "30"), "must be multiples of 32"),
        (("slide_pvt_tiny", "m.onnx", "--img-size", "32", "32", "32"), "expected a height and a width"),
        (("slide_pvt_tiny", "m.mlpackage", "--backend", "gemm"), "Core ML takes conv"),
    ],
)
@onnx
def test_a_bad_argument_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())
