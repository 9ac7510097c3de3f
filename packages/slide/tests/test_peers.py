"""The peers compute what they are named for: ours with the same numbers, or what the sentence beside them says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tiny import drawn, images, model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import leap_slide as ls
from leap_shared.bench import copy_with
from leap_shared.errors import UserError
from leap_slide import peers
from leap_slide.functional import merge_weights, shift_kernel, slide_attention

ROUNDING = 1e-10  # float64; ours sums in another order
sides, odd = st.integers(1, 6), st.sampled_from([1, 3, 5])


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING * float(expected.detach().abs().max()))


def numbers(height: int, width: int, heads: int, dim: int, side: int) -> tuple[Any, Any, Any, Tensor]:
    """Queries, keys and values; both paths' kernels; and the table of positions."""
    parts = tuple(noise(2, height, width, heads * dim, seed=seed) for seed in range(3))
    learned = (noise(dim * side**2, 1, side, side), noise(dim * side**2, seed=3))
    fixed = (shift_kernel(dim, side).double(), noise(dim * side**2, seed=4))
    return parts, fixed, learned, noise(heads, side**2, seed=5)


@pytest.mark.parametrize("with_table", [True, False])
@examples(max_examples=15, deadline=None)
@given(sides, sides, st.integers(1, 3), st.integers(1, 4), odd)
def test_convolutions_of_two_paths_and_of_one_equal_the_operator(
    with_table: bool, height: int, width: int, heads: int, dim: int, side: int
) -> None:
    parts, fixed, learned, table = numbers(height, width, heads, dim, side)
    rpb = table if with_table else None
    kernels = merge_weights(*fixed, *learned)
    expected = slide_attention(*parts, *kernels, rpb, num_heads=heads, kernel_size=side)
    assert_same(peers.two_path(*parts, fixed, learned, rpb, heads), expected)
    assert_same(peers.merged(*parts, kernels, rpb, heads), expected)


@examples(max_examples=15, deadline=None)
@given(sides, sides, st.integers(1, 3), st.integers(1, 4), odd)
def test_unfold_equals_the_operator_with_plain_shifts(height: int, width: int, heads: int, dim: int, side: int) -> None:
    parts, (shifts, bias), _, _ = numbers(height, width, heads, dim, side)
    expected = slide_attention(*parts, shifts, 0 * bias, num_heads=heads, kernel_size=side)
    assert_same(peers.unfold(*parts, heads, side), expected)


def test_two_paths_have_the_gradients_of_the_operator() -> None:
    parts, fixed, learned, table = numbers(3, 4, 2, 3, 3)
    leaves = [x.requires_grad_() for x in (*parts, *learned, fixed[1], table)]
    q, k, v = parts
    outputs = (
        peers.two_path(q, k, v, fixed, learned, table, 2),
        slide_attention(q, k, v, *merge_weights(*fixed, *learned), table, num_heads=2, kernel_size=3),
    )
    theirs, ours = (torch.autograd.grad(out, leaves, noise(*out.shape, seed=7)) for out in outputs)
    for found, expected in zip(theirs, ours, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("reparameterized", [False, True])
@pytest.mark.parametrize("options", [{}, {"rel_pos_bias": False}, {"dim_reduction": 2}, {"qk_scale": 0.3}])
def test_eager_layer_gives_what_its_layer_gives(options: dict[str, Any], reparameterized: bool) -> None:
    layer: Any = drawn(ls.SlideAttention(8, 2, **options)).double().eval()
    if reparameterized:
        layer.reparameterize()
    x = noise(2, 15, 8)
    if options.keys() & {"dim_reduction", "qk_scale"}:
        with pytest.raises(UserError, match="the released module's form"):
            peers.EagerAttention(layer)
        return
    assert_same(peers.EagerAttention(layer)(x, (3, 5)), layer(x, (3, 5)))


@pytest.mark.parametrize("family", ["swin", "pvt"])
def test_eager_copy_gives_the_logits_of_the_model(family: str) -> None:
    network = model(family).double()
    copied = copy_with(network, ls.SlideAttention, peers.EagerAttention)
    assert sum(isinstance(module, peers.EagerAttention) for module in copied.modules()) == 2
    x = images().double()
    assert_same(copied(x), network(x))


def softmax(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Tokens (tokens, channels) to tokens, head by head."""
    parts = zip(*(x.chunk(heads, 1) for x in (query, key, value)), strict=True)
    return torch.cat([(q @ k.mT / q.shape[1] ** 0.5).softmax(1) @ v for q, k, v in parts], 1)


@examples(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_windows_attend_inside_themselves_on_a_padded_map(height: int, width: int, window: int) -> None:
    parts = [noise(1, height, width, 6, seed=seed) for seed in range(3)]
    out = peers.windowed(*parts, 2, window)
    padded = [torch.zeros(height + window, width + window, 6, dtype=torch.float64) for _ in parts]
    for image, part in zip(padded, parts, strict=True):
        image[:height, :width] = part[0]
    for top in range(0, height, window):
        for left in range(0, width, window):
            cut = (x[top : top + window, left : left + window].flatten(0, 1) for x in padded)
            expected = softmax(*cut, heads=2).unflatten(0, (window, window))[: height - top, : width - left]
            assert_same(out[0, top : top + window, left : left + window], expected)


def test_global_softmax_sees_the_whole_map() -> None:
    parts = [noise(1, 3, 5, 6, seed=seed) for seed in range(3)]
    expected = softmax(*(x[0].flatten(0, 1) for x in parts), heads=2)
    assert_same(peers.global_softmax(*parts, 2)[0].flatten(0, 1), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("side", [3, 5])
def test_flex_attention_sees_the_pixels_of_the_kernel_that_are_inside(side: int) -> None:
    parts, (shifts, bias), _, _ = numbers(4, 6, 2, 3, side)
    expected = slide_attention(*parts, shifts, 0 * bias, num_heads=2, kernel_size=side, mask_padding=True)
    call: Callable[..., Tensor] = peers.flex((4, 6), 2, side, torch.device("cpu"), compiled=False)
    assert_same(call(*parts), expected)


def test_missing_natten_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "has_natten", lambda: False)
    q = noise(1, 4, 4, 8)
    with pytest.raises(UserError, match="needs natten: pip install natten"):
        peers.neighborhood(q, q, q, 1, 3)


@pytest.mark.filterwarnings("ignore")  # natten's CPU path calls FlexAttention in a way that torch gives up
def test_natten_equals_ours_away_from_borders() -> None:
    pytest.importorskip("natten")
    parts = [noise(1, 7, 8, 64, seed=seed).float() for seed in range(3)]
    weight, bias = shift_kernel(32, 3), torch.zeros(32 * 9)
    ours = slide_attention(*parts, weight, bias, num_heads=2)
    found = peers.neighborhood(*parts, 2, 3)
    torch.testing.assert_close(found[:, 1:-1, 1:-1], ours[:, 1:-1, 1:-1])


def test_floor_counts_the_products_of_the_layer() -> None:
    layer = ls.SlideAttention(12, 3).eval()
    x = noise(2, 20, 12).float()
    floor = peers.Floor(layer, x, (4, 5))
    calls: tuple[Callable[[], object], ...] = (floor, lambda: layer(x, (4, 5)))
    counts = []
    with torch.inference_mode():
        for call in calls:
            with FlopCounterMode(display=False) as counter:
                call()
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_floor_goes_over_every_pixel_once_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "BLOCK", 7)
    layer = ls.SlideAttention(4, 2).eval()
    assert peers.Floor(layer, noise(1, 10, 4).float(), (2, 5)).sizes == [7, 7, 6]
