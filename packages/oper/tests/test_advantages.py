"""OPER-A: values against autograd and against the definitions of their targets, iterations, and kills."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import walk
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leap_oper import advantages, oper_a, values
from leap_oper.advantages import ValueConfig, ValueFit, iterate, learning_rate
from leap_oper.batched import Batches
from leap_shared.errors import UserError
from leap_shared.offline import Transitions, state_normalisation

ROUNDING = 1e-5  # float32 products summed in another order
SMALL = (16, 16)


def mixed(rows: int = 60, seed: int = 0) -> Transitions:
    """Episodes of one to a few rows that end by terminals, by time, or by a jump."""
    random = np.random.default_rng(seed)
    states, after = random.standard_normal((2, rows, 3))
    going = random.random(rows) < 0.7
    after[:-1][going[:-1]] = states[1:][going[:-1]]
    terminals = ~going & (random.random(rows) < 0.5)
    return Transitions.from_arrays(
        states, random.uniform(-1, 1, (rows, 2)), random.standard_normal(rows), after, terminals
    )


def fit_of(data: Transitions, seeds: tuple[int, ...] = (0,), **config: Any) -> ValueFit:
    return ValueFit([data] * len(seeds), seeds, ValueConfig(**{"hidden": SMALL, **config}))


def network(state: dict[str, Tensor], layers: tuple[str, ...], inputs: Tensor) -> Tensor:
    for layer in layers:
        inputs = torch.nn.functional.linear(inputs, state[f"{layer}.weight"], state[f"{layer}.bias"])
        inputs = inputs if layer == layers[-1] else inputs.relu()
    return inputs[:, 0]


def heads(state: dict[str, Tensor], inputs: Tensor) -> list[Tensor]:
    names = [layers for layers in (("l1", "l2", "l3"), ("l4", "l5", "l6")) if f"{layers[0]}.weight" in state]
    return [network(state, layers, inputs) for layers in names]


def n_step_targets(data: Transitions, rewards: Any, steps: int, discount: float) -> tuple[Any, Any, Any]:
    """R, g and the row whose successor is s_n (None: there is none), row by row as they are defined."""
    rows, returns, gains, last = len(data), [], [], []
    for row in range(rows):
        total, done = 0.0, False
        for k in range(min(steps, rows - row)):
            total += discount**k * float(rewards[row + k])
            if data.ends[row + k]:
                done = True
                break
        returns.append(total)
        gains.append(0.0 if done else discount**steps)
        last.append(row + steps - 1)
    return np.array(returns), np.array(gains), np.minimum(last, rows - 1)


def return_to_go(data: Transitions, rewards: Any, discount: float) -> Any:
    total, found = 0.0, np.empty(len(data))
    for row in reversed(range(len(data))):
        total = float(rewards[row]) + (0.0 if data.ends[row] else discount * total)
        found[row] = total
    return found


@pytest.mark.parametrize("critic_type", ["doublev", "v", "vq"])
@pytest.mark.parametrize(("td_type", "n_step"), [("nstep", 1), ("nstep", 3), ("mc", 1)])
def test_updates_are_those_of_autograd_and_adam(critic_type: str, td_type: str, n_step: int) -> None:
    """Three updates of the losses as they are written, with torch's Adam, on the same rows."""
    data = mixed()
    fit = fit_of(data, critic_type=critic_type, td_type=td_type, n_step=n_step)
    states: Any = copy.deepcopy(fit.export(0))
    names = ["value", *(["critic"] if critic_type == "vq" else [])]
    optimizers = {}
    for name in names:
        leaves = {key: value.contiguous().requires_grad_() for key, value in states[name].items()}
        states[name], optimizers[name] = leaves, torch.optim.Adam(leaves.values(), lr=1e-3)
    mean, std = state_normalisation(data.observations)
    s, after = (torch.from_numpy((x - mean) / std) for x in (data.observations, data.next_observations))
    if td_type == "mc":
        returns, gain, last = return_to_go(data, data.rewards, 0.99), np.zeros(60), np.arange(60)
    elif n_step == 1:
        returns, gain, last = data.rewards, 0.99 * ~data.terminals, np.arange(60)
    else:
        returns, gain, last = n_step_targets(data, data.rewards, n_step, 0.99)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        rows = torch.randint(60, (20,), generator=generator)
        logs = fit.update(rows[None], 1e-3)
        with torch.no_grad():
            ahead = torch.stack(heads(states["value_target"], after[last[rows]])).amin(0)
            goal = torch.as_tensor(returns[rows]) + torch.as_tensor(gain[rows]) * ahead
            pairs = torch.cat([s[rows], torch.from_numpy(data.actions[rows])], 1)
        goals, inputs = {"value": goal.float()}, {"value": s[rows], "critic": pairs}
        if critic_type == "vq":
            with torch.no_grad():
                least = torch.stack(heads(states["critic_target"], pairs)).amin(0)
            goals = {"critic": goals["value"], "value": least}
            assert logs["q"].item() == pytest.approx(least.mean().item(), abs=ROUNDING)
        for name, target in goals.items():
            outputs = heads(states[name], inputs[name])
            loss = torch.stack([(output - target).square().mean() for output in outputs]).sum()
            assert logs[f"{name}_loss"].item() == pytest.approx(loss.item(), rel=ROUNDING)
            optimizers[name].zero_grad()
            torch.autograd.backward(loss)
            optimizers[name].step()
        with torch.no_grad():
            for name in names:
                for key, slow in states[f"{name}_target"].items():
                    slow.lerp_(states[name][key], 0.005)
    for name, state in fit.export(0).items():
        for key, value in state.items():
            torch.testing.assert_close(value, states[name][key].detach(), atol=ROUNDING, rtol=0)


@given(
    seed=st.integers(0, 1000), steps=st.integers(2, 6), antmaze=st.booleans(), compat=st.booleans(), mc=st.booleans()
)
def test_targets_of_several_rows_are_shifted_first_unless_compat(
    seed: int, steps: int, antmaze: bool, compat: bool, mc: bool
) -> None:
    data = mixed(seed=seed)
    longest = int(np.diff(np.flatnonzero(data.ends), prepend=-1).max())
    steps = min(steps, longest)
    config = ValueConfig(antmaze=antmaze, compat=compat, normalise=False)
    width = 3 if mc or steps < 1 else 6
    found = values._columns(data, 0 if mc else steps, config)
    rewards = data.rewards - (1 if antmaze and not (compat and (mc or steps > 1)) else 0)
    if mc:
        returns, gain = return_to_go(data, rewards, 0.99), np.zeros(60)
    elif steps == 1:
        returns, gain = rewards, 0.99 * ~data.terminals
    else:
        returns, gain, _ = n_step_targets(data, rewards, steps, 0.99)
    np.testing.assert_allclose(found[:, width], returns, atol=ROUNDING)
    np.testing.assert_allclose(found[:, width + 1], gain, atol=ROUNDING)


def test_generalised_advantages_follow_their_recursion() -> None:
    data = mixed()
    one, gae = fit_of(data), fit_of(data, adv_type="gae", n_step=3, gae_lambda=0.9)
    gae.load(0, one.export(0))
    v, _, delta = one.advantages()
    found, expected = gae.advantages(), np.zeros(60)
    for row in reversed(range(60)):
        following = 0.0 if data.ends[row] else expected[row + 1]
        expected[row] = delta[0, row] + 0.99 * 0.9 * following
    np.testing.assert_allclose(found.adv[0], expected, atol=ROUNDING)
    np.testing.assert_allclose(found.q, found.adv + v, atol=ROUNDING)


def test_monte_carlo_advantages_compare_with_the_return_to_go() -> None:
    data = mixed()
    found = fit_of(data, adv_type="mc", antmaze=True).advantages()
    np.testing.assert_allclose(found.q[0], return_to_go(data, data.rewards - 1, 0.99), atol=ROUNDING)
    np.testing.assert_array_equal(found.adv, found.q - found.v)


def test_advantages_are_of_the_online_networks() -> None:
    data = mixed()
    fit = fit_of(data, normalise=False)
    for name, network_ in fit.export(0).items():
        for value in network_.values():
            value.zero_()
        network_["l3.bias"].fill_(2.0 if name == "value" else 7.0)
        network_["l6.bias"].fill_(3.0 if name == "value" else 7.0)
    found = fit.advantages()
    np.testing.assert_array_equal(found.v, np.full((1, 60), 2.0))
    np.testing.assert_allclose(found.q[0], data.rewards + 0.99 * ~data.terminals * 2.0, atol=ROUNDING)


def test_advantages_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = ValueFit([mixed(), mixed(seed=1)], [0, 1], ValueConfig(hidden=SMALL, critic_type="vq"))
    whole = fit.advantages().adv
    monkeypatch.setitem(values.EVALUATION_ROWS, "cpu", 7)
    np.testing.assert_allclose(fit.advantages().adv, whole, atol=ROUNDING)


@pytest.mark.parametrize("critic_type", ["doublev", "v", "vq"])
def test_a_seed_does_not_depend_on_its_companions(critic_type: str) -> None:
    sets, config = [mixed(), mixed(seed=1)], ValueConfig(hidden=SMALL, critic_type=critic_type)
    options: dict[str, Any] = {"iters": 2, "steps": 10, "batch_size": 20}
    together = iterate(ValueFit(sets, [3, 4], config), **options)
    alone = iterate(ValueFit(sets[1:], [4], config), **options)
    np.testing.assert_allclose(together[1], alone[0], atol=1e-3)  # of weights up to 8, after 20 updates


def test_values_find_the_return_of_a_chain() -> None:
    """Three states in a row, reward 1 at the last step, terminal there: V = discount^steps left."""
    states = np.tile([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], (20, 1))
    following = np.tile([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], (20, 1))
    rewards, terminals = np.tile([0.0, 0.0, 1.0], 20), np.tile([0, 0, 1], 20)
    data = Transitions.from_arrays(states, np.zeros((60, 1)), rewards, following, terminals)
    fit = fit_of(data, discount=0.5, hidden=(64, 64))
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        fit.update(torch.randint(60, (1, 64), generator=generator), 1e-3)
    np.testing.assert_allclose(fit.advantages().v[0, :3], [0.25, 0.5, 1.0], atol=0.05)


def test_learning_rate_falls_along_its_schedule() -> None:
    assert learning_rate("cosine", 0, 10) == pytest.approx(3e-4)
    assert learning_rate("cosine", 5, 10) == pytest.approx(1.5e-4)
    assert learning_rate("linear", 9, 10) == pytest.approx(3e-5)
    assert learning_rate("none", 9, 10) == pytest.approx(3e-4)


def test_iterations_keep_the_networks_and_start_adam_afresh() -> None:
    fit = fit_of(walk(20))
    before = fit.export(0)["value"]["l2.weight"].clone()
    iterate(fit, iters=1, steps=5, batch_size=16)
    moved = fit.export(0)["value"]["l2.weight"].clone()
    iterate(fit, iters=2, steps=3, first_steps=4, batch_size=16, schedule="none")
    assert fit.value.optimizer.steps.item() == 3
    assert not torch.equal(before, moved)
    assert (fit.export(0)["value"]["l2.weight"] - moved).abs().max() < 8 * 3e-4  # seven steps from where it was


class Recorder(Batches):
    """Keeps what it hands out."""

    def draw(self, steps: int) -> Any:
        """See `Batches`."""
        self.drawn = [*getattr(self, "drawn", []), super().draw(steps)]
        return self.drawn[-1]


@pytest.mark.parametrize("kind", ["alias", "cdf", "reference"])
def test_later_iterations_draw_by_the_weights(kind: str) -> None:
    batches = Recorder(60, [0], kind=kind, batch_size=30)
    weights = iterate(fit_of(mixed()), iters=3, steps=40, batches=batches)
    worst = weights[0, 0].argmin()
    uniform, second, third = batches.drawn
    assert (uniform == worst).any()
    assert not (second == worst).any()
    counts = np.bincount(third.flatten(), minlength=60)
    assert np.corrcoef(counts, weights[0, 1])[0, 1] > 0.9


def test_reference_batches_are_the_authors_stream() -> None:
    """NumPy's legacy stream: uniform batches one by one, then prefetched ones; an iteration drops what it leaves."""
    batches, random = Batches(60, [5], kind="reference", batch_size=8), np.random.RandomState(5)
    expected = [random.randint(60, size=8) for _ in range(3)]
    batches.use(None)
    found = [batches.draw(2), batches.draw(1)]
    for seed in range(2):
        weights = np.random.default_rng(seed).random((1, 60))
        batches.use(weights)
        found.append(batches.draw(2))
        expected += list(random.choice(60, (7, 8), p=weights[0] / weights.sum())[:2])
    np.testing.assert_array_equal(torch.cat(found)[:, 0], expected)


def test_oper_a_gives_one_layer_per_seed_and_iteration() -> None:
    data = walk(20)
    weights = oper_a(data, iters=3, steps=4, seeds=(1, 2), device="cpu", batch_size=16, hidden=SMALL)
    assert weights.weights.shape == (2, 3, 200)
    final = weights.at(iteration=3).ensemble("mean").rescale(std=0.5, eps=0.1)
    final.check(data)
    assert final.probs.sum() == pytest.approx(1.0)


def test_hyperparameters_and_data_are_kept_with_the_weights() -> None:
    data = walk(20)
    options: dict[str, Any] = {"critic_type": "v", "adv_type": "gae", "scale_std": 2.0, "hidden": SMALL}
    meta = oper_a(data, 1, 2, 1, (7,), "cpu", batch_size=16, **options).meta
    given_ = {**options, "fingerprint": data.fingerprint, "seeds": [7], "steps": 2, "batch_size": 16, "n_step": 1}
    assert {key: meta[key] for key in given_} == given_


def test_stretched_weights_reach_their_deviation() -> None:
    options: dict[str, Any] = {"iters": 2, "steps": 5, "batch_size": 20}
    plain = iterate(fit_of(mixed()), **options)
    stretched = iterate(fit_of(mixed()), **options, scale_std=2.0, scale_eps=0.0)
    assert plain[0, 0].std() < 1 < stretched[0, 0].std()


def test_floor_keeps_every_row_drawable() -> None:
    weights = iterate(fit_of(mixed()), iters=2, steps=3, batch_size=20, floor=0.05)
    assert weights.min() > 0


def test_nan_loss_stops_at_its_update(tmp_path: Path) -> None:
    fit = fit_of(walk(20), learning_rate=float("inf"))
    with pytest.raises(UserError, match="the loss is nan at step 2, no checkpoint was saved"):
        iterate(fit, iters=1, steps=10, batch_size=16, out=tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"critic_type": "q"}, "critic_type 'q' is unknown: use doublev, v or vq"),
        ({"td_type": "gae"}, "td_type 'gae' is unknown: use nstep or mc"),
        ({"adv_type": "td"}, "adv_type 'td' is unknown: use nstep, gae or mc"),
        ({"n_step": 0}, "n_step is 0: give 1 or more"),
        ({"discount": 1.1}, "discount is 1.1: give a number from 0 to 1"),
        ({"gae_lambda": -1.0}, "gae_lambda is -1.0"),
    ],
)
def test_configs_that_make_no_sense_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ValueConfig(**config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "each must be at least 1"),
        ({"iters": 0}, "each must be at least 1"),
        ({"every": 0}, "each must be at least 1"),
        ({"schedule": "step"}, "schedule 'step' is unknown: use cosine, linear or none"),
        ({"sampler": "tree"}, "sampler 'tree', batch_size 256: use alias, cdf or reference"),
        ({"batch_size": 0}, "at least 1 row"),
        ({"seeds": ()}, "there are no seeds"),
        ({"lamda": 0.9}, "unknown option 'lamda'"),
        ({"gae_lamda": 0.9}, "unknown option 'gae_lamda': did you mean gae_lambda"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_work_starts(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        oper_a(walk(20), **{"device": "cpu", "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_every_seed_needs_a_data_set_of_the_same_shape() -> None:
    with pytest.raises(UserError, match="2 seeds and 1 data sets"):
        ValueFit([walk()], [0, 1])
    with pytest.raises(UserError, match="all of one shape"):
        ValueFit([walk(), mixed()], [0, 1])


def test_n_step_beyond_the_longest_episode_warns() -> None:
    with pytest.warns(UserWarning, match="n_step=11 is more than the longest episode, 10 rows"):
        fit_of(walk(), n_step=11)


def test_batch_larger_than_the_data_warns() -> None:
    with pytest.warns(UserWarning, match="a batch of 64 is drawn from 60 rows"):
        iterate(fit_of(mixed()), iters=1, steps=1, batch_size=64)


def test_values_of_other_data_are_not_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"iters": 1, "steps": 2, "batch_size": 16, "out": tmp_path}
    iterate(fit_of(walk(20)), **options)
    with pytest.raises(UserError, match="another run"):
        iterate(fit_of(walk(20, seed=1)), **options)


def test_values_of_other_hyperparameters_are_not_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"iters": 1, "steps": 2, "batch_size": 16, "out": tmp_path}
    iterate(fit_of(walk(20)), **options)
    with pytest.raises(UserError, match="another run"):
        iterate(fit_of(walk(20), gae_lambda=0.9), **options)


def test_existing_run_is_refused_unless_it_is_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"iters": 2, "steps": 3, "batch_size": 16, "out": tmp_path}
    first = iterate(fit_of(walk(20)), **options)
    with pytest.raises(UserError, match="holds a run already: resume it"):
        iterate(fit_of(walk(20)), **options, resume=False)
    np.testing.assert_array_equal(iterate(fit_of(walk(20)), **options), first)


def test_lost_weights_of_a_finished_iteration_are_reported(tmp_path: Path) -> None:
    options: dict[str, Any] = {"iters": 2, "steps": 3, "batch_size": 16, "out": tmp_path}
    iterate(fit_of(walk(20)), **options)
    (tmp_path / "weights-1.npy").unlink()
    with pytest.raises(UserError, match=r"cannot read .*weights-1\.npy, which the checkpoints need"):
        iterate(fit_of(walk(20)), **options)


def test_saves_are_as_rare_as_asked_and_blocks_do_not_change_the_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"iters": 1, "steps": 20, "batch_size": 16, "every": 10}
    monkeypatch.setattr(advantages, "BLOCK", 4)
    reports: list[int] = []
    blocks = iterate(fit_of(walk(20)), **options, out=tmp_path, progress=reports.append)
    assert reports == [0, 4, 4, 4, 4, 4]
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("step-*")) == [12, 20]
    monkeypatch.setattr(advantages, "BLOCK", 500)
    np.testing.assert_array_equal(iterate(fit_of(walk(20)), **options), blocks)


PROGRAM = """
import sys
from pathlib import Path
import numpy as np
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from data import walk
from leap_oper.advantages import ValueConfig, ValueFit, iterate
data, out = walk(30), Path(sys.argv[2])
say = lambda n: print("step", flush=True)
for kind, sampler in (("doublev", "alias"), ("vq", "reference")):
    fit = ValueFit([data, data], [1, 2], ValueConfig(critic_type=kind, hidden=(32, 32)))
    options = {"iters": 3, "steps": 12, "every": 4, "batch_size": 32, "sampler": sampler}
    weights = iterate(fit, **options, out=out / kind, progress=say)
    np.save(out / f"{kind}.npy", weights)
    torch.save(fit.state_dict(), out / f"{kind}.pt")
"""


def fit_in_a_process(out: Path, kill_after: int | None = None) -> None:
    """Run PROGRAM, killing it after it has reported so many blocks."""
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for count, _ in enumerate(process.stdout, 1):
            if count == kill_after:
                os.kill(process.pid, signal.SIGKILL)
        code = process.wait()
    assert code == (0 if kill_after is None else -signal.SIGKILL)


@pytest.mark.slow
def test_killed_fit_resumes_to_the_same_bits(tmp_path: Path) -> None:
    fit_in_a_process(tmp_path / "whole")
    for blocks in (5, 9):  # in the second iteration, and in the second fit
        fit_in_a_process(tmp_path / "killed", kill_after=blocks)
    fit_in_a_process(tmp_path / "killed")
    for kind in ("doublev", "vq"):
        whole, killed = ((tmp_path / name / f"{kind}.npy").read_bytes() for name in ("whole", "killed"))
        assert whole == killed
        states = [torch.load(tmp_path / name / f"{kind}.pt", weights_only=True) for name in ("whole", "killed")]
        for part in states[0]["value"]:
            for key, value in states[0]["value"][part].items():
                assert torch.equal(value, states[1]["value"][part][key]), (kind, part, key)


def test_fit_killed_between_weights_and_checkpoint_resumes_to_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"iters": 2, "steps": 6, "batch_size": 16, "every": 3}
    whole = iterate(fit_of(walk(20)), **options, out=tmp_path / "whole")
    fit = fit_of(walk(20))
    saves: list[int] = []

    def stop(count: int) -> None:
        saves.append(count)
        if sum(saves) == 6:
            newest = max((tmp_path / "cut").glob("step-*"), key=lambda path: path.name)
            newest.unlink()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        iterate(fit, **options, out=tmp_path / "cut", progress=stop)
    assert (tmp_path / "cut" / "weights-1.npy").exists()
    np.testing.assert_array_equal(iterate(fit_of(walk(20)), **options, out=tmp_path / "cut"), whole)
