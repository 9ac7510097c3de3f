"""The replay buffer hands out the right rows, by the right sampler, and goes on where it stopped."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from data import walk

from leap_oper import Priorities, PrioritizedReplay, oper_r
from leap_shared.errors import UserError

SAMPLERS = pytest.mark.parametrize("sampler", ["alias", "cdf", "reference"])


@SAMPLERS
def test_batch_holds_the_rows_of_its_indices(sampler: Any) -> None:
    data = walk(30)
    batch = PrioritizedReplay(data, oper_r(data), batch_size=16, sampler=sampler).sample_many(3)
    rows = batch["indices"].numpy()
    assert rows.shape == (3, 16)
    for key in ("observations", "next_observations", "actions", "rewards"):
        np.testing.assert_array_equal(batch[key], getattr(data, key)[rows])
    np.testing.assert_array_equal(batch["not_terminal"], ~data.terminals[rows])
    np.testing.assert_allclose(batch["weights"], oper_r(data).weights[rows], rtol=1e-6)


def test_one_batch_has_no_leading_dimension() -> None:
    batch = PrioritizedReplay(walk(), oper_r(walk()), batch_size=8).sample()
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "observations": (8, 2),
        "next_observations": (8, 2),
        "actions": (8, 1),
        "rewards": (8,),
        "not_terminal": (8,),
        "weights": (8,),
        "indices": (8,),
    }


@SAMPLERS
def test_uniform_batches_ignore_the_weights(sampler: Any) -> None:
    data = walk(2, rewards=[0.0] * 10 + [1.0] * 10)
    replay = PrioritizedReplay(data, oper_r(data), batch_size=20, sampler=sampler)
    assert replay.sample()["indices"].min() >= 10
    assert replay.sample_many(20, uniform=True)["indices"].min() == 0


def test_uniform_batches_do_not_repeat_the_random_numbers_of_prioritised_ones() -> None:
    data = walk(30)
    policy, critic = PrioritizedReplay(data, Priorities(np.ones(300)), seed=1).sample_decoupled()
    assert (policy["indices"] == critic["indices"]).float().mean() < 0.1


@SAMPLERS
def test_decoupled_batches_are_a_prioritised_one_and_then_a_uniform_one(sampler: Any) -> None:
    data = walk(30)
    both, single = (PrioritizedReplay(data, oper_r(data), batch_size=16, sampler=sampler, seed=5) for _ in range(2))
    policy, critic = both.sample_decoupled()
    assert torch.equal(policy["indices"], single.sample()["indices"])
    assert torch.equal(critic["indices"], single.sample(uniform=True)["indices"])


def test_next_actions_come_with_their_rows() -> None:
    data = walk()
    following = np.roll(data.actions, -1, axis=0)
    batch = PrioritizedReplay(data, oper_r(data), batch_size=8, next_actions=following).sample()
    np.testing.assert_array_equal(batch["next_actions"], following[batch["indices"]])


@pytest.mark.parametrize(
    ("next_actions", "message"),
    [(np.zeros((59, 1)), r"shape \(59, 1\), expected that of actions \(60, 1\)"), (np.full((60, 1), np.nan), "NaN")],
)
def test_next_actions_that_do_not_fit_are_refused(next_actions: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrioritizedReplay(walk(), oper_r(walk()), batch_size=8, next_actions=next_actions)


def test_length_is_that_of_the_data_and_iteration_does_not_end() -> None:
    replay = PrioritizedReplay(walk(), oper_r(walk()), batch_size=8)
    assert len(replay) == 60
    assert len(list(itertools.islice(replay, 20))) == 20


@SAMPLERS
def test_buffer_goes_on_from_its_state_to_the_same_bits(sampler: Any) -> None:
    data = walk(30)
    first, second = (PrioritizedReplay(data, oper_r(data), 16, sampler=sampler, seed=seed) for seed in (1, 2))
    first.sample_many(3)
    first.sample(uniform=True)
    second.load_state_dict(first.state_dict())
    for uniform in (False, True, False):
        want, got = first.sample_many(30, uniform=uniform), second.sample_many(30, uniform=uniform)
        assert torch.equal(want["indices"], got["indices"])


def test_new_priorities_change_draws_and_weights() -> None:
    data = walk(2)
    replay = PrioritizedReplay(data, Priorities(np.ones(20)), batch_size=16)
    replay.set_priorities(Priorities(np.eye(20)[7]))
    batch = replay.sample()
    assert set(batch["indices"].tolist()) == {7}
    assert set(batch["weights"].tolist()) == {20.0}


def test_new_priorities_of_other_data_are_refused() -> None:
    replay = PrioritizedReplay(walk(), oper_r(walk()), batch_size=8)
    with pytest.raises(UserError, match="70 weights for 60 rows"):
        replay.set_priorities(Priorities(np.ones(70)))


@SAMPLERS
def test_batch_larger_than_the_data_warns_and_repeats_rows(sampler: Any) -> None:
    data = walk(2, 3)
    with pytest.warns(UserWarning, match="6 rows are fewer than a batch of 256"):
        replay = PrioritizedReplay(data, Priorities(np.ones(6)), sampler=sampler)
    assert replay.sample()["actions"].shape == (256, 1)


def test_replay_refuses_weights_of_other_data() -> None:
    with pytest.raises(UserError, match="made for other data"):
        PrioritizedReplay(walk(seed=1), oper_r(walk()))


def test_replay_suggests_a_sampler() -> None:
    with pytest.raises(UserError, match="did you mean alias"):
        PrioritizedReplay(walk(), oper_r(walk()), batch_size=8, sampler="alais")


def test_replay_refuses_empty_batches() -> None:
    with pytest.raises(UserError, match="batch_size is 0"):
        PrioritizedReplay(walk(), oper_r(walk()), batch_size=0)


def test_replay_names_the_devices_that_are_here() -> None:
    with pytest.raises(UserError, match="device 'tpu' is not available"):
        PrioritizedReplay(walk(), oper_r(walk()), batch_size=8, device="tpu")
