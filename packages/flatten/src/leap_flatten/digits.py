"""A tiny vision transformer on scikit-learn's digits, whose attention is the only thing that its arms do not share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from leap_flatten.attention import FocusedLinearAttention
from leap_flatten.functional import check_focus
from leap_flatten.visualize import equivalent_attention
from leap_shared.errors import UserError
from leap_shared.vision.bodies import Block, Site
from leap_shared.vision.bodies.grids import Number, Size, Tokens

__all__ = ["ARMS", "Arm", "Digits", "DigitsViT", "Recipe", "SoftmaxAttention", "accuracy", "load", "spectra", "train"]

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
    """The 1797 real images of 8x8 pixels that come with scikit-learn; `seed` draws 1200 of them to train on."""
    from sklearn.datasets import load_digits

    images, numbers = load_digits(return_X_y=True)
    pixels = (torch.tensor(images, dtype=torch.float32)[..., None] - PIXEL_MEAN) / PIXEL_STD
    labels = torch.tensor(numbers, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return Digits(*(Part(pixels[rows], labels[rows]) for rows in (order[:TRAIN_ROWS], order[TRAIN_ROWS:])))


class Arm(NamedTuple):
    """One kind of attention: softmax, or linear with the focus and the convolution or without."""

    title: str
    linear: bool = True
    focused: bool = False
    convolved: bool = False


ARMS = {
    "softmax": Arm("softmax", linear=False),
    "linear": Arm("ReLU-linear"),
    "focus": Arm("focus", focused=True),
    "focus-dwc": Arm("focus + DWC", focused=True, convolved=True),
    "dwc": Arm("ReLU-linear + DWC", convolved=True),
}


@dataclass(frozen=True)
class Recipe:
    """Sizes and training of the transformer; the same for all arms and seeds."""

    epochs: int = 20
    batch_size: int = 64
    learning_rate: Number = 6e-3
    """Peak of the one-cycle schedule."""
    weight_decay: Number = 0.05
    dim: int = 32
    num_heads: int = 4
    depth: int = 2
    focusing_factor: Number = 3
    kernel_size: int = 5

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
        check_focus(self.focusing_factor, self.kernel_size, "mean")


class SoftmaxAttention(nn.Module):
    """Multi-head softmax self-attention, in the layout of `FocusedLinearAttention`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (batch, heads, tokens, dim / heads) each."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def forward(self, x: Tokens, hw: Size | None = None) -> Tokens:  # noqa: ARG002 - as other attention is called
        """Tokens to tokens of the same shape."""
        out: Tensor = self.proj(F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2))
        return out

    def matrices(self, x: Tokens) -> Float[Tensor, "batch heads tokens tokens"]:
        """What the values of each head are multiplied by."""
        query, key, _ = self.heads(x)
        return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1)


def _attention(arm: Arm, recipe: Recipe) -> nn.Module:
    """Linear arms are one layer with one initialisation: p = 1 is no focus, kernels kept at zero no convolution."""
    if not arm.linear:
        return SoftmaxAttention(recipe.dim, recipe.num_heads)
    power = recipe.focusing_factor if arm.focused else 1
    sizes = (recipe.dim, recipe.num_heads, (SIDE, SIDE))
    layer = FocusedLinearAttention(*sizes, focusing_factor=power, kernel_size=recipe.kernel_size)
    if not arm.convolved:
        for parameter in layer.dwc.parameters():
            nn.init.zeros_(parameter.requires_grad_(False))
    return layer


class DigitsViT(nn.Module):
    """Pre-norm vision transformer with a token per pixel, a table of positions, and the mean of tokens at its end.

    Positions start at N(0, 1), as large as the pixels: with the usual 0.02 softmax hardly trains in 20 epochs.

    Args:
        arm: key of `ARMS`.
        recipe: its sizes.
        seed: of the weights, which are equal in all linear arms but for what an arm lacks.
    """

    def __init__(self, arm: str, recipe: Recipe, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(1, recipe.dim)
            self.pos_embed = nn.Parameter(torch.randn(1, SIDE * SIDE, recipe.dim))
            sites = [Site(0, index, recipe.dim, recipe.num_heads, (SIDE, SIDE)) for index in range(recipe.depth)]
            self.blocks = nn.ModuleList(Block(site, _attention(ARMS[arm], recipe)) for site in sites)
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


@torch.no_grad()
def spectra(model: DigitsViT, pixels: Float[Tensor, "images tokens 1"]) -> Float[Tensor, "maps tokens"]:
    """Singular values of M_eq, relative to the largest, for every block, image and head (channel 0)."""
    inputs: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
        inputs.append((module, given[0]))

    handles = [cast("Block", block).attn.register_forward_pre_hook(keep) for block in model.blocks]
    model(pixels.to(model.pos_embed.device))
    for handle in handles:
        handle.remove()
    matrices = [matrix for layer, x in inputs for matrix in _matrices(layer, x)]
    values: Tensor = torch.linalg.svdvals(torch.stack(matrices).cpu())
    return values / values[:, :1]


def _matrices(layer: nn.Module, x: Tokens) -> list[Tensor]:
    if isinstance(layer, SoftmaxAttention):
        return list(layer.matrices(x).flatten(0, 1))
    heads = range(cast("FocusedLinearAttention", layer).num_heads)
    return [equivalent_attention(layer, image, head).matrix for image in torch.split(x, 1) for head in heads]
