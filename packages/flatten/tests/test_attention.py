"""The layers: drop-in shapes, equality with their matrices, sizes, dropout, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import direct
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leap_flatten import CSWinFocusedLinearAttention, FocusedLinearAttention, PVTFocusedLinearAttention
from leap_flatten.attention import Focused
from leap_shared.errors import UserError
from leap_shared.testing.operators import without_type_checks
from leap_shared.vision.bodies.grids import resample_grid, to_image, to_tokens

FLOAT64_ROUNDING = 1e-10  # relative to the largest number
Make = Callable[..., Any]
Size = tuple[int, int]
sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))
denominators = st.sampled_from(["mean", "sum"])


def randomised(layer: Any, seed: int = 0) -> Any:
    """The layer in float64 and evaluation mode, every parameter drawn anew: scale and encoding are 0 at first."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double().eval()
    for value in layer.parameters():
        value.data = torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.5
    return layer


def numbers(layer: Focused, hw: Size) -> dict[str, Any]:
    """What the layer gives the function besides q, k and v."""
    found = {"num_heads": layer.num_heads, "scale": layer.scale, "pos": layer.positional_encoding}
    found |= {"dwc_weight": layer.dwc.weight, "dwc_bias": layer.dwc.bias, "prefix_tokens": layer.prefix_tokens}
    return {**found, "p": layer.focusing_factor, "denominator": layer.denominator, "hw": hw}


def swin(**options: Any) -> FocusedLinearAttention:
    return FocusedLinearAttention(**{"dim": 8, "num_heads": 2, "input_size": (4, 6), **options})


def pvt(**options: Any) -> PVTFocusedLinearAttention:
    return PVTFocusedLinearAttention(**{"dim": 8, "num_heads": 2, "input_size": (4, 6), **options})


def branch(**options: Any) -> CSWinFocusedLinearAttention:
    return CSWinFocusedLinearAttention(**{"dim": 8, "num_heads": 2, "input_size": (4, 6), **options})


every_layer = pytest.mark.parametrize("make", [swin, pvt, branch])


def tokens_for(layer: Any, count: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (batch, count, 8)
    stacked = isinstance(layer, CSWinFocusedLinearAttention)
    return torch.randn((3, *shape) if stacked else shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@given(
    hw=sizes,
    power=st.sampled_from([2, 3, 4, 2.5, 8]),
    denominator=denominators,
    kernel_size=st.sampled_from([1, 3, 5]),
    prefix_tokens=st.integers(0, 2),
    seed=st.integers(0, 9),
)
def test_layer_is_its_matrices_between_its_projections(
    hw: Size, power: float, denominator: str, kernel_size: int, prefix_tokens: int, seed: int
) -> None:
    options = {"focusing_factor": power, "denominator": denominator, "kernel_size": kernel_size}
    layer = randomised(swin(input_size=hw, prefix_tokens=prefix_tokens, **options), seed)
    x = tokens_for(layer, prefix_tokens + hw[0] * hw[1])
    q, k, v = layer.qkv(x).chunk(3, -1)
    want = layer.proj(direct.attention(q, k, v, **numbers(layer, hw)))
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            got = layer(x, hw)
        assert (got - want).abs().max() <= FLOAT64_ROUNDING * want.abs().max()


@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ratio=st.integers(1, 3),
    denominator=denominators,
    seed=st.integers(0, 9),
)
def test_pvt_layer_takes_its_keys_from_the_reduced_map(grid: Size, ratio: int, denominator: str, seed: int) -> None:
    hw = grid[0] * ratio, grid[1] * ratio
    layer = randomised(pvt(input_size=hw, sr_ratio=ratio, denominator=denominator), seed)
    x = tokens_for(layer, hw[0] * hw[1])
    reduced = x
    if ratio > 1:
        image = F.conv2d(to_image(x, hw), layer.sr.weight, layer.sr.bias, stride=ratio)
        reduced = F.layer_norm(to_tokens(image), (8,), layer.norm.weight, layer.norm.bias, 1e-5)
    k, v = layer.kv(reduced).chunk(2, -1)
    want = layer.proj(direct.attention(layer.q(x), k, v, **numbers(layer, hw)))
    assert layer.positional_encoding.shape[1] == grid[0] * grid[1]
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            got = layer(x, hw)
        assert (got - want).abs().max() <= FLOAT64_ROUNDING * want.abs().max()


@given(hw=sizes, kernel_size=st.sampled_from([1, 3, 5]), denominator=denominators, seed=st.integers(0, 9))
def test_cswin_branch_adds_lepe_to_its_matrices(hw: Size, kernel_size: int, denominator: str, seed: int) -> None:
    layer = randomised(branch(input_size=hw, kernel_size=kernel_size, denominator=denominator), seed)
    qkv = tokens_for(layer, hw[0] * hw[1])
    lepe = torch.einsum("cij,bjc->bic", direct.convolution(layer.get_v.weight, hw), qkv[2]) + layer.get_v.bias
    want = direct.attention(*qkv, **numbers(layer, hw)) + lepe
    got = layer(qkv, hw)
    assert (got - want).abs().max() <= FLOAT64_ROUNDING * want.abs().max()


REDUCED = (
    "dwc.bias dwc.weight kv.bias kv.weight norm.bias norm.weight positional_encoding proj.bias proj.weight "
    "q.bias q.weight scale sr.bias sr.weight"
)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (swin, "dwc.bias dwc.weight positional_encoding proj.bias proj.weight qkv.bias qkv.weight scale"),
        (lambda: pvt(sr_ratio=2), REDUCED),
        (branch, "dwc.bias dwc.weight get_v.bias get_v.weight positional_encoding scale"),
    ],
)
def test_names_in_the_state_dict_are_the_authors(make: Make, names: str) -> None:
    assert sorted(make().state_dict()) == names.split()


@every_layer
def test_scale_and_encoding_start_at_zero_and_kernels_as_torch_draws_them(make: Make) -> None:
    layer = make(dim=64)
    assert (layer.scale == 0).all()
    assert (layer.positional_encoding == 0).all()
    assert 0.15 < layer.dwc.weight.abs().max() <= 0.2  # uniform in +-1 / 5
    assert layer.dwc.weight.shape == (32, 1, 5, 5)


@every_layer
@given(hw=st.tuples(st.integers(2, 4), st.integers(2, 4)))
def test_setting_another_size_equals_calling_with_it(make: Make, hw: Size) -> None:
    layer = randomised(make())
    hw = 2 * hw[0], 2 * hw[1]
    x = tokens_for(layer, hw[0] * hw[1])
    resized = copy.deepcopy(layer)
    resized.set_input_size(hw)
    assert resized.positional_encoding.shape == (1, hw[0] * hw[1], 8)
    assert torch.equal(resized(x), layer(x, hw))
    assert layer.positional_encoding.shape == (1, 24, 8)


@every_layer
def test_encoding_is_resampled_on_its_own_grid(make: Make) -> None:
    layer = randomised(make())
    before = layer.positional_encoding.detach().clone().unflatten(1, (4, 6)).permute(0, 3, 1, 2)
    layer.set_input_size((6, 10))
    want = F.interpolate(before.float(), (6, 10), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert torch.equal(layer.positional_encoding.float(), want)


def test_rows_of_class_tokens_are_kept_when_the_size_changes() -> None:
    layer = randomised(swin(prefix_tokens=1))
    before = layer.positional_encoding.detach().clone()
    layer.set_input_size((8, 8))
    assert torch.equal(layer.positional_encoding[:, 0], before[:, 0])
    assert torch.equal(layer.positional_encoding[:, 1:], resample_grid(before[:, 1:], (4, 6), (8, 8)))


def test_reduced_encoding_is_resampled_on_the_grid_of_the_keys() -> None:
    layer = randomised(pvt(sr_ratio=2))
    before = layer.positional_encoding.detach().clone()
    layer.set_input_size((8, 8))
    assert torch.equal(layer.positional_encoding, resample_grid(before, (2, 3), (4, 4)))


def test_optimisers_go_on_holding_a_resized_encoding() -> None:
    layer = swin()
    held = layer.positional_encoding
    layer.set_input_size((8, 8))
    assert layer.positional_encoding is held


@pytest.mark.parametrize("make", [swin, pvt])
def test_dropout_of_the_projection_acts_in_training_only(make: Make) -> None:
    torch.manual_seed(0)
    layer = make(proj_drop=0.5, attn_drop=0.5)
    x = tokens_for(layer, 24, dtype=torch.float32)
    dropped = (layer.train()(x) == 0).float().mean()
    assert 0.3 < dropped < 0.7
    assert not (layer.eval()(x) == 0).any()
    with torch.no_grad():
        undropped = make().train()
        undropped.load_state_dict(layer.state_dict())
        assert torch.allclose(layer(x), undropped(x), atol=1e-6)


@pytest.mark.parametrize("make", [swin, pvt])
def test_attn_drop_is_never_applied(make: Make) -> None:
    layer = make(attn_drop=0.9).train()
    x = tokens_for(layer, 24, dtype=torch.float32)
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("make", [swin, pvt])
def test_projections_may_do_without_bias(make: Make) -> None:
    layer = make(qkv_bias=False).eval()
    x = tokens_for(layer, 24, dtype=torch.float32)
    assert {"qkv.bias", "q.bias", "kv.bias"}.isdisjoint(layer.state_dict())
    with torch.no_grad():
        quiet = layer(x)
    assert torch.allclose(quiet, layer(x), rtol=1e-5, atol=1e-6)


@every_layer
def test_every_parameter_and_the_input_get_gradients(make: Make) -> None:
    layer = randomised(make()).train()
    x = tokens_for(layer, 24).requires_grad_()
    layer(x).square().sum().backward()
    gradients = {name: value.grad for name, value in layer.named_parameters()} | {"input": x.grad}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


@every_layer
def test_half_precision_layer_survives_dead_tokens(make: Make) -> None:
    """1e-6 cubed is 0 in float16; the layer computes features and sums in float32."""
    layer = make().eval()
    x = torch.zeros_like(tokens_for(layer, 24, dtype=torch.float32))
    with torch.no_grad():
        want, got = layer(x), layer.half()(x.half())
    assert got.dtype == torch.float16
    assert (got.float() - want).abs().max() <= 2e-3 * want.abs().max().clamp_min(1)


@every_layer
def test_layer_says_nothing_and_returns_itself_from_eval(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    layer = make()
    assert layer.eval() is layer
    assert capsys.readouterr().out == ""


BAD_NUMBERS = [
    (swin, {"num_heads": 3}, "8 channels and 3 heads: the channels must be a multiple of the heads"),
    (pvt, {"num_heads": 0}, "8 channels and 0 heads"),
    (branch, {"dim": 0}, "0 channels and 2 heads"),
    (swin, {"focusing_factor": 0}, "focusing_factor 0: expected a number above 0, the paper takes 3"),
    (pvt, {"focusing_factor": -1.5}, "focusing_factor -1.5"),
    (branch, {"focusing_factor": float("nan")}, "focusing_factor nan"),
    (swin, {"kernel_size": 4}, "kernel_size 4: expected an odd number, the paper takes 5"),
    (pvt, {"kernel_size": 0}, "kernel_size 0"),
    (branch, {"kernel_size": -1}, "kernel_size -1"),
    (swin, {"denominator": "median"}, "denominator 'median': expected 'mean' (current release) or 'sum'"),
    (swin, {"input_size": (0, 4)}, "a map of 0x4 tokens: expected 1 or more each way"),
    (swin, {"prefix_tokens": -1}, "prefix_tokens -1: expected 0 or more"),
    (pvt, {"sr_ratio": 3}, "a map of 4x6 tokens is not divisible by the spatial reduction ratio 3"),
    (pvt, {"sr_ratio": 0}, "the spatial reduction ratio 0"),
]


@pytest.mark.parametrize(("make", "changes", "message"), BAD_NUMBERS, ids=[row[2][:40] for row in BAD_NUMBERS])
def test_numbers_that_do_not_fit_are_refused(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        make(**changes)
    assert message in str(refused.value)


INF = float("inf")
BAD_INPUTS = [
    (swin, torch.zeros(2, 24, 6), None, "input of shape (2, 24, 6) and type torch.float32: expected"),
    (swin, torch.zeros(24, 8), None, "expected floating-point numbers of shape (batch, tokens, 8)"),
    (swin, torch.zeros(2, 24, 8, dtype=torch.int64), None, "type torch.int64"),
    (swin, torch.zeros(2, 23, 8), None, "23 tokens are no map of 4x6 (24 tokens): give hw=(height, width)"),
    (swin, torch.zeros(2, 24, 8), (5, 5), "24 tokens are no map of 5x5 (25 tokens)"),
    (swin, torch.full((2, 24, 8), float("nan")), None, "input of shape (2, 24, 8) holds NaN or infinity"),
    (swin, torch.full((2, 24, 8), INF), None, "holds NaN or infinity"),
    (pvt, torch.zeros(2, 24, 7), None, "input of shape (2, 24, 7)"),
    (pvt, torch.zeros(2, 24, 8), (4, 4), "24 tokens are no map of 4x4 (16 tokens)"),
    (pvt, torch.zeros(2, 24, 8, dtype=torch.uint8), None, "type torch.uint8"),
    (pvt, torch.full((2, 24, 8), float("nan")), None, "holds NaN or infinity"),
    (lambda: pvt(sr_ratio=2), torch.zeros(2, 15, 8), (3, 5), "3x5 tokens is not divisible by the spatial reduction"),
    (branch, torch.zeros(2, 24, 8), None, "qkv of shape (2, 24, 8): expected (3, stripes, tokens, channels)"),
    (branch, torch.zeros(2, 2, 24, 8), None, "qkv of shape (2, 2, 24, 8)"),
    (branch, torch.zeros(3, 2, 20, 8), None, "20 tokens are no map of 4x6"),
    (branch, torch.zeros(3, 2, 24, 8, dtype=torch.int32), None, "type torch.int32"),
    (branch, torch.tensor([0.0, 0.0, float("nan")])[:, None, None, None].expand(3, 2, 24, 8), None, "holds NaN"),
]


@pytest.mark.parametrize(("make", "x", "hw", "message"), BAD_INPUTS, ids=[row[3][:40] for row in BAD_INPUTS])
def test_inputs_that_do_not_fit_are_refused(make: Make, x: Tensor, hw: Size | None, message: str) -> None:
    with without_type_checks(), pytest.raises(UserError) as refused:
        make()(x, hw)
    assert message in str(refused.value)


def test_resizing_to_a_map_that_the_reduction_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="5x6 tokens is not divisible by the spatial reduction ratio 2"):
        pvt(sr_ratio=2).set_input_size((5, 6))


def test_resizing_to_no_map_is_refused() -> None:
    with pytest.raises(UserError, match="a map of 0x6 tokens: expected 1 or more each way"):
        swin().set_input_size((0, 6))
