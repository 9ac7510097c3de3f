"""Training many runs: rows and batches, samplers, interruptions that cost nothing, losses that explode."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leap_shared.errors import UserError
from leap_shared.offline import Transitions
from leap_shared.offline.algorithms import TD3BC, TD3BCConfig
from leap_shared.offline.policies import Policies
from leap_shared.offline.rows import Rows, known_next_actions
from leap_shared.offline.training import Training, UniformSampler


def data(seed: int = 0, rows: int = 200) -> Transitions:
    random = np.random.default_rng(seed)
    states = random.normal(3, 2, (rows + 1, 3)).astype(np.float32)
    ends = np.arange(rows) % 20 == 19
    terminals = ends & (np.arange(rows) % 40 == 39)
    return Transitions.from_arrays(
        states[:-1],
        random.uniform(-1, 1, (rows, 2)),
        random.normal(size=rows),
        states[1:],
        terminals,
        ends & ~terminals,
    )


def training(seeds: tuple[int, ...] = (0, 1), policy: bool = True, **config: Any) -> Training:
    algorithm = TD3BC(3, 2, seeds, TD3BCConfig(hidden=(8, 8), **config))
    rows = Rows([data()] * len(seeds), normalise=True)
    critic, chosen = ([UniformSampler(200, seed=seed + k) for seed in seeds] for k in (0, 100))
    return Training(algorithm, rows, critic, chosen if policy else None, batch_size=16)


def weights(run: Training) -> list[torch.Tensor]:
    return [
        part.clone()
        for state in run.algorithm.state_dict().values()
        if isinstance(state, dict)
        for part in state.values()
    ]


def assert_same(one: Training, other: Training) -> None:
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))
    for ours, theirs in zip(one.history, other.history, strict=True):
        assert {**ours, "updates_per_second": 0} == {**theirs, "updates_per_second": 0}


def test_a_batch_holds_the_rows_of_each_runs_own_data() -> None:
    sets = [data(0), data(1), data(0)]
    rows = Rows([sets[0], sets[1], sets[0]])
    indices = torch.tensor([[5, 7], [5, 7], [0, 199]])
    batch = rows.batch(indices)
    for run, source in enumerate((sets[0], sets[1], sets[0])):
        chosen = indices[run].numpy()
        np.testing.assert_array_equal(batch.observations[run], source.observations[chosen])
        np.testing.assert_array_equal(batch.next_observations[run], source.next_observations[chosen])
        np.testing.assert_array_equal(batch.actions[run], source.actions[chosen])
        np.testing.assert_array_equal(batch.rewards[run], source.rewards[chosen])
        np.testing.assert_array_equal(batch.not_terminal[run], 1 - source.terminals[chosen])
    assert len(rows.table.rows) == 400
    assert (batch.weights == 1).all()


def test_states_are_normalised_by_their_own_data_and_rewards_replaced() -> None:
    one, other = data(0), data(1)
    rows = Rows([one, other], normalise=True, rewards=lambda found: found.rewards - 1)
    batch = rows.batch(torch.arange(200).expand(2, -1))
    torch.testing.assert_close(batch.observations.mean(1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    assert rows.mean[0, 0].tolist() == pytest.approx(one.observations.mean(0).tolist(), rel=1e-5)
    np.testing.assert_allclose(batch.rewards[1], other.rewards - 1)


def test_runs_on_the_same_data_may_have_their_own_weights() -> None:
    source, generator = data(), np.random.default_rng(0)
    mine, yours = generator.random((2, 200))
    rows = Rows([source] * 3, weights=[mine, None, yours])
    batch = rows.batch(torch.tensor([[3, 199]] * 3))
    np.testing.assert_allclose(batch.weights, [mine[[3, 199]], [1, 1], yours[[3, 199]]], rtol=1e-6)
    short = data(1, rows=100)
    batch = Rows([source, short, source], weights=[None, None, yours]).batch(torch.tensor([[99]] * 3))
    np.testing.assert_allclose(batch.weights[:, 0], [1, 1, yours[99]], rtol=1e-6)
    with pytest.raises(UserError, match=r"weights of shape \(3,\) for 200 rows"):
        Rows([source], weights=[np.ones(3)])


def test_next_actions_are_those_of_the_next_row_where_it_belongs_to_the_episode() -> None:
    source = data()
    known = np.flatnonzero(known_next_actions(source) & ~source.terminals)
    batch = Rows([source], next_actions=True).batch(torch.from_numpy(known)[None])
    np.testing.assert_array_equal(batch.next_actions[0], source.actions[known + 1])
    assert not known_next_actions(source)[source.timeouts].any()


def test_uniform_draws_stay_among_the_allowed_rows() -> None:
    allowed = torch.tensor([3, 5, 8])
    drawn = UniformSampler(10, seed=1, allowed=allowed).draw((40, 50))
    counts = torch.bincount(drawn.flatten(), minlength=10)
    assert set(counts.nonzero().flatten().tolist()) == {3, 5, 8}
    assert (counts[allowed] - 2000 / 3).abs().max() < 4 * (2000 * 2 / 9) ** 0.5  # four standard deviations


def test_a_run_draws_its_batches_by_its_own_seed_alone() -> None:
    """The noise is common to all runs; without it one of two runs is the run alone."""
    alone, among = training((1,), policy_noise=0.0), training((0, 1), policy_noise=0.0)
    for run in (alone, among):
        run.train(6, every=3)
    for name, state in alone.algorithm.export(0).items():
        for key, value in state.items():
            torch.testing.assert_close(among.algorithm.export(1)[name][key], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("stop", [4, 7])
def test_a_stopped_run_goes_on_to_the_same_bits(stop: int, tmp_path: Path) -> None:
    whole, first, second = training(), training(), training()
    whole.train(10, every=4)

    def die(count: int, text: str) -> None:
        if first.algorithm.updates >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.train(10, every=4, out=tmp_path, progress=die)
    told: list[int] = []
    second.train(10, every=4, out=tmp_path, progress=lambda count, text: told.append(count))
    assert_same(second, whole)
    assert sum(told) == 10


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, resumed = training(), training()
    whole.train(40, every=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    resumed.train(40, every=2, out=tmp_path)
    assert_same(resumed, whole)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    training().train(2, every=2, out=tmp_path)
    other = training()
    other.settings = "others"
    with pytest.raises(UserError, match="another run"):
        other.train(2, every=2, out=tmp_path)


def test_a_loss_that_is_not_finite_is_reported_at_its_update_and_the_good_checkpoint_stays(tmp_path: Path) -> None:
    run = training()
    run.train(4, every=2, out=tmp_path)
    noise = run.algorithm.noise
    run.algorithm.noise = lambda *given: (noise(*given)[0] * (float("nan") if run.algorithm.updates == 5 else 1),)
    with pytest.raises(UserError, match=r"nan at step 6, the last good checkpoint is .*step-000000000004"):
        run.train(10, every=4, out=tmp_path)
    fresh = training()
    fresh.train(4, every=2, out=tmp_path)
    assert all(part.isfinite().all() for part in weights(fresh))


def test_numbers_that_do_not_fit_are_refused() -> None:
    algorithm, rows = TD3BC(3, 2, [0, 1]), Rows([data()] * 2)
    with pytest.raises(UserError, match=r"number \[1, 2\]"):
        Training(algorithm, rows, [UniformSampler(200)])


def test_policies_act_on_raw_states_and_survive_their_file(tmp_path: Path) -> None:
    run = training((3, 4), max_action=0.5)
    run.train(2, every=2)
    policies = Policies(run.algorithm, run.rows.mean, run.rows.std)
    policies.save(tmp_path / "p.safetensors")
    states = data(9).observations[None].repeat(2, axis=0)
    actions = policies.act(states)
    loaded = Policies.load(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(loaded.act(states), actions)
    np.testing.assert_allclose(loaded.policy(1)(states[1]), actions[1], rtol=1e-6)
    normalised = (torch.from_numpy(states) - run.rows.mean) / run.rows.std
    np.testing.assert_allclose(run.algorithm.act(normalised), actions)


def test_a_file_without_policies_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="holds no policies"):
        Policies.load(tmp_path / "x.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    victim = training()

    def kill(count: int, text: str) -> None:
        if victim.algorithm.updates == 22:
            os.kill(os.getpid(), signal.SIGKILL)

    victim.train(40, every=2, out=Path(sys.argv[1]), progress=kill)
