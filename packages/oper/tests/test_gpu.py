"""The same on a CUDA device."""

from __future__ import annotations

import numpy as np
import pytest
from data import walk

from leap_oper import AliasSampler, BehaviourCloning, PrioritizedReplay, Run, oper_a, oper_r

pytestmark = pytest.mark.gpu


def test_alias_tables_are_exact_on_the_device() -> None:
    probs = np.random.default_rng(0).dirichlet(np.ones(10_000))
    sampler = AliasSampler(probs, "cuda")
    assert sampler.draw((256,)).device.type == "cuda"
    np.testing.assert_allclose(sampler.mass().cpu(), probs, atol=1e-12)


def test_batches_and_trainers_stay_on_the_device() -> None:
    data = walk(30)
    batch = PrioritizedReplay(data, oper_r(data), device="cuda").sample()
    assert {value.device.type for value in batch.values()} == {"cuda"}
    weights = oper_a(data, iters=2, steps=5, seeds=(1, 2), device="cuda").at(iteration=2).ensemble()
    trainer = BehaviourCloning([Run(data, 0), Run(data, 1, weights)], device="cuda")
    assert trainer.train(20, every=10)[-1]["loss"][0] < 1.0
    assert trainer.policy(1)(data.observations).shape == (300, 1)
