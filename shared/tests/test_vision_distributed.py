"""Two CPU processes over gloo, started once with torchrun: this file is also what they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_vision_training import RICH, SGD, rich, settings, small, trained, weights, write_pictures
from torch import nn

from leap_shared import checkpoints
from leap_shared.errors import UserError
from leap_shared.vision import DataConfig, Trainer, build_transform, evaluate, evaluation_loader, open_source

pytestmark = pytest.mark.slow
WORLD = 2


def ragged(folder: Path) -> DataConfig:
    return DataConfig("unused", write_pictures(folder, 11, "ragged.npz"), image_size=12)


def work(folder: Path) -> None:
    """What each process does; the first one writes down what came out."""
    torch.set_num_threads(1)
    results: dict[str, object] = {}
    for accumulation in (1, 2):
        config = settings(folder / "pictures", batch_size=4 // accumulation, accumulation=accumulation)
        config = replace(config, optimiser=replace(SGD, ema_decay=0.5))
        trainer = trained(config, folder / f"accumulation-{accumulation}")
    rank, data = trainer.rank, ragged(folder / f"ragged-{trainer.rank}")
    source = open_source(data.validation)
    for batch_size in (4, 11):
        loader = evaluation_loader(source, build_transform(data), batch_size=batch_size, share=(rank, WORLD))
        results[f"scores {batch_size}"] = evaluate(small(), loader)
    config = rich(folder / "rich", batch_size=2)
    whole = trained(config, folder / "whole", model=small(dropout=0.3, norm=True))
    calls = iter(range(1, 1000))

    def stop(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if next(calls) == 17:
            raise KeyboardInterrupt
        return whole.learner.loss_fn(model, images, targets)

    stopped = Trainer(config, folder / "stopped", device="cpu", model=small(dropout=0.3, norm=True), loss_fn=stop)
    try:
        stopped.train()
    except KeyboardInterrupt:
        results["stopped at"] = stopped.update
    resumed = trained(config, folder / "stopped", model=small(dropout=0.3, norm=True))
    same = [torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items()]
    results["same bits"] = all(same)
    results["learned"] = not torch.equal(whole.model.head[2].weight, small().head[2].weight)
    calls = iter(range(1, 1000))

    def diverge(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        bad = rank == 1 and next(calls) == 3
        return model(images).sum() * (float("nan") if bad else 1e-3)

    try:
        trained(settings(folder / "pictures", batch_size=4), folder / "diverged", loss_fn=diverge)
    except UserError as error:
        results["diverged"] = str(error)
    (folder / f"results-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    settings(folder / "pictures")
    rich(folder / "rich")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, __file__, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(params=range(WORLD))
def results(folder, request):
    return json.loads((folder / f"results-{request.param}.json").read_text())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["weights", "ema"])
def test_two_processes_train_to_the_weights_of_one(name, accumulation, folder, tmp_path):
    """Only the order of float32 additions differs: a few parts in 1e6 after twelve updates of SGD."""
    config = settings(tmp_path, optimiser=replace(SGD, ema_decay=0.5))
    one = trained(config, tmp_path / "out").learner.models[name].state_dict()
    two = checkpoints.read(folder / f"accumulation-{accumulation}" / f"{name}.safetensors")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [4, 11])
def test_scores_of_two_processes_count_every_picture_once(batch_size, results, tmp_path):
    data = ragged(tmp_path)
    expected = evaluate(small(), evaluation_loader(open_source(data.validation), build_transform(data), batch_size=5))
    assert results[f"scores {batch_size}"] == pytest.approx(expected, rel=1e-6)
    assert expected["images"] == 11


def test_two_processes_stopped_in_an_epoch_go_on_to_the_same_bits(results):
    assert RICH["save_updates"] == 2
    assert (results["stopped at"], results["same bits"], results["learned"]) == (8, True, True)


def test_a_loss_that_is_not_finite_on_one_process_stops_all_of_them(results):
    assert "nan at step 3" in results["diverged"]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
