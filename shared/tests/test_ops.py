from __future__ import annotations

import contextlib
import importlib.util
import itertools
import threading
from collections.abc import Sequence

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from leap_shared import ops
from leap_shared.errors import UserError
from leap_shared.ops import operator
from leap_shared.testing.operators import TOLERANCES, check_operator, prefer_interpreter, without_type_checks

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.delenv("LEAP_OPS", raising=False)


@operator("leap_test::row_softmax")
def row_softmax(x: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Softmax over each row."""
    weights = (x - x.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


@operator("leap_test::row_softmax_backward")
def row_softmax_backward(
    gradient: Float[Tensor, "rows columns"], out: Float[Tensor, "rows columns"]
) -> Float[Tensor, "rows columns"]:
    return out * (gradient - (gradient * out).sum(-1, keepdim=True))


@row_softmax.backend("cpu")
def _(x):
    return torch.softmax(x, -1)


@row_softmax_backward.backend("cpu")
def _(gradient, out):
    return torch.ops.aten._softmax_backward_data(gradient, out, -1, out.dtype)


@row_softmax.backend("triton", supports=lambda x: x.shape[-1] <= 1024 or "more than 1024 columns do not fit")
def _(x):
    import triton_kernels

    return triton_kernels.softmax(x)


@row_softmax_backward.backend("triton")
def _(gradient, out):
    import triton_kernels

    return triton_kernels.softmax_backward(gradient, out)


@row_softmax.backward(setup=lambda ctx, inputs, output: ctx.save_for_backward(output))
def _(ctx, gradient):
    return row_softmax_backward(gradient, *ctx.saved_tensors)


@operator("leap_test::scaled_relu")
def scaled_relu(
    x: Float[Tensor, "batch channels"], bias: Float[Tensor, " channels"] | None = None, scale: float = 2.0
) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, " batch"]]:
    """Bias, ReLU and scale in one; and the sum of each row. It has no backward of its own."""
    shifted = x if bias is None else x + bias
    out = shifted.relu() * scale
    return out, out.sum(-1)


@scaled_relu.backend("cpu", supports=lambda x, bias, scale: bias is not None)
def _(x, bias, scale):
    out = torch.add(x, bias).clamp_min_(0).mul_(scale)
    return out, out.sum(-1)


@scaled_relu.backend("triton", supports=lambda x, bias, scale: bias is not None or "it needs a bias")
def _(x, bias, scale):
    import triton_kernels

    return triton_kernels.scaled_relu(x, bias, scale)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return row_softmax(scaled_relu(self.linear(x), self.linear.bias)[0])


def _samples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 6, generator=generator)
    return x, torch.randn(6, generator=generator)


BACKENDS = ["reference", "cpu", pytest.param("triton", marks=needs_triton)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_softmax_agrees_with_float64(backend):
    check_operator(row_softmax, [(_samples()[0],), (torch.randn(2, 33),)], [backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_with_two_outputs_optional_argument_and_no_backward_agrees_with_float64(backend):
    check_operator(scaled_relu, [(*_samples(), 0.5), _samples(1), (_samples()[0], None, 3.0)], [backend])


def test_operator_that_is_a_backward_pass_can_be_checked_itself():
    check_operator(row_softmax_backward, [(_samples()[0], _samples(1)[0].softmax(-1))])


@gpu
@needs_triton
@pytest.mark.parametrize("tested", [row_softmax, row_softmax_backward, scaled_relu], ids=lambda tested: tested.name)
def test_triton_agrees_with_float64_on_a_gpu(tested):
    x, bias = torch.randn(37, 200), torch.randn(200)
    samples = {"row_softmax": (x,), "row_softmax_backward": (x, x.softmax(-1)), "scaled_relu": (x, bias, 0.5)}
    assert ops.backends()["triton"] == "works"
    check_operator(tested, [samples[tested.name.split("::")[1]]], ["triton"], compile_backend="inductor")


@gpu
def test_cuda_tensors_choose_triton_and_fall_back_to_the_reference():
    assert row_softmax.chosen(torch.randn(2, 4, device="cuda")) == "triton"
    assert row_softmax.chosen(torch.randn(2, 2000, device="cuda")) == "reference"


_number = itertools.count()


def _broken(**parts):
    """An operator y = 2x whose named parts are replaced."""

    def double(x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        return x * 2

    def save(ctx, inputs, output):
        pass

    broken = operator(f"leap_test::broken_{next(_number)}")(double)
    broken.backend("cpu")(parts.get("cpu", lambda x: x * 2))
    broken.backward(setup=save)(parts.get("backward", lambda ctx, gradient: gradient * 2))
    if "fake" in parts:
        broken.fake(parts["fake"])
    return broken


def _writes_to_input(x):
    out = x * 2
    x.add_(1)
    return out


@pytest.mark.parametrize(
    ("part", "function", "message"),
    [
        ("none", None, None),
        ("cpu", lambda x: x * 2.01, r"backend cpu, torch.float32, sample 0, as given: eager: output 0 is off by 0.0"),
        ("cpu", lambda x: torch.full_like(x, float("nan")), "output 0 is off by inf"),
        ("cpu", lambda x: (x * 2)[:, 1:], "as given.*shape"),
        ("cpu", lambda x: x.float() * 2, "bfloat16.*Dtypes"),
        ("cpu", lambda x: torch.empty_like(x).copy_(torch.as_strided(x, x.shape, (4, 1)) * 2), "non-contiguous"),
        ("cpu", lambda x: x * 2 if x.max() < 99 else x, "empty batch.*IndexError|RuntimeError"),
        ("cpu", _writes_to_input, "sample 0.*(mutat|modified|alias)"),
        ("backward", lambda ctx, gradient: gradient * 3, "gradient 0 is off by"),
        ("backward", lambda ctx, gradient: None, "gradient 0 is off by"),
        (
            "backward",
            lambda ctx, gradient: gradient.as_strided(gradient.shape, (4, 1)) * 2,
            "as given.*test_aot_dispatch_dynamic.*bounds",
        ),
        ("fake", lambda x: x.new_empty(x.shape[0], 1), "(?i)shape"),
    ],
    ids=lambda value: None if callable(value) else str(value)[:20],
)
def test_check_operator_finds_what_is_broken(part, function, message):
    broken = _broken(**{part: function})
    expectation = contextlib.nullcontext() if message is None else pytest.raises(AssertionError, match=message)
    with expectation:
        check_operator(broken, [(torch.arange(12.0).view(3, 4) / 7,)], ["cpu"])


def test_check_operator_empties_every_argument_that_shares_the_batch_axis():
    shapes = set()

    def add(
        x: Float[Tensor, "batch n"], bias: Float[Tensor, " n"], mask: Float[Tensor, "batch 1"] | None = None
    ) -> Float[Tensor, "batch n"]:
        return (x + bias) * mask

    added = operator("leap_test::add")(add)
    added.backend("cpu")(lambda *args: shapes.add(tuple(len(x) for x in args)) or add(*args))
    check_operator(added, [(torch.randn(2, 3), torch.randn(3), torch.randn(2, 1))], ["cpu"])
    assert {(2, 3, 2), (0, 3, 0)} <= shapes


def test_check_operator_finds_a_module_that_cannot_be_compiled():
    def untraceable(x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        return x * float(x.sum() > 0)

    broken = operator("leap_test::untraceable")(untraceable)
    with pytest.raises(AssertionError, match="backend reference"):
        check_operator(broken, [(torch.ones(3, 4),)])


def test_check_operator_refuses_a_backend_that_never_ran():
    with pytest.raises(AssertionError, match="triton: ran no sample: more than 1024 columns"):
        check_operator(row_softmax, [(torch.ones(1, 1025),)], ["triton"])
    with pytest.raises(AssertionError, match="ran no sample: no sample was given"):
        check_operator(row_softmax, [])


def test_tolerances_are_a_few_units_of_rounding():
    assert {dtype: round(value / torch.finfo(dtype).eps) for dtype, value in TOLERANCES.items()} == {
        torch.float32: 84,
        torch.bfloat16: 4,
        torch.float16: 4,
    }


def test_cpu_tensors_choose_the_cpu_version_and_fall_back_to_the_reference():
    x, bias = _samples()
    assert scaled_relu.chosen(x, bias) == "cpu"
    assert scaled_relu.chosen(x) == "reference"
    assert scaled_relu.chosen(x, scale=1.0, bias=bias) == "cpu"


def test_interpreter_is_never_chosen_unasked():
    assert row_softmax.chosen(torch.randn(2, 3)) == "cpu"


def test_cuda_tensors_choose_triton_but_not_its_interpreter(monkeypatch):
    with FakeTensorMode():
        x, wide = torch.empty(2, 3, device="cuda"), torch.empty(2, 1025, device="cuda")
    monkeypatch.setattr(ops, "_installed", lambda package: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert row_softmax.chosen(x) == "triton"
    assert row_softmax.chosen(wide) == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert row_softmax.chosen(x) == "reference"


def test_environment_is_read_at_call_time_and_use_wins(monkeypatch):
    x = _samples()[0]
    monkeypatch.setenv("LEAP_OPS", "reference")
    assert row_softmax.chosen(x) == "reference"
    with ops.use("cpu"):
        assert row_softmax.chosen(x) == "cpu"
        with ops.use("auto"):
            assert ops.requested() == "auto"
    assert ops.requested() == "reference"


def test_use_holds_in_other_threads():
    seen = []
    with ops.use("reference"):
        thread = threading.Thread(target=lambda: seen.append(ops.requested()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_unknown_backend_names_the_nearest(monkeypatch):
    monkeypatch.setenv("LEAP_OPS", "trition")
    with pytest.raises(UserError, match=r"unknown operator backend 'trition'.*did you mean triton"):
        row_softmax(_samples()[0])


def test_impossible_backend_says_why_and_which_can():
    x = _samples()[0]
    plain = operator("leap_test::plain")(row_softmax.reference)
    with ops.use("cpu"), pytest.raises(UserError, match=r"no cpu implementation.*choose from: reference$"):
        plain(x)
    with ops.use("cpu"), pytest.raises(UserError, match="does not support these shapes, dtypes or values"):
        scaled_relu(x)
    with ops.use("triton"), pytest.raises(UserError, match=r"more than 1024 columns.*choose from: reference, cpu$"):
        row_softmax(torch.ones(1, 1025))
    assert row_softmax.refusal("cpu", torch.ones(1, 1, device="meta")) == "the tensors are on meta, not on cpu"


def test_triton_without_gpu_or_interpreter_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ops, "_installed", lambda package: True)
    with ops.use("triton"), pytest.raises(UserError, match="no CUDA device; TRITON_INTERPRET=1"):
        row_softmax(_samples()[0])
    monkeypatch.setattr(ops, "_installed", lambda package: False)
    assert "pip install triton" in ops.backends()["triton"]
    monkeypatch.setattr(ops, "_installed", lambda package: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.backends() == {"reference": "works", "cpu": "works", "triton": "interpreter (no GPU)"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ops.backends()["triton"] == "interpreter (TRITON_INTERPRET=1)"


def test_reference_mode_is_the_reference_itself():
    x = _samples()[0].requires_grad_()
    with ops.use("reference"):
        assert "leap_test" not in row_softmax(x).grad_fn.name()
    assert "leap_test" in row_softmax(x).grad_fn.name()


def test_gradient_through_the_reference_can_be_differentiated_again():
    x, bias = (value.double().requires_grad_() for value in _samples())
    assert torch.autograd.gradcheck(scaled_relu, (x, bias, 1.5))
    assert torch.autograd.gradgradcheck(lambda x, bias: scaled_relu(x, bias, 1.5)[0].square(), (x, bias))


def test_gradient_flows_to_those_inputs_alone_that_need_it():
    x, bias = _samples()
    bias.requires_grad_()
    scaled_relu(x, bias)[1].sum().backward()
    assert x.grad is None
    assert torch.equal(bias.grad, 2.0 * (x + bias > 0).sum(0))


def test_operator_that_returns_its_input_returns_a_copy():
    def identity(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return x

    same = operator("leap_test::identity")(identity)
    x = torch.randn(4)
    assert same(x).data_ptr() != x.data_ptr()
    check_operator(same, [(x,)])


def test_compiled_graph_holds_the_operator_and_obeys_an_override_when_it_runs():
    calls = []
    counted = operator("leap_test::counted")(row_softmax.reference)
    counted.backend("cpu")(lambda x: calls.append("cpu") or torch.softmax(x, -1))
    x = _samples()[0]
    with without_type_checks():
        compiled = torch.compile(counted, fullgraph=True, backend="aot_eager")
        compiled(x)
        assert calls == ["cpu"]
        with ops.use("reference"):
            compiled(x)
    assert calls == ["cpu"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_module_that_calls_operators_compiles_whole_and_trains(backend):
    x, layer = _samples()[0], Layer()
    layer(x).square().sum().backward()
    wanted = layer.linear.weight.grad.clone()
    layer.zero_grad()
    torch.compiler.reset()
    with without_type_checks():
        torch.compile(layer, fullgraph=True, backend=backend)(x).square().sum().backward()
    assert torch.allclose(layer.linear.weight.grad, wanted, atol=1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_module_that_calls_operators_exports(strict):
    x, layer = _samples()[0], Layer()
    with without_type_checks():
        program = torch.export.export(layer, (x,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"leap_test.row_softmax.default", "leap_test.scaled_relu.default"} <= targets
    assert torch.allclose(program.module()(x), layer(x))


@pytest.mark.parametrize("exported", [False, True])
def test_exporter_to_onnx_takes_the_operations_of_the_reference(exported):
    pytest.importorskip("onnxscript")
    x, layer = _samples()[0], Layer().eval()
    with without_type_checks():
        source = torch.export.export(layer, (x,), strict=False) if exported else layer
        program = torch.onnx.export(source, None if exported else (x,), dynamo=True, verbose=False)
    domains = {node.domain for node in program.model.graph}
    assert domains <= {"", "ai.onnx"}
    assert {"Relu", "Exp", "ReduceSum"} <= {node.op_type for node in program.model.graph}


def test_shapes_that_are_dynamic_are_inferred_by_the_fake_and_not_by_the_reference():
    def double(x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        return x * 2

    turned = operator("leap_test::turned")(double)
    turned.backend("cpu")(lambda x: (x * 2).mT.contiguous().mT)
    turned.fake(lambda x: x.new_empty(x.shape[1], x.shape[0]).mT)

    class Turn(nn.Module):
        def forward(self, x):
            return turned(x)

    shapes = ({0: torch.export.Dim("batch", max=64)},)
    with without_type_checks():
        program = torch.export.export(Turn(), (_samples()[0],), dynamic_shapes=shapes, strict=False)
    (node,) = (node for node in program.graph.nodes if node.target == turned.overload)
    assert node.meta["val"].stride()[0] == 1


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_leaves_the_dtype_of_the_arguments(backend):
    def project(x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        return x @ x.mT @ x

    projection = operator(f"leap_test::project_{backend}")(project)
    projection.backend("cpu")(project)
    x = _samples()[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16), ops.use(backend):
        out = projection(x)
    assert torch.equal(out, project(x))
    wanted = torch.autograd.grad(project(x).sum(), x)[0]
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], wanted)


def test_gradient_inside_autocast_keeps_the_dtype_of_the_arguments():
    def project(x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        return x @ x.mT @ x

    projection = operator("leap_test::project")(project)
    x = _samples()[0].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(projection(x).sum(), x)
    assert torch.equal(got, torch.autograd.grad(project(x).sum(), x)[0])


def test_without_type_checks_restores_the_setting():
    with without_type_checks():
        assert jaxtyping.config.jaxtyping_disable
    assert not jaxtyping.config.jaxtyping_disable


def test_operator_keeps_the_documentation_and_lists_its_implementations():
    assert row_softmax.__doc__ == "Softmax over each row."
    assert list(row_softmax.implementations()) == ["reference", "cpu", "triton"]
    assert row_softmax.implementations()["reference"] is row_softmax.reference


def test_numbers_strings_lists_and_optional_values_reach_every_part_of_an_operator():
    seen = []

    def shift(
        x: Float[Tensor, "batch n"],
        steps: list[int],
        axes: Sequence[int],
        power: float | None = None,
        mode: str = "wrap",
    ) -> Float[Tensor, "batch n"]:
        seen.append((list(steps), list(axes), power, mode))
        return x.roll(steps, list(axes)) ** (power or 1.0)

    shifted = operator("leap_test::shift")(shift)
    shifted.backend("cpu", supports=lambda x, steps, axes, power, mode: mode == "wrap")(shift)
    x = _samples()[0].abs().requires_grad_()
    shifted(x, [1], [1], power=2.0).sum().backward()
    assert seen == [([1], [1], 2.0, "wrap")] * 2
    assert torch.allclose(x.grad, 2 * x.detach())
    assert shifted.chosen(x, [1], [1], mode="fold") == "reference"


def test_backends_may_lay_their_outputs_out_differently():
    def transposed(x: Float[Tensor, "batch n"]) -> Float[Tensor, "n batch"]:
        return (2 * x).mT

    turned = operator("leap_test::transposed")(transposed)
    turned.backend("cpu")(lambda x: (2 * x.mT).contiguous())
    check_operator(turned, [_samples()[:1]])


def test_outputs_that_share_memory_are_parted():
    def halves(x: Float[Tensor, " n"]) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        first, second = (2 * x).chunk(2)
        return first, second

    parted = operator("leap_test::halves")(halves)
    first, second = parted(torch.randn(4))
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    check_operator(parted, [(torch.randn(4),)])


def test_signatures_that_no_operator_can_have_are_refused():
    def keyword_only(x: Tensor, *, power: float) -> Tensor:
        return x**power

    def many(x: list[Float[Tensor, " n"]]) -> Tensor:
        return x[0] + x[1]

    with pytest.raises(UserError, match="give each tensor its own parameter"):
        operator("leap_test::keyword_only")(keyword_only)
    with pytest.raises(UserError, match="give each tensor its own parameter"):
        operator("leap_test::many")(many)
    with pytest.raises(UserError, match="a backend is cpu or triton, not 'cuda'"):
        row_softmax.backend("cuda")


def test_interpreter_is_asked_for_before_triton_is_imported(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(__import__("sys").modules, "triton", object())
    with pytest.raises(RuntimeError, match="Triton was imported before"):
        prefer_interpreter()
