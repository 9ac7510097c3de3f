"""The operators: every backend against the reference in float64, and what is the kernels' own."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leap_flatten import VARIANTS, ops
from leap_flatten.attention import Focused
from leap_flatten.ops import reference
from leap_shared.errors import UserError
from leap_shared.ops import use
from leap_shared.testing.operators import TOLERANCES, check_operator

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
every_backend = pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=needs_triton)])
fast_backends = pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=needs_triton)])

# Gradients of queries and features go through divisions by norms and shares, a few roundings more than TOLERANCES has.
FLOAT32 = {torch.float32: 3e-5}
SECOND_DERIVATIVES = {torch.float32: 5e-4}  # autograd's, through the reference: shares are divided by once more
OUTPUTS = ("query", "key", "value", "gain", "floor", "weight", "bias")


def sample(
    batch: int = 1,
    hw: tuple[int, int] = (3, 4),
    num_heads: int = 2,
    dim: int = 4,
    side: int = 3,
    kernels: str = "shared",
    prefix: int = 0,
    keys: int | None = None,
    power: float = 3.0,
    epsilon: float = 1e-6,
    gain: bool = True,
    position: bool = True,
    bias: bool = True,
    below: float = 0.0,
    seed: int = 0,
) -> list[Any]:
    """Arguments of the operator, inputs strided views of packed tensors; queries and keys are lowered by `below`."""
    generator = torch.Generator().manual_seed(seed)
    channels, count = num_heads * dim, prefix + hw[0] * hw[1]
    query, key, value = torch.randn(batch, count, 3 * channels, generator=generator).chunk(3, 2)
    if keys is not None:
        key, value = torch.randn(batch, keys, 2 * channels, generator=generator).chunk(2, 2)
    query -= below
    key -= below
    keys = keys or count
    gains = torch.rand(channels, generator=generator) + 0.5
    number = {"shared": dim, "own": channels, "none": 0}[kernels]
    weight = torch.randn(number, 1, side, side, generator=generator)
    offset = torch.randn(number, generator=generator)
    return [
        query,
        key,
        value,
        torch.randn(keys, channels, generator=generator) if position else None,
        gains if gain else None,
        1e-6 * gains,
        weight if number else None,
        offset if number and bias else None,
        num_heads,
        power,
        epsilon,
        *hw,
    ]


def backward_of(args: list[Any], seed: int = 1) -> list[Any]:
    """Arguments of the backward operator for those of the forward one."""
    gradient = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(seed)).to(args[0])
    return [gradient, *args[:7], *args[8:]]


def wanted(args: list[Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output, and gradients of OUTPUTS, of the reference in float64."""
    double = [x.double() if isinstance(x, Tensor) else x for x in args]
    other = [x.double() if isinstance(x, Tensor) else x for x in backward_of(args)]
    return ops.focused_linear_attention.reference(*double), ops.focused_linear_attention_backward.reference(*other)


def run(backend: str, args: list[Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of a backend."""
    with use(backend):
        return ops.focused_linear_attention(*args), ops.focused_linear_attention_backward(*backward_of(args))


def check_both(backend: str, args: list[Any], tolerance: float) -> None:
    """Both operators agree with the reference in float64, relative to the largest number of each tensor.

    Where almost all of a gradient cancels, as a query's does with one key, its terms of about 1 are what is rounded.
    """
    (out, found), (want, gradients) = run(backend, args), wanted(args)
    for name, got, value in zip(("output", *OUTPUTS), (out, *found), (want, *gradients), strict=True):
        assert got.shape == value.shape, name
        if value.numel():
            error = (got.double() - value).abs().max() / value.abs().max().clamp_min(1e-2)
            assert error <= tolerance, f"{name} is off by {error:.2g} of its largest number"


SAMPLES = [
    sample(num_heads=1, hw=(2, 3)),
    sample(kernels="own", power=2.5, gain=False, position=False, prefix=1),  # folded
    sample(batch=3, num_heads=1, kernels="none", hw=(1, 11), power=2.0, epsilon=1e-6 / 11),
    sample(hw=(4, 3), kernels="none", keys=5, power=4.0),  # reduced
    sample(side=5, dim=2, hw=(2, 5), bias=False, epsilon=1e-6 / 10, below=1.0),  # heads are dead
]


@fast_backends
def test_forward_and_its_gradients_agree_with_float64(backend: str) -> None:
    check_operator(ops.focused_linear_attention, SAMPLES, [backend], FLOAT32)


@fast_backends
def test_backward_agrees_with_float64_and_so_do_second_derivatives(backend: str) -> None:
    samples = [backward_of(args) for args in SAMPLES[:2]]
    check_operator(ops.focused_linear_attention_backward, samples, [backend], SECOND_DERIVATIVES)


@fast_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_agrees_with_float64(backend: str, dtype: torch.dtype) -> None:
    args = [x.to(dtype) if isinstance(x, Tensor) else x for x in sample(hw=(2, 5), prefix=1)]
    check_both(backend, args, TOLERANCES[dtype])


def test_projecting_operator_agrees_with_float64() -> None:
    _, _, _, position, gain, floor, weight, bias, *numbers = sample()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 8, generator=generator)
    linears = [torch.randn(*shape, generator=generator) * 0.4 for shape in [(8, 8), (8,)] * 4]
    args = [x, *linears[:6], position, gain, floor, weight, bias, *linears[6:], *numbers]
    check_operator(ops.focused_linear_attention_layer, [args], ["cpu"], {torch.float32: 1e-4})


@every_backend
@pytest.mark.parametrize("gain", [True, False], ids=["gain", "folded"])
def test_gradients_of_zero_tokens_are_finite_and_the_references(backend: str, gain: bool) -> None:
    args = sample(power=4.0, gain=gain, position=False)
    query, key = args[0].clone(), args[1].clone()
    query[:, :5], key[:, :3] = 0, 0
    query[:, 6], key[:, 4] = -1, -1
    args[:2] = query, key
    found = run(backend, args)[1]
    assert all(x.isfinite().all() for x in found)
    if gain:
        assert not found[0][:, :5].any(), "the derivative of relu at 0 is 0"
    check_both(backend, args, FLOAT32[torch.float32])


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dead_heads_are_finite_in_half_precision(backend: str, dtype: torch.dtype) -> None:
    args = [x.to(dtype) if isinstance(x, Tensor) else x for x in sample(position=False)]
    query, key = args[0].clone(), args[1].clone()
    query[..., :4], key[..., 4:] = -1, -1
    query[:, 3], key[:, 5] = -1, -1
    args[:2] = query, key
    out, found = run(backend, args)
    assert all(x.isfinite().all() for x in (out, *found))
    assert torch.allclose(out.double(), wanted(args)[0], atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@needs_triton
@given(
    hw=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    num_heads=st.integers(1, 2),
    dim=st.sampled_from([1, 3, 8, 17]),
    side=st.sampled_from([1, 3]),
    prefix=st.integers(0, 2),
    power=st.sampled_from([1.0, 2.0, 3.0, 0.7, 8.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=settings().max_examples // 8)
def test_kernels_take_every_rectangle_and_head(seed: int, **shapes: Any) -> None:
    check_both("triton", sample(**shapes, seed=seed), 1e-4)


@needs_triton
@pytest.mark.parametrize("programs", [1, 4])
def test_sums_over_several_tiles_and_parts_are_whole_and_repeat_bit_for_bit(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leap_flatten.ops import triton_tiles

    monkeypatch.setattr(triton_tiles, "PROGRAMS", programs)  # one part of several tiles, or several parts
    args = sample(hw=(3, 47), num_heads=1, side=1, prefix=3)
    check_both("triton", args, 1e-4)
    (out, found), (again, repeated) = run("triton", args), run("triton", args)
    assert all(torch.equal(x, y) for x, y in zip((out, *found), (again, *repeated), strict=True))


@needs_triton
def test_norms_are_over_more_channels_than_a_program_reads_at_once() -> None:
    from leap_flatten.ops import triton, triton_tiles

    x, gain = torch.randn(1, 5, 2100, generator=torch.Generator().manual_seed(0)), torch.full((2100,), 1.5)
    plan = triton_tiles.Plan.of(x, num_heads=30, power=3)
    peak, norm, length = triton.measured(x, None, gain, gain * 1e-6, plan)[0]
    features = reference.features(x, gain, gain * 1e-6)[0]
    assert torch.allclose(peak, features.amax(1))
    assert torch.allclose(norm, features.norm(dim=1))
    assert torch.allclose(length, (features / features.amax(1, keepdim=True)).pow(3).norm(dim=1))


@needs_triton
def test_nan_goes_through_the_kernels_to_the_output() -> None:
    args = sample(kernels="none", num_heads=1)
    query = args[0].clone()
    query[0, 2, 1] = torch.nan
    out = run("triton", [query, *args[1:]])[0]
    assert out[0, 2].isnan().all()
    assert out[0, 3:].isfinite().all()


@needs_triton
@pytest.mark.parametrize("name", VARIANTS)
def test_kernels_take_every_published_layer(name: str) -> None:
    from leap_flatten.ops import triton

    with torch.device("meta"):
        layers = [layer for layer in timm.create_model(name).modules() if isinstance(layer, Focused)]
    assert layers
    for layer in layers:
        x = layer.positional_encoding
        assert triton.refusal(x, x, x, layer.dwc.weight, layer.num_heads) is None


@needs_triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {0: torch.randn(1, 12, 8).double()},
            "it takes float32, bfloat16 and float16, not torch.float32, torch.float64",
        ),
        ({1: torch.randn(1, 5, 8), 2: torch.randn(1, 5, 8)}, "it convolves values of all 12 tokens, not of 5"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_with_its_reason(change: dict[int, Tensor], message: str) -> None:
    args = sample()
    for index, value in change.items():
        args[index] = value
    with use("triton"), pytest.raises(UserError, match=message):
        ops.focused_linear_attention(*args)
    with use("triton"), pytest.raises(UserError, match=message):
        ops.focused_linear_attention_backward(*backward_of(args))


@needs_triton
def test_heads_of_too_many_channels_are_refused_with_the_limit() -> None:
    with use("triton"), pytest.raises(UserError, match="a head of 136 channels is more than the 128"):
        ops.focused_linear_attention(*sample(num_heads=1, dim=136))


def on_gpu(args: list[Any], dtype: torch.dtype) -> list[Any]:
    return [x.to("cuda", dtype) if isinstance(x, Tensor) else x for x in args]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "operator", [ops.focused_linear_attention, ops.focused_linear_attention_backward], ids=["forward", "backward"]
)
def test_kernels_on_a_gpu_agree_with_float64(operator: Any) -> None:
    samples = SAMPLES if operator is ops.focused_linear_attention else [backward_of(args) for args in SAMPLES]
    check_operator(operator, samples, ["triton"], {**TOLERANCES, torch.float32: 1e-4})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("size", "heads", "dim"),
    [(56, 3, 32), (56, 1, 64), (28, 6, 32), (14, 5, 64), (7, 24, 32), (20, 1, 128), (9, 2, 48)],
)
def test_published_shapes_on_a_gpu_agree_with_the_reference(
    size: int, heads: int, dim: int, dtype: torch.dtype
) -> None:
    args = on_gpu(sample(batch=2, hw=(size, size), num_heads=heads, dim=dim, side=5), dtype)
    wide = [x.double() if isinstance(x, Tensor) else x for x in args]
    tolerance = {**TOLERANCES, torch.float32: 1e-4}[dtype]
    found = (run("triton", args), run("reference", wide))
    (out, gradients), (want, wanted_gradients) = found
    for name, got, value in zip(("output", *OUTPUTS), (out, *gradients), (want, *wanted_gradients), strict=True):
        error = (got.double() - value).abs().max() / value.abs().max()
        assert error <= tolerance, f"{name} is off by {error:.2g} of its largest number"
