"""Small experiments on real images: scikit-learn's digits, and a tiny transformer that takes any attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from leap_shared.cli import Command
from leap_shared.errors import UserError
from leap_shared.vision.bodies import AttentionFactory, Block, Site
from leap_shared.vision.bodies.grids import Number

__all__ = ["CLASSES", "SIDE", "Digits", "DigitsExperiment", "DigitsViT", "Part", "Recipe", "accuracy", "load", "train"]

SIDE, CLASSES, TRAIN_ROWS = 8, 10, 1200
PIXEL_MEAN, PIXEL_STD = 4.88, 6.02  # of the images, whose pixels are 0 to 16


class Part(NamedTuple):
    """Images as tokens, one per pixel, and what they show."""

    pixels: Float[Tensor, "images tokens 1"]
    labels: Int64[Tensor, " images"]

    def to(self, device: torch.device) -> Part:
        """The same on another device."""
        return Part(self.pixels.to(device), self.labels.to(device))


class Digits(NamedTuple):
    """Images to train on, and others to test."""

    train: Part
    test: Part


def load(seed: int) -> Digits:
    """The 1797 real images of 8x8 pixels that come with scikit-learn; `seed` draws 1200 of them to train on.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn: pip install scikit-learn") from error
    images, numbers = load_digits(return_X_y=True)
    pixels = (torch.tensor(images, dtype=torch.float32)[..., None] - PIXEL_MEAN) / PIXEL_STD
    labels = torch.tensor(numbers, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return Digits(*(Part(pixels[rows], labels[rows]) for rows in (order[:TRAIN_ROWS], order[TRAIN_ROWS:])))


@dataclass(frozen=True)
class Recipe:
    """Sizes and training of the transformer; the same for all arms and seeds.

    Raises:
        UserError: a number is impossible.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: Number = 6e-3
    """Peak of the one-cycle schedule."""
    weight_decay: Number = 0.05
    dim: int = 32
    num_heads: int = 4
    depth: int = 2

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "dim", "num_heads", "depth"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.dim % self.num_heads:
            given = f"{self.dim} channels and {self.num_heads} heads"
            raise UserError(f"{given}: the channels must be a multiple of the heads")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            given = f"learning_rate {self.learning_rate} and weight_decay {self.weight_decay}"
            raise UserError(f"{given}: give a rate above 0 and a decay of 0 or more")


class DigitsViT(nn.Module):
    """Pre-norm vision transformer with a token per pixel, a table of positions, and the mean of tokens at its end.

    Positions start at N(0, 1), as large as the pixels: with the usual 0.02 softmax hardly trains in 20 epochs.

    Args:
        attention: makes the attention of each block, whose initialisation it keeps.
        recipe: its sizes.
        seed: of the weights; drawn in order, so that attentions which draw alike leave all others equal.
    """

    def __init__(self, attention: AttentionFactory, recipe: Recipe, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(1, recipe.dim)
            self.pos_embed = nn.Parameter(torch.randn(1, SIDE * SIDE, recipe.dim))
            sites = [Site(0, index, recipe.dim, recipe.num_heads, (SIDE, SIDE)) for index in range(recipe.depth)]
            self.blocks = nn.ModuleList(Block(site, attention(site)) for site in sites)
            self.norm = nn.LayerNorm(recipe.dim)
            self.head = nn.Linear(recipe.dim, CLASSES)

    def forward(self, pixels: Float[Tensor, "images tokens 1"]) -> Float[Tensor, "images classes"]:
        """Pixels to logits."""
        x = self.embed(pixels) + self.pos_embed
        for block in self.blocks:
            x = block(x, (SIDE, SIDE))
        out: Tensor = self.head(self.norm(x).mean(1))
        return out


def train(model: DigitsViT, part: Part, recipe: Recipe, seed: int) -> float:
    """Train in place by AdamW with a one-cycle rate; returns the mean loss of the last epoch.

    Args:
        model: on its device.
        part: to train on.
        recipe: how.
        seed: of the order of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    part = part.to(model.pos_embed.device)
    count = len(part.labels)
    steps = -(-count // recipe.batch_size) * recipe.epochs
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps)
    total = torch.zeros((), device=part.labels.device)
    for _ in range(recipe.epochs):
        total.zero_()
        for rows in torch.split(torch.randperm(count, generator=generator), recipe.batch_size):
            loss = F.cross_entropy(model(part.pixels[rows]), part.labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(rows)
    return float(total) / count


@torch.no_grad()
def accuracy(model: DigitsViT, part: Part) -> float:
    """Share of the images that the model classifies rightly, in percent."""
    part = part.to(model.pos_embed.device)
    return 100 * float((model(part.pixels).argmax(1) == part.labels).double().mean())


@dataclass(frozen=True, kw_only=True)
class DigitsExperiment(Command):
    """Base of a verb that runs an experiment on digits with other numbers than the demo's."""

    seeds: int
    """How many seeds, each with its own split, weights and batches; the first is --seed."""
    epochs: int = 20
    """Passes over the 1200 images."""
    batch_size: int = 64
    """Images of an update."""
    learning_rate: float = 6e-3
    """Peak of the one-cycle schedule."""
    weight_decay: float = 0.05
    """Of AdamW."""
    dim: int = 32
    """Channels."""
    heads: int = 4
    """Heads."""
    depth: int = 2
    """Blocks."""
    threads: int = 1
    """Threads of PyTorch while training; other numbers round differently, which changes a run as another seed does."""

    def numbers(self) -> tuple[tuple[int, ...], dict[str, Any]]:
        """The seeds, and what a `Recipe` takes; sets the number of threads.

        Raises:
            UserError: the number of threads is not positive.
        """
        if self.threads < 1:
            raise UserError(f"threads is {self.threads}: give 1 or more")
        torch.set_num_threads(self.threads)
        names = ("epochs", "batch_size", "learning_rate", "weight_decay", "dim", "depth")
        recipe = {name: getattr(self, name) for name in names} | {"num_heads": self.heads}
        return tuple(range(self.seed, self.seed + self.seeds)), recipe
