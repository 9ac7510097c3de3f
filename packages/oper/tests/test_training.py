"""Batched training: independent runs, progress on a known problem, and resuming to the same bits after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data import walk

from leap_oper import BehaviourCloning, Priorities, Run, ValueFit, oper_a, oper_r
from leap_oper.advantages import iterate, learning_rate
from leap_shared.checkpoints import CheckpointFolder
from leap_shared.errors import UserError
from leap_shared.offline import Transitions

ROUNDING = 1e-5  # batched and single matrix products sum in another order


def teachable(rows: int = 400) -> Transitions:
    """Actions are a smooth function of the state."""
    states = np.random.default_rng(0).standard_normal((rows, 2))
    return Transitions.from_arrays(states, np.tanh(states[:, :1]), np.zeros(rows), states, np.zeros(rows))


def test_cloning_learns_the_actions() -> None:
    history = BehaviourCloning([Run(teachable(), 0)], hidden=(32, 32)).train(400, every=200)
    assert history[-1]["loss"][0] < 2e-3


def test_a_run_does_not_depend_on_its_companions() -> None:
    data = walk(20)
    runs = [Run(data, 3), Run(data, 4, oper_r(data))]
    together, alone = BehaviourCloning(runs, hidden=(16,)), BehaviourCloning(runs[1:], hidden=(16,))
    for trainer in (together, alone):
        trainer.train(30, every=10)
    states = data.observations[:5]
    np.testing.assert_allclose(together.policy(1)(states), alone.policy(0)(states), atol=ROUNDING)


def test_priorities_decide_what_is_cloned() -> None:
    states = np.zeros((200, 1))
    actions = np.repeat([[-0.8], [0.8]], 100, axis=0)
    data = Transitions.from_arrays(states, actions, np.zeros(200), states, np.zeros(200))
    runs = [Run(data, 0), Run(data, 0, Priorities((actions[:, 0] > 0).astype(float)))]
    trainer = BehaviourCloning(runs, hidden=(16,))
    trainer.train(300, every=100)
    uniform, chosen = (trainer.policy(index)(np.zeros((1, 1), np.float32)).item() for index in range(2))
    assert abs(uniform) < 0.2
    assert chosen == pytest.approx(0.8, abs=0.05)


def test_learning_rate_falls_along_the_cosine() -> None:
    assert learning_rate("cosine", 0, 10) == pytest.approx(3e-4)
    assert learning_rate("cosine", 5, 10) == pytest.approx(1.5e-4)
    assert learning_rate("linear", 9, 10) == pytest.approx(3e-5)


def test_values_find_the_return_of_a_chain() -> None:
    """Three states in a row, reward 1 at the last step, terminal there: V = discount^steps left."""
    states = np.tile([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], (20, 1))
    following = np.tile([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], (20, 1))
    rewards, terminals = np.tile([0.0, 0.0, 1.0], 20), np.tile([0, 0, 1], 20)
    data = Transitions.from_arrays(states, np.zeros((60, 1)), rewards, following, terminals)
    fit = ValueFit([data], [0], discount=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        fit.update(torch.randint(60, (1, 64), generator=generator), 1e-3)
    np.testing.assert_allclose(fit.advantages().v[0, :3], [0.25, 0.5, 1.0], atol=0.05)


def test_oper_a_gives_one_layer_per_seed_and_iteration() -> None:
    data = walk(20)
    weights = oper_a(data, iters=3, steps=4, seeds=(1, 2), device="cpu", batch_size=16)
    assert weights.weights.shape == (2, 3, 200)
    final = weights.at(iteration=3).ensemble("mean").rescale(std=0.5, eps=0.1)
    final.check(data)
    assert final.probs.sum() == pytest.approx(1.0)


def test_settings_of_another_run_are_refused(tmp_path: Path) -> None:
    data = walk(20)
    BehaviourCloning([Run(data, 1)], hidden=(8,)).train(4, every=2, out=tmp_path)
    with pytest.raises(UserError, match="another run"):
        BehaviourCloning([Run(data, 2)], hidden=(8,)).train(4, every=2, out=tmp_path)


def test_runs_of_other_widths_are_refused() -> None:
    with pytest.raises(UserError, match="expected one pair"):
        BehaviourCloning([Run(walk(), 0), Run(teachable_wide(), 0)])


def teachable_wide() -> Transitions:
    states = np.zeros((10, 3))
    return Transitions.from_arrays(states, states, np.zeros(10), states, np.zeros(10))


def test_nan_loss_stops_at_its_step() -> None:
    trainer = BehaviourCloning([Run(walk(20), 0)], hidden=(8,), learning_rate=float("inf"))
    with pytest.raises(UserError, match="the loss is nan at step 10"):
        trainer.train(20, every=10)


def test_value_fit_needs_a_data_set_per_seed() -> None:
    with pytest.raises(UserError, match="2 seeds and 1 data sets"):
        ValueFit([walk()], [0, 1])


def test_n_step_beyond_the_longest_episode_warns() -> None:
    with pytest.warns(UserWarning, match="n_steps=11 is more than the longest episode, 10 rows"):
        ValueFit([walk()], [0], n_steps=11)


def test_values_of_other_data_are_not_resumed(tmp_path: Path) -> None:
    iterate(ValueFit([walk(20)], [0], hidden=8), iters=1, steps=2, out=tmp_path)
    with pytest.raises(UserError, match="another run"):
        iterate(ValueFit([walk(20, seed=1)], [0], hidden=8), iters=1, steps=2, out=tmp_path)


def test_iterations_need_updates() -> None:
    with pytest.raises(UserError, match="each must be at least 1"):
        iterate(ValueFit([walk()], [0]), iters=2, steps=0)


PROGRAM = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from data import walk
from leap_oper import BehaviourCloning, Run, ValueFit, oper_r
from leap_oper.advantages import iterate
data, out = walk(30), Path(sys.argv[2])
say = lambda n: print("step", flush=True)
fit = ValueFit([data, data], [1, 2], hidden=32)
weights = iterate(fit, iters=3, steps=12, every=4, batch_size=32, out=out / "a", progress=say)
trainer = BehaviourCloning([Run(data, 1), Run(data, 2, oper_r(data))], hidden=(16, 16))
trainer.train(40, every=5, out=out / "bc", progress=say)
torch.save({"weights": torch.from_numpy(weights), **trainer.network.state_dict()}, out / "final.pt")
"""


def train(out: Path, kill_after: int | None = None) -> None:
    """Run PROGRAM, killing it after it has reported so many blocks."""
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for count, _ in enumerate(process.stdout, 1):
            if count == kill_after:
                os.kill(process.pid, signal.SIGKILL)
        code = process.wait()
    assert code == (0 if kill_after is None else -signal.SIGKILL)


def test_killed_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    for blocks in (3, 4, 9):
        train(tmp_path / "killed", kill_after=blocks)
    train(tmp_path / "killed")
    whole, killed = (torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for key, value in whole.items():
        assert torch.equal(value, killed[key]), key
    assert CheckpointFolder(tmp_path / "killed" / "bc").latest() is not None
