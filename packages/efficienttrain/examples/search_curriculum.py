"""Search the curriculum of a small convolutional network on the digits of scikit-learn, 8 x 8 pixels.

    python examples/search_curriculum.py --method sequential --workers 2

takes about a minute of one CPU thread, less with a worker on each of several cores, and ends with

    sizes 6, 8, 8, 8, found in 48 trials of 57.6 epochs at 8 pixels

`train` is all that a search needs to know of a model and its data. Killed, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import leap_efficienttrain as et

TRAINING, BATCH = 1200, 60


def make_model() -> nn.Sequential:
    """A network for pictures of any size: the pooling at its end is over whatever is left."""
    layers: list[nn.Module] = []
    for channels, width in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def shifted(images: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    """The batch moved by up to a pixel, and by two at the largest magnitudes; zeros come in."""
    most = round(magnitude / 5)
    down, right = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    return F.pad(images, (most, most, most, most))[..., down : down + 8, right : right + 8]


def train(curriculum: et.Curriculum, from_checkpoint: str | None, seed: int, folder: Path) -> tuple[float, str]:
    """Train as the curriculum says, from a checkpoint or from the beginning; accuracy, and a checkpoint of the end."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    if from_checkpoint is not None:
        parts = torch.load(from_checkpoint, weights_only=True)
        model.load_state_dict(parts["model"])
        optimizer.load_state_dict(parts["optimizer"])
    generator = torch.Generator().manual_seed(seed)
    for state in curriculum.epochs(TRAINING):
        order = torch.randperm(TRAINING, generator=generator)
        for step in range(state.steps or 0):
            optimizer.param_groups[0]["lr"] = state.lr(step)
            chosen = order[step * BATCH : (step + 1) * BATCH]
            batch = et.low_frequency_crop(shifted(images[chosen], state.magnitude, generator), state.size)
            loss = F.cross_entropy(model(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[TRAINING:]).argmax(1) == labels[TRAINING:]).float().mean().item()
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".pt", delete=False) as file:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return accuracy, file.name


def main(arguments: Sequence[str] | None = None) -> et.Curriculum:
    """Search, and print the trials and what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("greedy", "sequential"), default="sequential")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=8, help="budget, in epochs at full size")
    parser.add_argument("--repeats", type=int, default=2, help="seeds for each trial")
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("search"), help="folder for the log and the checkpoints")
    given = parser.parse_args(arguments)
    (given.out / "checkpoints").mkdir(parents=True, exist_ok=True)
    search = et.Search(
        budget=given.epochs,
        sizes=given.sizes,
        stages=given.stages,
        method=given.method,
        repeats=given.repeats,
        tolerance=given.tolerance,
        changes={"batch": BATCH, "lr": et.LearningRate(base=4e-3), "downsample": "fourier"},
    )
    train_here = functools.partial(train, folder=given.out / "checkpoints")
    result = search.run(train_here, workers=given.workers, log=given.out / "trials.jsonl")
    result.curriculum.to_yaml(given.out / "curriculum.yaml")
    print(result)
    return result.curriculum


if __name__ == "__main__":
    main()
