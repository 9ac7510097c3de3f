"""The Triton kernels of both operators against the reference in float64, and what is the kernels' own.

They run in Triton's interpreter, and those tests that are marked so on a GPU.
"""

from __future__ import annotations

import fnmatch
import math
from pathlib import Path
from typing import Any

import golden_adapter
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from leap_shared.errors import UserError
from leap_shared.ops import use
from leap_shared.testing import fill, golden
from leap_shared.testing.operators import TOLERANCES, check_operator
from leap_slide import ops

pytest.importorskip("triton")

# Relative to a tensor's largest number. Sums of hundreds of float32 products are behind it, in another order.
FLOAT32 = {torch.float32: 1e-5}
SECOND_DERIVATIVES = {torch.float32: 1e-4}  # autograd's, through the reference
OUTPUTS = ("query", "key", "value", "key_weight", "key_bias", "value_weight", "value_bias", "position")
CASES = golden.cases(Path(__file__).parent / "golden", "slide_attention")


def packed(layout: str, batch: int, heads: int, dim: int, height: int, width: int, generator: torch.Generator) -> Any:
    """Query, key and value as views of one tensor, head-major: channels last or first."""
    if layout == "last":
        x = torch.randn(batch, height, width, heads, 3, dim, generator=generator)
        return x.permute(4, 0, 3, 5, 1, 2).unbind(0)
    x = torch.randn(batch, heads, 3, dim, height, width, generator=generator)
    return x.unbind(2)


def sample(
    hw: tuple[int, int] = (3, 4),
    batch: int = 1,
    heads: int = 2,
    dim: int = 4,
    side: int = 3,
    layout: str = "last",
    own: bool = False,
    position: bool = True,
    keep: bool = False,
    on_logits: bool = False,
    masked: bool = False,
    padded: bool = False,
    seed: int = 0,
) -> list[Any]:
    """Arguments of the operator; kernels are such that logits stay of order 1 whatever the size."""
    generator = torch.Generator().manual_seed(seed)
    slots, around = side * side, side - 1
    query, key, value = packed(layout, batch, heads, dim, *hw, generator)
    if padded:
        _, key, value = packed(layout, batch, heads, dim, hw[0] + around, hw[1] + around, generator)
    tables: list[Tensor | None] = [None, None, None, None]
    for place in range(0, 4 if own else 2, 2):
        tables[place] = torch.randn(dim, slots, slots, generator=generator) / side
        tables[place + 1] = torch.randn(dim, slots, generator=generator)
    dropped = (torch.rand(batch, heads, slots, *hw, generator=generator) < 0.7) / 0.7
    return [
        query,
        key,
        value,
        *tables,
        torch.randn(heads, slots, generator=generator) if position else None,
        dropped if keep else None,
        dim**-0.5,
        on_logits,
        masked,
        padded,
    ]


def backward_of(args: list[Any], seed: int = 1) -> list[Any]:
    """Arguments of the backward operator for those of the forward one."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(args[0].shape, generator=generator).to(args[0]), *args]


def run(backend: str, args: list[Any]) -> tuple[Tensor, ...]:
    """Output and gradients of a backend."""
    with use(backend):
        return ops.slide_attention(*args), *ops.slide_attention_backward(*backward_of(args))


def wanted(args: list[Any]) -> tuple[Tensor, ...]:
    """What `run` is to find: the reference, in float64 on a CPU, of the same numbers."""
    double: list[Any] = [x.cpu().double() if isinstance(x, Tensor) else x for x in args]
    gradient: list[Any] = [x.cpu().double() if isinstance(x, Tensor) else x for x in backward_of(args)]
    return ops.slide_attention.reference(*double), *ops.slide_attention_backward.reference(*gradient)


def check_both(args: list[Any], tolerance: float) -> None:
    """Both operators agree with the reference in float64, relative to the largest number of each tensor.

    Where all of a gradient cancels, as with a single slot, its terms of about 1 are what is rounded.
    """
    for name, got, value in zip(("output", *OUTPUTS), run("triton", args), wanted(args), strict=True):
        assert got.shape == value.shape, name
        if value.numel():
            error = ((got.cpu().double() - value).abs().max() / value.abs().max().clamp_min(1e-2)).item()
            assert error <= tolerance, f"{name} is off by {error:.2g} of its largest number"


SAMPLES = {
    "packed": sample(),
    "channels first": sample((1, 5), 2, layout="first", heads=1, dim=3),
    "dropout": sample((2, 2), 3, heads=1, keep=True),
    "on logits, masked, own": sample((2, 4), on_logits=True, masked=True, own=True, heads=1),
    "padded": sample((2, 3), padded=True, own=True, layout="first", heads=1),
    "no position": sample((2, 2), heads=1, position=False, padded=True),
}


def test_forward_and_its_gradients_agree_with_float64_through_the_dispatcher() -> None:
    check_operator(ops.slide_attention, [SAMPLES["channels first"]], ["triton"], FLOAT32)


def test_backward_agrees_with_float64_through_the_dispatcher_and_so_do_second_derivatives() -> None:
    args = backward_of(sample((2, 4), side=1, own=True, heads=1))  # more taps make second derivatives slow
    check_operator(ops.slide_attention_backward, [args], ["triton"], SECOND_DERIVATIVES)


@pytest.mark.parametrize("name", SAMPLES)
def test_options_agree_with_float64(name: str) -> None:
    check_both(SAMPLES[name], FLOAT32[torch.float32])


@pytest.mark.parametrize(
    ("side", "dim", "hw"),
    [(1, 32, (3, 5)), (3, 17, (5, 3)), (3, 1, (1, 1)), (5, 3, (2, 3)), (5, 32, (3, 1)), (7, 8, (2, 1))],
)
def test_kernels_and_heads_of_every_size_agree_with_float64(side: int, dim: int, hw: tuple[int, int]) -> None:
    check_both(sample(hw, dim=dim, side=side, heads=1), FLOAT32[torch.float32])


@pytest.mark.parametrize(("hw", "padded"), [((9, 9), False), ((5, 7), True)], ids=["zeros", "padded"])
def test_maps_of_several_tiles_agree_with_float64(hw: tuple[int, int], padded: bool) -> None:
    check_both(sample(hw, heads=1, padded=padded, masked=not padded), FLOAT32[torch.float32])


@pytest.mark.parametrize("programs", [1, 6])
def test_sums_of_several_tiles_and_parts_are_whole(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from leap_slide.ops import triton_backward

    monkeypatch.setattr(triton_backward, "PROGRAMS", programs)  # one part of several tiles, or several parts
    check_both(sample((3, 9), batch=2, heads=1), FLOAT32[torch.float32])


@given(
    hw=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    heads=st.integers(1, 2),
    dim=st.sampled_from([1, 3, 8, 17]),
    side=st.sampled_from([1, 3]),
    layout=st.sampled_from(["first", "last"]),
    own=st.booleans(),
    position=st.booleans(),
    keep=st.booleans(),
    on_logits=st.booleans(),
    masked=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=settings().max_examples // 5, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_kernels_take_every_rectangle_layout_and_option(seed: int, **options: Any) -> None:
    check_both(sample(**options, seed=seed), 3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_agrees_with_float64(dtype: torch.dtype) -> None:
    args = [x.to(dtype) if isinstance(x, Tensor) else x for x in sample((2, 3), heads=1, keep=True, own=True)]
    out, *found = run("triton", args)
    assert {x.dtype for x in (out, *found[:3])} == {dtype}
    assert {x.dtype for x in found[3:]} == {torch.float32}
    check_both(args, TOLERANCES[dtype])


def test_shares_that_are_close_to_one_hot_are_finite_and_the_references() -> None:
    args = sample((2, 3), heads=1, masked=True)
    args[0] = args[0] * 1e4
    out, *found = run("triton", args)
    assert all(x.isfinite().all() for x in (out, *found))
    assert torch.allclose(out.double(), wanted(args)[0], atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, in the interpreter
def test_nan_goes_to_the_pixels_that_see_it_and_no_further() -> None:
    args = sample((2, 12), heads=1)
    key = args[1].clone()
    key[0, 0, 1, 1, 6] = math.nan
    args[1] = key
    assert run("triton", args)[0].isnan().any(2).any(2)[0, 0].nonzero().flatten().tolist() == [5, 6, 7]


def test_results_repeat_bit_for_bit() -> None:
    found, again = (run("triton", SAMPLES["channels first"]) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize("name", ["packed", "channels first", "padded"])
def test_memory_order_is_what_the_compiler_was_told(name: str) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        fake: list[Any] = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in SAMPLES[name]]
        told = ops.slide_attention(*fake), *ops.slide_attention_backward(fake[0], *fake)
    for what, got, want in zip(("output", *OUTPUTS), run("triton", SAMPLES[name]), told, strict=True):
        strides = [[step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1] for x in (got, want)]
        assert (got.shape, strides[0], got.dtype) == (want.shape, strides[1], want.dtype), what


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (sample(dim=136, side=1), "a head of 136 channels is more than the 128 that a program holds"),
        (sample(dim=1, side=9), "kernels of 9x9 have more slots than the 7x7 that a program holds"),
        (
            [x.double() if isinstance(x, Tensor) else x for x in sample()],
            "it takes float32, bfloat16 and float16, not torch.float64",
        ),
    ],
    ids=["head", "side", "dtype"],
)
def test_what_the_kernels_cannot_take_is_refused_with_its_reason(args: list[Any], message: str) -> None:
    with use("triton"), pytest.raises(UserError, match=message):
        ops.slide_attention(*args)
    with use("triton"), pytest.raises(UserError, match=message):
        ops.slide_attention_backward(*backward_of(args))


def test_registers_and_shared_memory_bound_the_tile_of_the_largest_call() -> None:
    from leap_slide.ops.triton import Plan

    query = torch.empty(1, 1, 1, 1, 1).expand(1, 1, 128, 200, 200)
    plan = Plan.of(query, torch.empty(1).expand(128, 49, 49))
    assert (plan.channels, plan.slots, plan.tile_height * plan.tile_width) == (128, 64, 32)
    assert Plan.of(query[..., :1, :1], torch.empty(128, 1, 1)).tile_width >= 16, "products need 16 rows"


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_layers_agree_with_their_gradients(case: golden.Case) -> None:
    state = fill.fill_state(case.schema)
    for pattern, scale in case["fill_scales"].items():
        state |= {key: fill.tensor(key, state[key].shape, scale) for key in fnmatch.filter(state, pattern)}
    for key, (shape, _) in case["constant_keys"].items():
        state[key] = np.tile(np.eye(shape[2] ** 2, dtype=np.float32), (shape[0] // shape[2] ** 2, 1)).reshape(shape)
    (one,) = case["inputs"]
    names = {"ka": "kernel_size", "share_dwc_kernel": "share_kernel", "rpb": "rel_pos_bias"}
    config = {names.get(key, key): value for key, value in case["constructor"].items()}
    hw, arrays = (config.pop("H"), config.pop("W")), case.arrays
    cotangent = fill.tensor("cotangent", arrays["output"].shape)
    with use("triton"):
        x = fill.tensor(one["name"], one["shape"], one["scale"])
        output, of_x, found = golden_adapter.attention(x, state, hw, config, cotangent)
    got = {"output": output, "grad_x": of_x} | {f"pgrad_{key}": x for key, x in found.items() if x is not None}
    assert {key for key in arrays if "grad_" in key} <= set(got)
    for key in arrays:
        values = got[key].detach().double().numpy()
        if key.startswith("pgrad_"):
            flat = values.ravel()
            places = np.linspace(0, flat.size - 1, 64).astype(int)
            values = np.concatenate([[flat.mean(), flat.std()], flat[places]])
        tolerance = case["tolerance" if key == "output" else "gradient_tolerance"]
        assert np.abs(values - arrays[key]).max() <= tolerance * np.abs(arrays[key]).max(), key


def on_gpu(args: list[Any], dtype: torch.dtype) -> list[Any]:
    return [x.to("cuda", dtype) if isinstance(x, Tensor) else x for x in args]


@pytest.mark.gpu
@pytest.mark.parametrize("operator", [ops.slide_attention, ops.slide_attention_backward], ids=["forward", "backward"])
def test_kernels_on_a_gpu_agree_with_float64_through_the_dispatcher(operator: Any) -> None:
    samples = [SAMPLES["packed"], SAMPLES["on logits, masked, own"]]
    samples = samples if operator is ops.slide_attention else [backward_of(args) for args in samples]
    check_operator(operator, samples, ["triton"], {**TOLERANCES, torch.float32: 1e-4})


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options_on_a_gpu_agree_with_float64(name: str, dtype: torch.dtype) -> None:
    check_both(on_gpu(SAMPLES[name], dtype), {**TOLERANCES, torch.float32: 1e-4}[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(
    ("size", "heads", "dim", "side"),
    [(56, 3, 32, 3), (28, 6, 32, 3), (56, 1, 64, 3), (56, 3, 32, 5), (29, 2, 32, 7), (14, 1, 128, 7), (9, 2, 24, 1)],
)
def test_published_shapes_on_a_gpu_agree_with_float64(
    size: int, heads: int, dim: int, side: int, layout: str, dtype: torch.dtype
) -> None:
    args = on_gpu(sample((size, size), 2, heads, dim, side, layout, keep=True), dtype)
    check_both(args, {**TOLERANCES, torch.float32: 1e-4}[dtype])


@pytest.mark.gpu
def test_results_on_a_gpu_repeat_bit_for_bit() -> None:
    args = on_gpu(sample((56, 56), 4, 3, 32), torch.bfloat16)
    found, again = run("triton", args), run("triton", args)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
