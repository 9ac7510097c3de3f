"""The functions that the golden cases of OPER call, on the public interface of leap_oper and leap_shared.offline."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from leap_oper import Priorities, ReferenceSampler, priorities
from leap_oper import oper_r as oper_r_of
from leap_oper.advantages import ValueConfig, ValueFit, iterate, learning_rate
from leap_oper.batched import Batches
from leap_shared import offline
from leap_shared.offline import Transitions
from leap_shared.offline.algorithms import BC, IQL, TD3BC, BCConfig, IQLConfig, OneStep, OneStepConfig, TD3BCConfig
from leap_shared.offline.algorithms.base import Batch

DISTRIBUTIONS = {"normal": "normal", "trunc": "truncated"}


def convert(observations, actions, rewards, terminals, timeouts, max_episode_steps, terminate_on_end):
    return offline.convert(
        observations, actions, rewards, terminals, timeouts,
        max_episode_steps=max_episode_steps, terminate_on_end=terminate_on_end,
    )  # fmt: skip


def boundaries(observations, next_observations, terminals):
    return offline.episode_ends(np.float32(observations), np.float32(next_observations), terminals.astype(bool))


def episode_returns(rewards, end):
    return offline.episode_returns(np.float32(rewards), end.astype(bool))


def return_to_go(rewards, end, gamma):
    return offline.discounted_return_to_go(rewards, end.astype(bool), gamma)


def n_step(rewards, next_observations, end, gamma, n):
    return offline.n_step(rewards, next_observations, end.astype(bool), gamma, n)


def normalisation(observations):
    return offline.state_normalisation(observations)


def oper_r(rewards, end, base_prob):
    states = np.zeros((len(rewards), 1), np.float32)
    data = Transitions.from_arrays(states, states, rewards, states, np.zeros(len(rewards)), end)
    return oper_r_of(data, base_prob).weights


def oper_a_fit(
    data, nets, indices, n_step, critic_type, td_type, adv_type, schedule, schedule_steps, antmaze, normalize
):
    kinds = {"critic_type": critic_type, "td_type": td_type, "adv_type": adv_type, "n_step": n_step}
    hidden = tuple(len(nets["value"][f"l{layer}.bias"]) for layer in (1, 2))
    config = ValueConfig(**kinds, antmaze=bool(antmaze), normalise=bool(normalize), compat=True, hidden=hidden)
    fit = ValueFit([Transitions.from_arrays(**data)], [0], config)
    fit.load(0, nets)
    before, log = fit.advantages()._asdict(), {}
    for done, rows in enumerate(torch.as_tensor(indices), 1):
        rates = [learning_rate(schedule, step, schedule_steps) for step in (done - 1, done)]
        facts = fit.update(rows[None], rates[0])
        for name, value in (facts | {"value_lr": rates[1], "critic_lr": rates[1]}).items():
            log.setdefault(name, []).append(float(value))
    return {"before": before, "after": fit.advantages()._asdict(), "nets": fit.export(0), "log": log}


def oper_a_weights(advantages, scale, std, eps):
    weights = [np.ones(advantages[0].size)]
    for advantage in advantages:
        given = advantage.reshape(-1), std if scale else None, eps
        weights.append(priorities.advantage_weights(weights[-1], *given))
    return weights[1:]


class _Given(Batches):
    """Hands out the given batches, and keeps what the seed would have drawn."""

    given: Any
    drawn: list[Any]

    def draw(self, steps):
        self.drawn.append(super().draw(steps))
        given, self.given = self.given[:steps], self.given[steps:]
        return given[:, None]


def oper_a_run(data, value, first_steps, steps, iterations, batch, n_step, scale, seed, indices, std, eps):
    fit = ValueFit([Transitions.from_arrays(**data)], [seed], ValueConfig(n_step=n_step, compat=True))
    fit.load(0, {"value": value, "value_target": value})
    batches = _Given(fit.num_rows, [seed], kind="reference", batch_size=batch)
    batches.given, batches.drawn = torch.as_tensor(indices), []
    budget = {"iters": iterations, "steps": steps, "first_steps": first_steps}
    weights = iterate(fit, **budget, scale_std=std if scale else None, scale_eps=eps, batches=batches)
    return {"weights": list(weights[0]), "indices": torch.cat(batches.drawn)[:, 0]}


def ensemble(weights, how):
    return Priorities(np.stack([w.reshape(-1) for w in weights])).ensemble(how).weights


def stage2(weights, weight_func, std, eps, eps_max, branch, exp_lambd):
    std = std if weight_func == "linear" else None  # exp knows none
    options = {"weight_func": weight_func, "exp_lambd": exp_lambd, "branch": branch}
    return Priorities(weights).rescale(std, eps, eps_max, **options).probs


def sampler_stream(p, batch, n_prefetch, seed, count):
    return ReferenceSampler(p, batch, seed, n_prefetch).draw((count, batch))


def uniform_stream(rows, batch, seed, count):
    sampler = ReferenceSampler(np.ones(rows), batch, seed)
    return np.stack([sampler.draw_uniform((batch,)) for _ in range(count)])


def top_rows(returns, topn):
    return priorities.top_rows(np.asarray(returns, np.float32), float(topn))


def _hidden(state, stem=""):
    """Widths of the hidden layers of a network's state."""
    return tuple(len(state[key]) for key in state if key.startswith(stem) and key.endswith(".bias"))[:-1]


def _rows(batch, *keys):
    """A batch of one run; `keys` are those of (s, a, r, s', not terminal, weight, next action), None for ones."""
    given = (np.float32(batch[key]) if key else np.ones(len(batch[keys[0]]), np.float32) for key in keys)
    arrays = [torch.as_tensor(array).reshape(len(array), -1)[None] for array in given]
    return Batch(*(x if place in (0, 1, 3, 6) else x[..., 0] for place, x in enumerate(arrays)))


def _logged(log, facts):
    for name, value in facts.items():
        log.setdefault(name, []).append(float(value))


def td3bc(
    nets, batches, noises, two_sampler, reweight_eval, reweight_improve, reweight_constraint, clip_constraint, alpha,
    max_action,
):  # fmt: skip
    flags = {"eval": reweight_eval, "improve": reweight_improve, "constraint": reweight_constraint}
    options = {f"reweight_{name}": bool(flag) for name, flag in flags.items()}
    options |= {"alpha": float(alpha), "max_action": float(max_action), "clip_constraint": clip_constraint}
    widths = batches[0]["state"].shape[1], noises[0].shape[1]
    algorithm = TD3BC(*widths, [0], TD3BCConfig(hidden=_hidden(nets["actor"]), **options))
    algorithm.load(0, nets)
    keys = ("state", "action", "reward", "next_state", "not_done", "weight")
    rows, log = iter([_rows(batch, *keys) for batch in batches]), {}
    for noise in noises:
        batch = next(rows)
        policy = next(rows) if two_sampler and algorithm.wants_policy_batch() else None
        facts = algorithm.update(batch, policy, [torch.as_tensor(noise)[None]])
        if algorithm.updates % 2:
            del facts["critic_loss"]  # the reference keeps it at even calls alone
        _logged(log, facts)
    return {"nets": algorithm.export(0), "log": log}


def _sarsa_rows(batch):
    return _rows({**batch, "going": 1 - batch["d"].reshape(-1)}, "s", "a", "r", "sp", "going", None, "ap")


def bc(pi, batches, dist, probe, probe_a):
    algorithm = BC(probe.shape[1], probe_a.shape[1], [0], BCConfig(policy=DISTRIBUTIONS[dist], hidden=_hidden(pi)))
    algorithm.load(0, {"pi": pi})
    losses = [algorithm.update(_sarsa_rows(batch), None, ())["loss"] for batch in batches]
    states, actions = torch.as_tensor(probe)[None], torch.as_tensor(probe_a)[None]
    probes = {"probe_mean": algorithm.act(states)[0], "probe_logprob": algorithm.log_prob(states, actions)[0]}
    return {"nets": algorithm.export(0), "log": {"loss": torch.cat(losses)}, **probes}


def _onestep(batch, **options):
    return OneStep(batch["s"].shape[1], batch["a"].shape[1], [0], OneStepConfig(**options))


def sarsa(nets, batches, double):
    hidden = _hidden(nets["q"], "net1" if double else "")
    algorithm = _onestep(batches[0], behaviour_updates=0, hidden=hidden, double=bool(double), compat=True)
    algorithm.load(0, {**algorithm.export(0), **nets})
    losses = [algorithm.update(_sarsa_rows(batch), None, ())["q_loss"] for batch in batches]
    return {"nets": {name: algorithm.export(0)[name] for name in nets}, "log": {"loss": torch.cat(losses)}}


def onestep(nets, batches, samples, temp, dist):
    options = {"hidden": _hidden(nets["pi"]), "temperature": float(temp), "policy": DISTRIBUTIONS[dist]}
    algorithm = _onestep(batches[0], **options)
    algorithm.load(0, {**nets, "q_target": nets["q"]})
    given = zip(batches, samples, strict=True)
    losses = [algorithm.update_policy(_sarsa_rows(b), torch.as_tensor(x)[None])["policy_loss"] for b, x in given]
    return {"nets": algorithm.export(0), "log": {"loss": torch.cat(losses)}}


def iql(state, batches, uniform, expectile, temperature, reweight_eval, reweight_improve, actor_schedule_steps, probe):
    keys = ("observations", "actions", "rewards", "next_observations", "masks", "weights")
    rows, others = ([_rows(batch, *keys) for batch in given] for given in (batches, uniform or batches))
    config = IQLConfig(
        expectile=float(expectile), temperature=float(temperature), schedule_steps=actor_schedule_steps,
        reweight_eval=bool(reweight_eval), reweight_improve=bool(reweight_improve),
        reweight_constraint=bool(reweight_improve), hidden=_hidden(state, "value."),
    )  # fmt: skip
    algorithm = IQL(rows[0].observations.shape[-1], rows[0].actions.shape[-1], [0], config)
    nets = {
        net: {k[len(net) + 1 :]: x for k, x in state.items() if k.startswith(f"{net}.")} for net in algorithm.export(0)
    }
    algorithm.load(0, nets)
    log: dict[str, Any] = {}
    for policy, batch in zip(rows, others, strict=True):
        goals = algorithm.target_values(policy.observations, policy.actions)
        algorithm.prepare()
        facts = algorithm.update(batch, None if uniform is None else policy, ())
        facts["adv"] = goals - algorithm.values(policy.observations)  # of every row, with the V that the actor saw
        for name, value in facts.items():
            log.setdefault(name, []).append(value[0].numpy())
    found = {f"{net}.{key}": x for net, part in algorithm.export(0).items() for key, x in part.items()}
    return {"state": found, "log": log, "probe_mean_action": algorithm.act(torch.as_tensor(probe)[None])[0]}
