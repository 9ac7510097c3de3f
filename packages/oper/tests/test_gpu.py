"""The same on a CUDA device: tables, batches, and training as replays of a captured graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from data import walk

from leap_oper import AliasSampler, PrioritizedReplay, Trainer, oper_a, oper_r

pytestmark = pytest.mark.gpu

SMALL: dict[str, Any] = {"seeds": (0, 1), "batch_size": 16, "hidden": (32, 32), "device": "cuda", "every": 40}


def test_alias_tables_are_exact_on_the_device() -> None:
    probs = np.random.default_rng(0).dirichlet(np.ones(10_000))
    sampler = AliasSampler(probs, "cuda")
    assert sampler.draw((256,)).device.type == "cuda"
    np.testing.assert_allclose(sampler.mass().cpu(), probs, atol=1e-12)


def test_a_captured_draw_goes_on_with_every_replay_and_follows_new_weights() -> None:
    sampler = AliasSampler(np.ones(1000), "cuda")
    sampler.draw((256,))
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(sampler.generator)
    with torch.cuda.graph(graph):
        drawn = sampler.draw((256,))
    graph.replay()
    first = drawn.clone()
    graph.replay()
    assert not torch.equal(first, drawn)
    sampler.set_probs(np.arange(1000) == 7)
    graph.replay()
    assert (drawn == 7).all()


def test_batches_and_value_fitting_stay_on_the_device() -> None:
    data = walk(30)
    batch = PrioritizedReplay(data, oper_r(data), device="cuda").sample()
    assert {value.device.type for value in batch.values()} == {"cuda"}
    weights = oper_a(data, iters=2, steps=5, seeds=(1, 2), device="cuda").at(iteration=2)
    assert np.isfinite(weights.weights).all()


@pytest.mark.parametrize("name", ["bc", "td3bc", "onestep", "cql", "iql"])
def test_replays_of_a_graph_train_as_single_updates_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over batches may be taken in another order: float32 after 80 updates."""
    data = walk(30)
    more = {"cql": {"critic_hidden": (32, 32), "samples": 2}, "onestep": {"samples": 2}}.get(name, {})
    trained = []
    for least in (8, 1 << 30):
        monkeypatch.setattr("leap_shared.offline.training.LEAST_REPLAYS", least)
        trainer = Trainer(name, data, priorities=oper_r(data), decouple=True, steps=80, **SMALL, **more)
        history = trainer.train()
        assert [record["update"] for record in history] == [40, 80]
        trained.append(trainer.algorithm.export(1))
    for net, state in trained[0].items():
        for key, value in state.items():
            torch.testing.assert_close(value, trained[1][net][key], atol=1e-4, rtol=1e-3)
