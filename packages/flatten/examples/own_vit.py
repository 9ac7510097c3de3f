"""FocusedLinearAttention in a transformer of one's own, and in one of timm's, on the digits of scikit-learn.

python examples/own_vit.py

TODO
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models import VisionTransformer
from torch import Tensor, nn

import leap_flatten as lf

DIM, HEADS, DEPTH, SIDE = 32, 4, 2, 8


class SelfAttention(nn.Module):
    """What a transformer has before: softmax attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


class Block(nn.Module):
    """Pre-norm block; `attention` maps tokens (batch, tokens, channels) to tokens."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = attention, nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class OwnViT(nn.Module):
    """A token per pixel, and the mean of all tokens for the head."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(1, DIM), nn.Parameter(0.02 * torch.randn(1, SIDE * SIDE, DIM))
        self.blocks = nn.Sequential(*(Block(attention()) for _ in range(DEPTH)))
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, 1, 8, 8) to logits."""
        x = self.embed(images.flatten(2).transpose(1, 2)) + self.position
        out: Tensor = self.head(self.blocks(x).mean(1))
        return out


def focused(prefix_tokens: int = 0) -> nn.Module:
    """Linear attention over the map of tokens; `prefix_tokens` come before it, as a class token does."""
    return lf.FocusedLinearAttention(DIM, HEADS, input_size=(SIDE, SIDE), prefix_tokens=prefix_tokens)


def timm_vit() -> nn.Module:
    """timm's transformer with a class token, of the same size."""
    sizes = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
    model: nn.Module = VisionTransformer(img_size=SIDE, patch_size=1, in_chans=1, num_classes=10, **sizes)
    return model


def timm_vit_focused() -> nn.Module:
    """The same with its attention replaced."""
    model = timm_vit()
    for block in model.blocks:
        block.attn = focused(model.num_prefix_tokens)
    return model


MODELS = {
    "own, softmax": lambda: OwnViT(SelfAttention),
    "own, focused linear": lambda: OwnViT(focused),
    "timm, softmax": timm_vit,
    "timm, focused linear": timm_vit_focused,
}


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train all four alike and compare; returns the loss of every step of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)

    pixels, digits = load_digits(return_X_y=True)
    images = (torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, SIDE, SIDE) / 8 - 1).to(options.device)
    labels, losses = torch.tensor(digits).to(options.device), {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model, losses[name] = build().to(options.device), list[float]()
        optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=19 * options.epochs)
        for _ in range(options.epochs):
            for rows in torch.randperm(1200).split(64):
                loss = F.cross_entropy(model(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses[name].append(loss.item())
        model.eval()
        with torch.no_grad():
            right = (model(images[1200:]).argmax(1) == labels[1200:]).double().mean()
        print(f"{name:22s} loss {sum(losses[name][-19:]) / 19:.3f}  {100 * right:.1f}% of 597 test digits")
    return losses


if __name__ == "__main__":
    main()
