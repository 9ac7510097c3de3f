"""Samplers draw what they are told to, and go on where they stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leap_oper import AliasSampler, CdfSampler, ReferenceSampler, samplers
from leap_shared.errors import UserError

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-6, 1e6)), min_size=1, max_size=60).filter(any)
MASS_TOLERANCE = 1e-12  # of a probability; weights are whole multiples of 2^-42 / rows or less at a million rows
CHI_SQUARE_TOP = 163.6  # 99.99% quantile for 99 degrees of freedom


@given(WEIGHTS)
def test_alias_tables_stand_for_the_probabilities(weights: list[float]) -> None:
    probs = np.array(weights) / np.sum(weights)
    np.testing.assert_allclose(AliasSampler(probs).mass(), probs, atol=MASS_TOLERANCE)


def test_alias_tables_are_exact_at_a_million_rows() -> None:
    weights = np.random.default_rng(0).pareto(1.2, size=1_000_000)
    probs = weights / weights.sum()
    np.testing.assert_allclose(AliasSampler(probs).mass(), probs, atol=MASS_TOLERANCE)


@given(WEIGHTS, st.integers(1, 9))
def test_tables_do_not_depend_on_the_size_of_the_pieces(weights: list[float], size: int) -> None:
    with patch.dict(samplers.PIECE_ROWS, cpu=size):
        sampler = AliasSampler(weights)
        cumulative = CdfSampler(weights).table
    assert not sampler.mass()[np.array(weights) == 0].any()
    probs = np.array(weights) / np.sum(weights)
    np.testing.assert_allclose(sampler.mass(), probs, atol=MASS_TOLERANCE)
    steps = np.diff(cumulative.numpy(), prepend=0)
    np.testing.assert_allclose(steps / cumulative[-1].item(), probs, atol=MASS_TOLERANCE)


def test_heavy_row_keeps_what_a_million_almost_mean_rows_lack() -> None:
    """Each lacks a millionth, which thresholds in float32 would round by 6% in the same direction."""
    weights = np.ones(1_000_000)
    weights[123_456] = 2.0
    mass = AliasSampler(weights).mass()
    assert mass[123_456].item() * weights.sum() == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-320, 1e300])
def test_extreme_weights_neither_vanish_nor_overflow(scale: float) -> None:
    weights = np.full(4, scale)
    weights[2] = 0.0
    np.testing.assert_allclose(AliasSampler(weights).mass(), [1 / 3, 1 / 3, 0, 1 / 3], atol=MASS_TOLERANCE)


def test_single_row_is_always_drawn() -> None:
    assert AliasSampler([3.0]).draw((5,)).tolist() == [0] * 5


def test_alias_table_takes_eight_bytes_a_row() -> None:
    assert AliasSampler(np.ones(1000)).table.nbytes == 8000


@given(WEIGHTS)
def test_rows_of_weight_zero_are_never_drawn(weights: list[float]) -> None:
    for sampler in (AliasSampler(weights), CdfSampler(weights)):
        assert np.all(np.array(weights)[sampler.draw((200,))] > 0)


@given(st.integers(1, 200), st.lists(st.integers(0, 2**63 - 1), min_size=1))
def test_every_random_bit_counts_for_the_row(rows: int, bits: list[int]) -> None:
    sampler = AliasSampler(np.ones(rows))
    with patch.object(torch, "randint", lambda *_, **__: torch.tensor(bits)):
        positions = sampler._positions(len(bits))
    assert positions.tolist() == [r * rows >> rows.bit_length() + 1 for r in bits]


@pytest.mark.parametrize("kind", [AliasSampler, CdfSampler])
def test_smallest_random_number_does_not_draw_a_row_of_weight_zero(kind: Any) -> None:
    sampler = kind([0.0, 1.0])
    with patch.object(torch, "randint", lambda *_, **__: torch.zeros(1, dtype=torch.int64)):
        assert sampler.draw((1,)).tolist() == [1]


@pytest.mark.parametrize("kind", [AliasSampler, CdfSampler])
def test_draws_have_the_right_frequencies(kind: Any) -> None:
    probs = np.random.default_rng(1).dirichlet(np.ones(100))
    count = 200_000
    seen = np.bincount(kind(probs, seed=2).draw((count,)).numpy(), minlength=100)
    assert np.sum((seen - count * probs) ** 2 / (count * probs)) < CHI_SQUARE_TOP


@pytest.mark.parametrize("kind", [AliasSampler, CdfSampler])
def test_uniform_draws_have_the_same_frequency(kind: Any) -> None:
    count = 200_000
    seen = np.bincount(kind(np.arange(100.0)).draw_uniform((count,)).numpy(), minlength=100)
    assert np.sum((seen - count / 100) ** 2 / (count / 100)) < CHI_SQUARE_TOP


@given(st.sampled_from([AliasSampler, CdfSampler]), st.lists(st.integers(0, 4), max_size=3))
def test_draws_have_the_shape_asked_for(kind: Any, shape: list[int]) -> None:
    sampler = kind([1.0, 2.0])
    assert sampler.draw(shape).shape == sampler.draw_uniform(shape).shape == tuple(shape)


@pytest.mark.parametrize("kind", [AliasSampler, CdfSampler])
def test_new_probabilities_take_the_place_of_the_old_at_once(kind: Any) -> None:
    sampler = kind([1.0, 0.0, 1.0])
    place = sampler.table.data_ptr()
    sampler.set_probs([0.0, 1.0, 0.0])
    assert sampler.draw((20,)).tolist() == [1] * 20
    assert sampler.table.data_ptr() == place


def test_reference_sampler_hands_out_what_it_drew_ahead_before_new_probabilities_count() -> None:
    sampler = ReferenceSampler(np.eye(16)[3], batch_size=4)
    sampler.draw((1, 4))
    sampler.set_probs(np.eye(16)[5])
    assert sampler.draw((5, 4)).tolist() == [[3] * 4] * 3 + [[5] * 4] * 2


@pytest.mark.parametrize("kind", [AliasSampler, CdfSampler, ReferenceSampler])
def test_other_number_of_probabilities_is_refused(kind: Any) -> None:
    with pytest.raises(UserError, match="there are 3 probabilities for 2 rows"):
        kind([1.0, 1.0]).set_probs([1.0, 1.0, 1.0])


def test_probabilities_that_are_refused_leave_the_table_as_it_was() -> None:
    sampler = AliasSampler([1.0, 2.0])
    before = sampler.table.clone()
    with pytest.raises(UserError, match="row 1 has nan"):
        sampler.set_probs([1.0, np.nan])
    assert torch.equal(sampler.table, before)


@pytest.mark.parametrize("kind", [AliasSampler, CdfSampler, ReferenceSampler])
def test_sampler_goes_on_from_its_state_to_the_same_bits(kind: Any) -> None:
    probs = np.random.default_rng(4).dirichlet(np.ones(2000))
    first, second = kind(probs, seed=1), kind(probs, seed=2)
    first.draw((3, 256))
    first.draw_uniform((256,))
    second.load_state_dict(first.state_dict())
    for draw in ("draw", "draw_uniform", "draw"):
        assert torch.equal(getattr(first, draw)((20, 256)), getattr(second, draw)((20, 256)))


def test_state_of_another_batch_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"batches of shape \(0, 4\), expected \(n, 8\)"):
        ReferenceSampler(np.ones(30), batch_size=8).load_state_dict(ReferenceSampler(np.ones(30), 4).state_dict())


def test_uniform_batches_of_the_reference_are_one_stream() -> None:
    together, apart = (ReferenceSampler(np.ones(50), batch_size=8, seed=3) for _ in range(2))
    assert torch.equal(together.draw_uniform((5, 8)), torch.stack([apart.draw_uniform((8,)) for _ in range(5)]))


def test_reference_sampler_draws_like_legacy_numpy() -> None:
    probs = np.random.default_rng(3).dirichlet(np.ones(40))
    np.random.seed(7)  # noqa: NPY002 - the stream to compare with
    want = np.random.choice(40, (5, 8), p=probs)  # noqa: NPY002 - the stream to compare with
    sampler = ReferenceSampler(probs, batch_size=8, seed=7)
    np.testing.assert_array_equal(torch.stack([sampler.draw((8,)) for _ in range(5)]), want)


def test_reference_sampler_serves_fewer_rows_than_a_batch() -> None:
    assert ReferenceSampler(np.ones(3), batch_size=8).draw((2, 8)).shape == (2, 8)


def test_reference_sampler_refuses_another_batch_size() -> None:
    with pytest.raises(UserError, match="must end with the batch size 8"):
        ReferenceSampler(np.ones(30), batch_size=8).draw((4,))


@pytest.mark.parametrize("weights", [[np.nan, 1.0], [-1.0, 2.0], [0.0, 0.0], []])
def test_sampler_refuses_what_are_no_probabilities(weights: list[float]) -> None:
    with pytest.raises(UserError, match="probabilities must be"):
        AliasSampler(weights)


def test_row_of_a_wrong_probability_is_named_across_pieces() -> None:
    weights = np.ones(10)
    weights[7] = -0.5
    with patch.dict(samplers.PIECE_ROWS, cpu=3), pytest.raises(UserError, match=r"row 7 has -0\.5"):
        CdfSampler(weights)


@pytest.mark.parametrize("kind", [AliasSampler, CdfSampler, ReferenceSampler])
def test_more_rows_than_an_index_holds_are_refused(kind: Any) -> None:
    with pytest.raises(UserError, match="there are 2147483648 probabilities: at most 2147483647"):
        kind(torch.ones(1).expand(2**31))


def failing(error: Exception) -> Callable[..., Any]:
    def allocate(*_: object, **__: object) -> Any:
        raise error

    return allocate


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_too_little_memory_names_the_bytes(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(torch, "empty", failing(error))
    with pytest.raises(UserError, match="a sampler of 1000 rows needs 8000 bytes on cpu"):
        AliasSampler(np.ones(1000))


def test_failure_that_is_not_of_memory_stays_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", failing(RuntimeError("device-side assert")))
    with pytest.raises(RuntimeError, match="device-side assert"):
        AliasSampler(np.ones(10))
