"""The functions that the golden cases of OPER call, on the public interface of leap_oper and leap_shared.offline."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from leap_oper import Priorities, ReferenceSampler, ValueFit
from leap_oper import oper_r as oper_r_of
from leap_oper.advantages import learning_rate
from leap_oper.priorities import advantage_weights
from leap_shared import offline
from leap_shared.offline import Transitions


def convert(observations, actions, rewards, terminals, timeouts, max_episode_steps, terminate_on_end):
    return offline.convert(
        observations, actions, rewards, terminals, timeouts,
        max_episode_steps=max_episode_steps, terminate_on_end=terminate_on_end,
    )  # fmt: skip


def boundaries(observations, next_observations, terminals):
    return offline.episode_ends(observations, next_observations, terminals.astype(bool))


def episode_returns(rewards, end):
    return offline.episode_returns(rewards, end.astype(bool))


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


def _fit(data, nets, **options):
    fit = ValueFit([Transitions.from_arrays(**data)], [0], **options)
    for network, key in ((fit.value, "value"), (fit.target, "value_target")):
        first = {name: nets[key][name] for name in nets[key] if name[:2] in ("l1", "l2", "l3")}
        second = {f"l{int(name[1]) - 3}{name[2:]}": x for name, x in nets[key].items() if name not in first}
        network.load_states([first, second])
    return fit


def _state(network):
    first, second = network.states()
    return first | {f"l{int(name[1]) + 3}{name[2:]}": x for name, x in second.items()}


def oper_a_fit(
    data, nets, indices, n_step, critic_type, td_type, adv_type, schedule, schedule_steps, antmaze, normalize
):
    if (critic_type, td_type, adv_type) != ("doublev", "nstep", "nstep"):
        raise NotImplementedError(f"{critic_type}, {td_type}, {adv_type}")
    fit = _fit(data, nets, n_steps=n_step, normalise=bool(normalize), reward_shift=-1.0 if antmaze else 0.0)
    log: dict[str, list[Any]] = {"value_loss": [], "value_lr": [], "v1": [], "v2": []}
    before = fit.advantages()._asdict()
    for done, rows in enumerate(torch.as_tensor(indices)):
        loss, values = fit.update(rows[None], learning_rate(schedule, done, schedule_steps))
        rate = learning_rate(schedule, done + 1, schedule_steps)
        for name, value in zip(log, (loss.item(), rate, *values[0].tolist()), strict=True):
            log[name].append(value)
    nets = {"value": _state(fit.value), "value_target": _state(fit.target)}
    return {"before": before, "after": fit.advantages()._asdict(), "nets": nets, "log": log}


def oper_a_weights(advantages, scale, std, eps):
    weights = [np.ones(advantages[0].size)]
    for advantage in advantages:
        weights.append(advantage_weights(weights[-1], advantage.reshape(-1), std if scale else None, eps))
    return weights[1:]


def oper_a_run(data, value, first_steps, steps, iterations, batch, n_step, scale, seed, indices, std, eps):
    fit = _fit(data, {"value": value, "value_target": value}, n_steps=n_step)
    rows, advantages = iter(torch.as_tensor(indices)), []
    for k in range(iterations):
        total = steps if k else first_steps
        fit.new_optimizer()
        for done in range(total):
            fit.update(next(rows)[None], learning_rate("cosine", done, total))
        advantages.append(fit.advantages().adv.numpy())
    return {"weights": oper_a_weights(advantages, scale, std, eps)}


def ensemble(weights, how):
    return Priorities(np.stack([w.reshape(-1) for w in weights])).ensemble(how).weights


def stage2(weights, weight_func, std, eps, eps_max, branch, exp_lambd):
    rescaled = Priorities(weights).rescale(
        std, eps, eps_max, weight_func=weight_func, exp_lambd=exp_lambd, branch=branch
    )
    return rescaled.probs


def sampler_stream(p, batch, n_prefetch, seed, count):
    return ReferenceSampler(p, batch, seed, n_prefetch).draw((count, batch))


def uniform_stream(rows, batch, seed, count):
    sampler = ReferenceSampler(np.ones(rows), batch, seed)
    return np.stack([sampler.draw_uniform((batch,)) for _ in range(count)])
