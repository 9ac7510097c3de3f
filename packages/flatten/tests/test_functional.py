"""The functional form: against N x N matrices in float64, its invariances, its gradients, and what it refuses."""

from __future__ import annotations

from typing import Any

import direct
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leap_flatten.functional import check_finite, focus, focused_linear_attention, stretch
from leap_shared.errors import UserError
from leap_shared.testing.operators import without_type_checks

FLOAT32_ROUNDING = 2e-5  # relative to the largest number: powers and sums over tokens, each a few eps
FLOAT64_ROUNDING = 1e-11
POWERS = (2, 3, 4, 2.5, 8)


def arguments(
    batch: int = 2,
    hw: tuple[int, int] = (4, 6),
    num_heads: int = 2,
    dim: int = 4,
    kernel: int = 3,
    keys: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    prefix_tokens: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """Random arguments of `focused_linear_attention`; shapes given, others changed by name."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    channels, count = num_heads * dim, prefix_tokens + hw[0] * hw[1]
    keys = keys or count
    found = {"q": draw(batch, count, channels), "k": draw(batch, keys, channels), "v": draw(batch, keys, channels)}
    found |= {"num_heads": num_heads, "scale": draw(1, 1, channels, scale=0.7), "pos": draw(1, keys, channels)}
    found |= {"dwc_weight": draw(dim, 1, kernel, kernel), "dwc_bias": draw(dim)}
    return {**found, "hw": hw, "prefix_tokens": prefix_tokens, **changes}


def worst(got: Tensor, want: Tensor) -> float:
    """Largest error, relative to the largest number."""
    assert got.shape == want.shape
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30))


sizes = st.tuples(st.integers(1, 6), st.integers(1, 6))


@given(
    size=sizes,
    batch=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    dim=st.integers(1, 4),
    kernel=st.sampled_from([1, 3, 5, 7]),
    power=st.sampled_from(POWERS),
    denominator=st.sampled_from(["mean", "sum"]),
    prefix_tokens=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_every_rectangle_gives_what_its_matrices_give(
    size: tuple[int, int], power: float, denominator: str, dtype: torch.dtype, **shapes: Any
) -> None:
    given = arguments(hw=size, dtype=dtype, p=power, denominator=denominator, **shapes)
    tolerance = FLOAT32_ROUNDING if dtype == torch.float32 else FLOAT64_ROUNDING
    assert worst(focused_linear_attention(**given), direct.attention(**given)) <= tolerance


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("power", POWERS)
def test_each_backend_that_is_asked_for_gives_what_the_matrices_give(backend: str, power: float) -> None:
    given = arguments(hw=(7, 5), p=power)
    assert worst(focused_linear_attention(**given, backend=backend), direct.attention(**given)) <= FLOAT64_ROUNDING


@given(size=sizes, keys=st.integers(1, 36), denominator=st.sampled_from(["mean", "sum"]), seed=st.integers(0, 9))
def test_fewer_keys_are_stretched_for_the_convolution_only(
    size: tuple[int, int], keys: int, denominator: str, seed: int
) -> None:
    keys = min(keys, size[0] * size[1])
    given = arguments(hw=size, keys=keys, denominator=denominator, seed=seed)
    assert worst(focused_linear_attention(**given), direct.attention(**given)) <= FLOAT64_ROUNDING


@given(count=st.integers(1, 40), keys=st.integers(1, 40))
def test_stretching_interpolates_along_the_flattened_tokens(count: int, keys: int) -> None:
    value = torch.randn(1, min(keys, count), 2, dtype=torch.float64)
    want = direct.stretching(count, min(keys, count)) @ value
    assert torch.allclose(stretch(value, count), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("power", POWERS)
def test_gradients_are_those_of_the_function(power: float) -> None:
    given = arguments(batch=1, hw=(2, 3), num_heads=2, dim=2, kernel=3, p=power)
    names = ["q", "k", "v", "scale", "pos", "dwc_weight", "dwc_bias"]
    tensors = [given.pop(name).requires_grad_() for name in names]
    assert (torch.cat([tensors[0], tensors[1] + tensors[4]]).abs() > 1e-3).all()  # finite differences need smoothness

    def function(*inputs: Tensor) -> Tensor:
        return focused_linear_attention(**dict(zip(names, inputs, strict=True)), **given)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("prefix_tokens", [0, 1])
@pytest.mark.parametrize("denominator", ["mean", "sum"])
def test_gradients_hold_with_class_tokens_and_either_denominator(prefix_tokens: int, denominator: str) -> None:
    given = arguments(batch=1, hw=(2, 2), num_heads=1, dim=3, prefix_tokens=prefix_tokens, denominator=denominator)
    names = ["q", "k", "v", "scale", "pos", "dwc_weight", "dwc_bias"]
    tensors = [given.pop(name).requires_grad_() for name in names]

    def function(*inputs: Tensor) -> Tensor:
        return focused_linear_attention(**dict(zip(names, inputs, strict=True)), **given)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("power", [3, 4, 8, 32])
def test_tokens_without_a_positive_channel_have_finite_outputs_and_gradients(backend: str, power: int) -> None:
    """1e-6 to the eighth is 1e-48, which float32 does not have."""
    given = arguments(dtype=torch.float32, p=power)
    given["q"] = -given["q"].abs()
    given["k"] = -given["k"].abs() - given["pos"].abs()
    leaves = [given[name].requires_grad_() for name in ("q", "k", "v", "scale", "pos")]
    out = focused_linear_attention(**given, backend=backend)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    assert worst(out.detach(), direct.attention(**given)) <= FLOAT32_ROUNDING
    assert all(gradient.isfinite().all() for gradient in gradients)


@given(
    shape=st.sampled_from([(4,), (3, 5), (2, 3, 8)]),
    power=st.sampled_from([*POWERS, 1, 0.5]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_focus_keeps_norms_and_raises_ratios(shape: tuple[int, ...], power: float, scale: float, seed: int) -> None:
    x = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1) * scale
    got = focus(x, power)
    assert torch.allclose(got.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    want = (x.double() / x[..., :1].double()) ** power
    assert torch.allclose((got / got[..., :1]).double(), want, rtol=1e-4)


def test_focus_by_one_changes_nothing() -> None:
    x = torch.rand(3, 5)
    assert torch.allclose(focus(x, 1), x, rtol=1e-6)


def test_focus_leaves_zero_at_zero() -> None:
    assert torch.equal(focus(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_focus_in_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    x = torch.full((1, 8), 1e-6, dtype=torch.float64).to(dtype)  # its cube is 0 in float16
    assert torch.allclose(focus(x).double(), x.double(), rtol=0.05)
    assert focus(x).dtype == dtype


@given(seed=st.integers(0, 99))
def test_permuted_tokens_give_permuted_outputs_without_the_convolution(seed: int) -> None:
    given = arguments(seed=seed, dwc_weight=None, dwc_bias=None)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    permuted = {**given, **{name: given[name][:, order] for name in ("q", "k", "v", "pos")}}
    want = focused_linear_attention(**given)[:, order]
    assert torch.allclose(focused_linear_attention(**permuted), want, rtol=1e-10, atol=1e-12)


def test_order_of_keys_is_seen_by_the_convolution_alone() -> None:
    given, order = arguments(), torch.randperm(24, generator=torch.Generator().manual_seed(0))
    permuted = {**given, **{name: given[name][:, order] for name in ("k", "v", "pos")}}
    without = {"dwc_weight": None, "dwc_bias": None}
    plain = focused_linear_attention(**{**given, **without})
    assert torch.allclose(focused_linear_attention(**{**permuted, **without}), plain, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(focused_linear_attention(**permuted), focused_linear_attention(**given))


def dead(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments whose second head has no positive query, and whose first has no other."""
    query = given["q"].abs()
    query[..., 4:] = -query[..., 4:].abs()
    return {**given, "q": query}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_head_gives_its_convolution_alone(dtype: torch.dtype) -> None:
    given = dead(arguments(dtype=dtype))
    silent = {**given, "q": torch.full_like(given["q"], -1.0), "k": torch.full_like(given["k"], -1.0), "pos": None}
    convolved = direct.attention(**silent)
    got = focused_linear_attention(**given)
    assert (got[..., 4:].double() - convolved[..., 4:]).abs().max() <= 1e-5
    assert (got[..., :4].double() - convolved[..., :4]).abs().max() > 0.1


def test_denominators_differ_where_the_small_number_weighs() -> None:
    given = dead(arguments(hw=(8, 8), dwc_weight=None, dwc_bias=None))
    given["q"][..., 4:] = 1e-2  # beside the other head's, so that q . mean of k is about 1e-6
    mean, total = (focused_linear_attention(**given, denominator=name) for name in ("mean", "sum"))
    assert (mean - total)[..., 4:].abs().max() > 0.05
    assert (mean - total)[..., :4].abs().max() < 1e-3


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_packed_projections_are_read_by_their_strides_and_left_as_they_are(backend: str) -> None:
    given = arguments(dtype=torch.float32)
    packed = torch.stack([given[name] for name in "qkv"], 2)
    before = packed.clone()
    views = dict(zip("qkv", packed.unbind(2), strict=True))
    assert not views["q"].is_contiguous()
    got = focused_linear_attention(**{**given, **views}, backend=backend)
    assert torch.allclose(got, focused_linear_attention(**given, backend=backend), rtol=1e-6, atol=1e-6)
    assert torch.equal(packed, before)


def test_class_tokens_take_part_in_the_attention_and_not_in_the_convolution() -> None:
    given = arguments(prefix_tokens=1)
    plain = focused_linear_attention(**{**given, "dwc_weight": None, "dwc_bias": None})
    local = focused_linear_attention(**given) - plain
    assert (local[:, 0] == 0).all()
    changed = {**given, "v": given["v"].clone()}
    changed["v"][:, 0] += 1
    moved = focused_linear_attention(**{**changed, "dwc_weight": None, "dwc_bias": None})
    assert ((moved - plain).abs().amax((1, 2)) > 1e-3).all()
    assert torch.allclose(focused_linear_attention(**changed) - moved, local, atol=1e-12)


def test_one_kernel_for_each_channel_may_be_given() -> None:
    given = arguments()
    repeated = {"dwc_weight": given["dwc_weight"].repeat(2, 1, 1, 1), "dwc_bias": given["dwc_bias"].repeat(2)}
    assert torch.equal(focused_linear_attention(**{**given, **repeated}), focused_linear_attention(**given))


def test_square_map_needs_no_size() -> None:
    given = arguments(hw=(5, 5))
    assert torch.equal(focused_linear_attention(**{**given, "hw": None}), focused_linear_attention(**given))


def test_empty_batch_gives_an_empty_output() -> None:
    given = arguments()
    empty = {**given, **{name: given[name][:0] for name in "qkv"}}
    assert focused_linear_attention(**empty).shape == (0, 24, 8)


def test_input_that_a_model_made_is_not_looked_at_for_nan() -> None:
    """A training that diverges is stopped by its loss, which names the step."""
    x = torch.tensor([float("nan")], requires_grad=True)
    check_finite("x", x * 2)
    with pytest.raises(UserError, match=r"x of shape \(1,\) holds NaN or infinity"):
        check_finite("x", x)


def test_large_finite_numbers_whose_sum_overflows_are_no_error() -> None:
    check_finite("x", torch.full((4,), 3e38))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_of_torch_see_no_check_of_values() -> None:
    given = arguments(batch=1)
    query = given.pop("q")
    mapped = torch.func.vmap(lambda q: focused_linear_attention(q, **given))(query[None])
    assert torch.equal(mapped[0], focused_linear_attention(query, **given))


def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_triton_without_a_gpu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    with pytest.raises(UserError, match=r"backend='triton'.*CUDA.*or leave backend='auto'"):
        focused_linear_attention(**arguments(), backend="triton")


NAN = torch.full((2, 24, 8), float("nan"), dtype=torch.float64)
BAD = [
    ({"p": 0}, "focusing_factor 0: expected a number above 0"),
    ({"p": -3}, "focusing_factor -3"),
    ({"p": float("nan")}, "focusing_factor nan"),
    ({"p": float("inf")}, "focusing_factor inf"),
    ({"num_heads": 3}, "8 channels and 3 heads: the channels must be a multiple of the heads"),
    ({"num_heads": 0}, "8 channels and 0 heads"),
    ({"hw": (4, 5)}, "24 tokens are no map of 4x5: give hw=(height, width)"),
    ({"hw": (4, 4)}, "24 tokens are no map of 4x4"),
    ({"hw": None}, "24 tokens are no map of 4x4"),
    ({"dwc_weight": torch.ones(4, 1, 4, 4)}, "kernel_size 4: expected an odd number"),
    ({"dwc_weight": torch.ones(3, 1, 3, 3)}, "dwc_weight has shape (3, 1, 3, 3): expected (kernels, 1, side, side)"),
    ({"dwc_weight": torch.ones(4, 1, 3, 5)}, "dwc_weight has shape (4, 1, 3, 5)"),
    ({"dwc_weight": torch.ones(4, 3, 3)}, "dwc_weight has shape (4, 3, 3)"),
    ({"dwc_bias": torch.ones(8)}, "dwc_bias has shape (8,): expected (4,), one per kernel"),
    ({"denominator": "max"}, "denominator 'max': expected 'mean'"),
    ({"backend": "cuda"}, "backend 'cuda': expected auto, reference, cpu, triton"),
    ({"scale": torch.zeros(1, 1, 4)}, "scale has 4 numbers: expected one per channel, 8"),
    ({"pos": torch.zeros(1, 20, 8)}, "pos has shape (1, 20, 8): expected (24, 8)"),
    ({"pos": torch.zeros(2, 24, 8)}, "pos has shape (2, 24, 8)"),
    ({"v": torch.zeros(2, 20, 8)}, "expected one batch and channels, and as many keys as values"),
    ({"k": torch.zeros(2, 30, 8), "v": torch.zeros(2, 30, 8), "pos": None}, "at most the queries"),
    ({"q": torch.zeros(2, 2, 24, 4)}, "heads not yet split"),
    ({"prefix_tokens": 24}, "24 prefix tokens of 24"),
    ({"q": torch.ones(2, 24, 8, dtype=torch.int64)}, "q is of type torch.int64: expected floating-point numbers"),
    ({"v": torch.ones(2, 24, 8, dtype=torch.uint8)}, "v is of type torch.uint8"),
    ({"q": NAN}, "q of shape (2, 24, 8) holds NaN or infinity"),
    ({"k": NAN}, "k of shape (2, 24, 8) holds NaN or infinity"),
    ({"v": NAN / 0}, "v of shape (2, 24, 8) holds NaN or infinity"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with without_type_checks(), pytest.raises(UserError) as refused:
        focused_linear_attention(**{**arguments(), **changes})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("x", "power", "message"),
    [
        (torch.ones(2, 3), 0, "focusing_factor 0"),
        (torch.ones(2, 3, dtype=torch.int32), 3, "x is of type torch.int32: expected floating-point numbers"),
        (torch.full((2, 3), float("nan")), 3, "x of shape (2, 3) holds NaN or infinity"),
    ],
)
def test_focus_refuses_what_it_cannot_sharpen(x: Tensor, power: int, message: str) -> None:
    with without_type_checks(), pytest.raises(UserError) as refused:
        focus(x, power)
    assert message in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_keys_take_halves_beside_float32_parameters(dtype: torch.dtype) -> None:
    exact = arguments(keys=6, dtype=torch.float32)
    tensors = {name: exact[name].to(dtype) for name in ("q", "k", "v")}
    found = focused_linear_attention(**{**exact, **tensors})
    wanted = focused_linear_attention(**{**exact, **{name: value.float() for name, value in tensors.items()}})
    assert found.dtype == dtype
    assert torch.allclose(found.float(), wanted, atol=2e-2, rtol=2e-2)


def test_focus_of_negative_vectors_is_finite_and_keeps_norms() -> None:
    x = -torch.rand(5, 8)
    assert torch.allclose(focus(x, 3).norm(dim=-1), x.norm(dim=-1))
