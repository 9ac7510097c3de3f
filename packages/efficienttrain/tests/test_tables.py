"""Tables keep what they mean at another size, and named states of released files go through the same map."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leap_efficienttrain.tables import Resampling, as_size, find_resampling, scaled_window, transfer_state
from leap_shared.errors import UserError

sides = st.integers(1, 7)
quickly = settings(deadline=None, max_examples=30)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def bilinear_rows(old: int, new: int) -> torch.Tensor:
    """Matrix (new, old) of linear interpolation between pixel centres, clamped at the borders."""
    at = ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5).clamp(0, old - 1)
    low = at.floor().long()
    matrix = torch.zeros(new, old, dtype=torch.float64)
    matrix[torch.arange(new), low] += 1 - (at - low)
    matrix[torch.arange(new), (low + 1).clamp(max=old - 1)] += at - low
    return matrix


@quickly
@given(sides, sides, sides, sides, st.integers(0, 3), st.integers(0, 3), st.integers(1, 3))
def test_map_is_the_bilinear_matrix_of_rows_and_columns_and_keeps_extra_rows(
    height: int, width: int, rows: int, columns: int, before: int, after: int, channels: int
) -> None:
    table = draw(2, before + height * width + after, channels)
    shape = (2, before + rows * columns + after, channels)
    moved = Resampling(1, 1, (height, width), (rows, columns), before, after, shape)(table)
    places = table[:, before : before + height * width].reshape(2, height, width, channels)
    expected = torch.einsum("ry,sx,byxc->brsc", bilinear_rows(height, rows), bilinear_rows(width, columns), places)
    torch.testing.assert_close(moved[:, before : before + rows * columns], expected.flatten(1, 2))
    assert torch.equal(moved[:, :before], table[:, :before])
    assert torch.equal(moved[:, before + rows * columns :], table[:, before + height * width :])


@quickly
@given(sides, sides, sides, sides)
def test_grid_in_two_dimensions_moves_as_the_flat_one(height: int, width: int, rows: int, columns: int) -> None:
    flat, shape = draw(1, height * width, 2), (1, rows * columns, 2)
    apart = Resampling(1, 2, (height, width), (rows, columns), 0, 0, (1, rows, columns, 2))
    expected = Resampling(1, 1, (height, width), (rows, columns), 0, 0, shape)(flat)
    assert torch.equal(apart(flat.reshape(1, height, width, 2)).reshape(shape), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_second_moments_stay_non_negative_in_every_type(dtype: torch.dtype) -> None:
    moved = Resampling(0, 1, (5, 5), (13, 13), 0, 0, (169, 3))(draw(25, 3).square().to(dtype))
    assert moved.dtype == dtype
    assert moved.min() >= 0


@pytest.mark.parametrize(
    ("name", "old", "new", "grid", "before", "after"),
    [
        ("pos_embed", (1, 197, 8), (1, 37, 8), (14, 14), 1, 0),
        ("pos_embed", (1, 198, 8), (1, 102, 8), (14, 14), 2, 0),
        ("attn.relative_position_bias_table", (169, 3), (25, 3), (13, 13), 0, 0),
        ("attn.relative_position_bias_table", (25, 1), (81, 1), (5, 5), 0, 0),
        ("attn.relative_position_bias_table", (732, 3), (124, 3), (27, 27), 0, 3),
    ],
)
def test_square_grids_are_found_with_their_extra_rows(
    name: str, old: tuple[int, ...], new: tuple[int, ...], grid: tuple[int, int], before: int, after: int
) -> None:
    found = find_resampling(name, old, new)
    assert found is not None
    assert (found.old, found.before, found.after) == (grid, before, after)


def test_grid_that_is_told_goes_before_a_square_one() -> None:
    found = find_resampling("pos_embed", (1, 13, 8), (1, 29, 8), [((9, 9), (1, 1)), ((3, 4), (7, 4))])
    assert found is not None
    assert (found.old, found.new, found.before) == ((3, 4), (7, 4), 1)


def test_one_changed_side_of_a_map_is_linear_along_it() -> None:
    found = find_resampling("pos_embed1", (1, 8, 4, 9), (1, 8, 4, 16))
    assert found is not None
    table = draw(1, 8, 4, 9)
    torch.testing.assert_close(found(table), table @ bilinear_rows(9, 16).T)


@pytest.mark.parametrize(
    ("old", "new"), [((7, 7, 3), (5, 7, 4)), ((1, 197), (1, 197, 2)), ((1, 11, 8), (1, 24, 8)), ((4, 4), (4, 4))]
)
def test_shapes_that_are_no_table_have_no_map(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    assert find_resampling("pos_embed", old, new) is None


def test_columns_of_a_linear_layer_are_no_places() -> None:
    assert find_resampling("head.weight", (10, 64), (10, 256)) is None
    assert find_resampling("embeddings.position.weight", (64, 10), (256, 10)) is not None


@pytest.mark.parametrize(
    ("window", "old", "new", "expected"), [(3, 96, 160, 5), (7, 224, 112, 3), (3, 112, 224, 7), (16, 256, 192, 12)]
)
def test_windows_are_a_32nd_of_the_size_or_keep_their_share(window: int, old: int, new: int, expected: int) -> None:
    assert scaled_window(window, old, new) == expected


def test_state_passes_on_what_no_size_matters_to_and_leaves_computed_tables_out() -> None:
    state = {"norm.weight": draw(4), "blocks.0.attn.relative_position_index": draw(9), "layers.0.attn_mask": draw(4)}
    moved = transfer_state(state, 96, 160)
    assert list(moved) == ["norm.weight"]
    assert moved["norm.weight"] is state["norm.weight"]


def test_patch_size_of_a_state_comes_from_its_convolution() -> None:
    state = {"pos_embed": draw(1, 1 + 8 * 12, 4), "patch_embed.proj.weight": draw(4, 3, 14, 14)}
    moved = transfer_state(state, (112, 168), (168, 112))["pos_embed"]
    assert torch.equal(moved, Resampling(1, 1, (8, 12), (12, 8), 1, 0, (1, 97, 4))(state["pos_embed"]))


def test_class_rows_of_relative_biases_stay_behind() -> None:
    table = draw(27 * 27 + 3, 2)
    moved = transfer_state({"blocks.0.attn.relative_position_bias_table": table}, 224, 160)
    found = moved["blocks.0.attn.relative_position_bias_table"]
    assert found.shape == (19 * 19 + 3, 2)
    assert torch.equal(found[-3:], table[-3:])


@pytest.mark.parametrize(
    ("name", "rows"), [("pos_embed", 37), ("absolute_pos_embed", 197), ("attn.relative_position_bias_table", 170)]
)
def test_table_of_another_size_is_refused_by_name(name: str, rows: int) -> None:
    table = draw(1, rows, 4) if name.endswith("embed") else draw(rows, 4)
    with pytest.raises(UserError, match=rf"{name} of shape .* does not belong to input size 160"):
        transfer_state({name: table}, 160, 224)


@pytest.mark.parametrize("size", [0, -32, (32, 0), True])
def test_size_that_is_no_size_is_refused(size: int | tuple[int, int]) -> None:
    with pytest.raises(UserError, match="positive number of pixels"):
        as_size(size)
