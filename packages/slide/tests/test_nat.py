"""Neighbourhood attention against its formula, pixel by pixel, and its choice of implementation."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leap_shared.errors import UserError
from leap_shared.vision.bodies import Site
from leap_slide.models import NeighborhoodAttention

FLOAT64_ROUNDING = 1e-10


def layer_of(
    dim: int = 6, num_heads: int = 2, seed: int = 0, attn_drop: float = 0.0, **options: Any
) -> NeighborhoodAttention:
    """A layer in evaluation mode with all parameters drawn, in float64."""
    site = Site(0, 0, dim, num_heads, (8, 8), attn_drop=attn_drop)
    layer, generator = NeighborhoodAttention(site, **options).double(), torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return layer.eval()


def tokens_of(hw: tuple[int, int], dim: int = 6, batch: int = 2) -> Tensor:
    return torch.randn(batch, hw[0] * hw[1], dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def neighbours(place: int, length: int, side: int) -> range:
    """The `side` places around one, or all of a shorter row; at borders the window moves inwards."""
    if length <= side:
        return range(length)
    first = place - side // 2
    while first < 0:
        first += 1
    while first + side > length:
        first -= 1
    return range(first, first + side)


def direct(layer: NeighborhoodAttention, x: Tensor, hw: tuple[int, int]) -> Tensor:
    """The formula of one query, one key at a time."""
    side, heads, dim = layer.kernel_size, layer.num_heads, x.shape[2] // layer.num_heads
    query, key, value = layer.qkv(x).reshape(len(x), *hw, 3, heads, dim).unbind(3)
    rows = []
    for y in range(hw[0]):
        for column in range(hw[1]):
            logits, values = [], []
            for row in neighbours(y, hw[0], side):
                for col in neighbours(column, hw[1], side):
                    logit = (query[:, y, column] * key[:, row, col]).sum(2) * dim**-0.5
                    if layer.rpb is not None:
                        logit = logit + layer.rpb[:, row - y + side - 1, col - column + side - 1]
                    logits.append(logit)
                    values.append(value[:, row, col])
            share = torch.stack(logits, 2).softmax(2)
            rows.append((share[..., None] * torch.stack(values, 2)).sum(2).flatten(1))
    out: Tensor = layer.proj(torch.stack(rows, 1))
    return out


def is_close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= FLOAT64_ROUNDING * want.abs().max())


@given(
    hw=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    side=st.sampled_from([1, 3, 5, 7]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=settings().max_examples // 2)
def test_layer_is_the_formula_on_every_map(hw: tuple[int, int], side: int, bias: bool, seed: int) -> None:
    """Rectangles, and maps that are smaller than the kernel one way or both, among them."""
    layer, x = layer_of(kernel_size=side, rel_pos_bias=bias, seed=seed), tokens_of(hw, batch=1)
    with torch.no_grad():
        assert is_close(layer(x, hw), direct(layer, x, hw))


def test_strips_of_rows_join_on_a_map_of_many() -> None:
    layer, x = layer_of(kernel_size=3), tokens_of((11, 5))
    with torch.no_grad():
        assert is_close(layer(x, (11, 5)), direct(layer, x, (11, 5)))


def test_gradients_are_those_of_the_formula() -> None:
    layer, x = layer_of(kernel_size=3), tokens_of((4, 5)).requires_grad_()
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(layer(x, (4, 5)).square().sum(), leaves)
    wanted = torch.autograd.grad(direct(layer, x, (4, 5)).square().sum(), leaves)
    assert all(is_close(got, want) for got, want in zip(found, wanted, strict=True))


def test_windows_at_borders_move_inwards_and_never_shrink() -> None:
    """A corner sees the k x k pixels of its corner."""
    layer, x = layer_of(kernel_size=3), tokens_of((6, 6), batch=1)
    with torch.no_grad():
        seen = []
        for place in range(36):
            changed = x.clone()
            changed[:, place] += 1
            seen.append(bool((layer(changed, (6, 6)) != layer(x, (6, 6)))[0, 0].any()))
    assert [place for place in range(36) if seen[place]] == [0, 1, 2, 6, 7, 8, 12, 13, 14]


def test_layer_of_half_precision_runs() -> None:
    layer, x = layer_of(), tokens_of((8, 9))
    want = layer(x, (8, 9))
    assert (layer.bfloat16()(x.bfloat16(), (8, 9)).double() - want).abs().max() < 0.05 * want.abs().max()


def test_dropout_acts_in_training_only() -> None:
    layer, x = layer_of(attn_drop=0.5), tokens_of((8, 8))
    plain = layer_of()
    assert torch.equal(layer(x, (8, 8)), plain(x, (8, 8)))
    assert not torch.equal(layer.train()(x, (8, 8)), plain(x, (8, 8)))


class Natten(types.ModuleType):
    """What the layer takes of natten, by the formula for no kernel at all: it tells what it was called with."""

    def __init__(self) -> None:
        super().__init__("natten")
        self.__spec__ = importlib.machinery.ModuleSpec("natten", None)
        self.calls: list[Any] = []

    def na2d(self, query: Tensor, key: Tensor, value: Tensor, kernel_size: int) -> Tensor:
        self.calls.append((tuple(query.shape), tuple(key.shape), kernel_size))
        return value


@pytest.fixture
def natten(monkeypatch: pytest.MonkeyPatch) -> Natten:
    module = Natten()
    monkeypatch.setitem(sys.modules, "natten", module)
    return module


def test_natten_gets_maps_with_heads(natten: Natten) -> None:
    layer, x = layer_of(implementation="natten", rel_pos_bias=False), tokens_of((7, 9))
    out = layer(x, (7, 9))
    assert natten.calls == [((2, 7, 9, 2, 3), (2, 7, 9, 2, 3), 7)]
    values = layer.qkv(x)[..., 12:]
    assert is_close(out, layer.proj(values))


def test_maps_that_natten_does_not_take_are_masked(natten: Natten) -> None:
    layer, x = layer_of(implementation="natten", rel_pos_bias=False), tokens_of((6, 9))
    assert is_close(layer(x, (6, 9)), direct(layer, x, (6, 9)))
    assert natten.calls == []


def test_dropout_that_natten_has_not_is_masked(natten: Natten) -> None:
    layer = layer_of(implementation="natten", rel_pos_bias=False, attn_drop=0.5).train()
    assert layer(tokens_of((7, 7)), (7, 7)).isfinite().all()
    assert natten.calls == []


@pytest.mark.parametrize("implementation", ["auto", "masked"])
def test_tensors_of_a_cpu_do_not_go_to_natten(natten: Natten, implementation: str) -> None:
    layer, x = layer_of(implementation=implementation, rel_pos_bias=False), tokens_of((7, 7))
    assert is_close(layer(x, (7, 7)), direct(layer, x, (7, 7)))
    assert natten.calls == []


def test_missing_natten_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="by natten needs natten: pip install natten, or take 'masked'"):
        layer_of(implementation="natten", rel_pos_bias=False)


def test_bias_that_natten_has_not_is_refused(natten: Natten) -> None:
    with pytest.raises(UserError, match="pass rel_pos_bias=False, or take 'masked'"):
        layer_of(implementation="natten")


@pytest.mark.parametrize("side", [0, 2, -3])
def test_even_kernels_are_refused(side: int) -> None:
    with pytest.raises(UserError, match=f"kernel_size {side}: expected an odd number"):
        layer_of(kernel_size=side)


def test_unknown_implementation_is_refused() -> None:
    with pytest.raises(UserError, match="implementation 'flex': expected 'auto', 'masked' or 'natten'"):
        layer_of(implementation="flex")
