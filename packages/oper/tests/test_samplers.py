"""Samplers draw what they are told to, and the replay buffer hands out the right rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from data import walk
from hypothesis import given
from hypothesis import strategies as st

from leap_oper import AliasSampler, CdfSampler, Priorities, PrioritizedReplay, ReferenceSampler, oper_r
from leap_shared.errors import UserError

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-6, 1e6)), min_size=1, max_size=60).filter(any)
MASS_TOLERANCE = 1e-12  # float64 prefix sums of at most a million rows
CHI_SQUARE_TOP = 163.6  # 99.99% quantile for 99 degrees of freedom


@given(WEIGHTS)
def test_alias_tables_stand_for_the_probabilities(weights: list[float]) -> None:
    probs = np.array(weights) / np.sum(weights)
    np.testing.assert_allclose(AliasSampler(probs).mass(), probs, atol=MASS_TOLERANCE)


def test_alias_tables_are_exact_at_a_million_rows() -> None:
    weights = np.random.default_rng(0).pareto(1.2, size=1_000_000)
    probs = weights / weights.sum()
    np.testing.assert_allclose(AliasSampler(probs).mass(), probs, atol=MASS_TOLERANCE)


@given(WEIGHTS)
def test_rows_of_weight_zero_are_never_drawn(weights: list[float]) -> None:
    for sampler in (AliasSampler(weights), CdfSampler(weights)):
        assert np.all(np.array(weights)[sampler.draw((200,))] > 0)


@pytest.mark.parametrize("kind", [AliasSampler, CdfSampler])
def test_draws_have_the_right_frequencies(kind: Any) -> None:
    probs = np.random.default_rng(1).dirichlet(np.ones(100))
    count = 200_000
    seen = np.bincount(kind(probs, seed=2).draw((count,)).numpy(), minlength=100)
    assert np.sum((seen - count * probs) ** 2 / (count * probs)) < CHI_SQUARE_TOP


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


@pytest.mark.parametrize("sampler", ["alias", "cdf", "reference"])
def test_batch_holds_the_rows_of_its_indices(sampler: Any) -> None:
    data = walk(30)
    batch = PrioritizedReplay(data, oper_r(data), batch_size=16, sampler=sampler).sample_many(3)
    rows = batch["indices"].numpy()
    assert rows.shape == (3, 16)
    for key in ("observations", "next_observations", "actions", "rewards"):
        np.testing.assert_array_equal(batch[key], getattr(data, key)[rows])
    np.testing.assert_array_equal(batch["not_terminal"], ~data.terminals[rows])
    np.testing.assert_allclose(batch["weights"], oper_r(data).weights[rows], rtol=1e-6)


@pytest.mark.parametrize("sampler", ["alias", "reference"])
def test_uniform_batches_ignore_the_weights(sampler: Any) -> None:
    data = walk(2, rewards=[0.0] * 10 + [1.0] * 10)
    replay = PrioritizedReplay(data, oper_r(data), batch_size=20, sampler=sampler)
    assert replay.sample()["indices"].min() >= 10
    assert replay.sample_many(20, uniform=True)["indices"].min() == 0


def test_batch_larger_than_the_data_warns_and_repeats_rows() -> None:
    data = walk(2, 3)
    with pytest.warns(UserWarning, match="6 rows are fewer than a batch of 256"):
        replay = PrioritizedReplay(data, Priorities(np.ones(6)))
    assert replay.sample()["actions"].shape == (256, 1)


def test_replay_refuses_weights_of_other_data() -> None:
    with pytest.raises(UserError, match="made for other data"):
        PrioritizedReplay(walk(seed=1), oper_r(walk()))


def test_replay_suggests_a_sampler() -> None:
    with pytest.raises(UserError, match="did you mean alias"):
        PrioritizedReplay(walk(), oper_r(walk()), batch_size=8, sampler="alais")
