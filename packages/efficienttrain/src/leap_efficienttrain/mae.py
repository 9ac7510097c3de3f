"""Masked autoencoders (He et al. 2022) as a self-supervised training under a curriculum.

EfficientTrain and EfficientTrain++ report such trainings, but their code was never released: this one follows the
published method, with pixels as targets, or histograms of oriented gradients as in MaskFeat (Wei et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, to_2tuple
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from leap_efficienttrain.hog import BINS, CELL, draw_histograms, oriented_gradients
from leap_efficienttrain.models import create_model
from leap_shared.errors import UserError
from leap_shared.files import atomic_writer
from leap_shared.vision.bodies.grids import Number, Size, replace_data

__all__ = ["Masked", "MaskedAutoencoder", "masked_loss", "save_reconstruction", "sincos_positions"]

VARIANCE_FLOOR = 1e-6


class Masked(NamedTuple):
    """What one forward pass of a masked autoencoder gives.

    Attributes:
        loss: mean squared error over the hidden patches, a scalar in float32.
        prediction: (batch, patches, values) of all patches, row-major: channel, row and column of each pixel, or
            channel, row and column of each cell and its bin.
        mask: (batch, patches), True where a patch was hidden.
    """

    loss: Tensor
    prediction: Tensor
    mask: Tensor


def sincos_positions(dim: int, grid: Size, base: Size | None = None) -> Float[Tensor, "tokens dim"]:
    """Fixed positions of a row-major grid: sine and cosine of the column in the first half of the channels, then row.

    Frequencies fall from 1 to 1/10000. On a grid other than `base` both span the same picture: the centre of place i
    of n lies at (i + 1/2) base / n - 1/2, which is what resampling the table of `base` tends to.

    Raises:
        UserError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise UserError(
            f"{dim} channels do not divide into sines and cosines of rows and columns: take a multiple of 4"
        )
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    phases = []
    for side, whole in zip(grid, base or grid, strict=True):
        place = (torch.arange(side, dtype=torch.float64) + 0.5) * (whole / side) - 0.5
        phases.append(place[:, None] * frequency)
    rows, columns = phases[0][:, None].expand(*grid, -1), phases[1].expand(*grid, -1)
    waves = [wave for phase in (columns, rows) for wave in (phase.sin(), phase.cos())]
    return torch.cat(waves, 2).flatten(0, 1).float()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Decoder(nn.Module):
    """Light transformer that gets the seen tokens and a learnt token in place of each hidden one."""

    def __init__(self, in_dim: int, dim: int, depth: int, num_heads: int, values: int) -> None:
        super().__init__()
        if min(dim, depth, num_heads) < 1 or dim % num_heads:
            given = f"decoder_dim {dim}, decoder_depth {depth}, decoder_heads {num_heads}"
            raise UserError(f"{given}: expected positive numbers, and heads that divide the channels")
        norm = {"qkv_bias": True, "norm_layer": _Norm}
        self.embed, self.mask_token = nn.Linear(in_dim, dim), nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, num_heads, **norm) for _ in range(depth)))
        self.norm, self.head = _Norm(dim), nn.Linear(dim, values)
        self.apply(_initialise)
        nn.init.normal_(self.mask_token, std=0.02)


class _Norm(nn.LayerNorm):
    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, eps=1e-6, **options)


class MaskedAutoencoder(nn.Module):
    """A vision transformer that learns by predicting hidden patches of its input from the others.

    The encoder sees none but the visible patches; pixels are gathered before they are embedded. Pictures of every size
    go in that is a multiple of the patch; positions are those of `sincos_positions` on the size that the encoder was
    made for. `set_input_size`, which `leap_efficienttrain.flexible` calls, says which size the encoder's own table is
    kept for.

    Args:
        encoder: of timm, whose head is removed and whose position table becomes fixed; or its name, for new weights.
        img_size: side of the pictures in pixels, where `encoder` is a name.
        decoder_dim, decoder_depth, decoder_heads: channels, blocks and heads of the decoder.
        mask_ratio: share of the patches that is hidden, to the nearest whole number of them.
        target: "pixels", or "hog" for 9 directions in cells of 8 x 8 pixels in each channel.
        normalise_target: pixels by mean and deviation of their patch, histograms by their length.

    Attributes:
        img_size: (height, width) that `set_input_size` set last.
        in_chans: channels of the pictures.

    Raises:
        UserError: `encoder` is no plain vision transformer, or a number does not fit.
    """

    def __init__(
        self,
        encoder: VisionTransformer | str,
        *,
        img_size: int = 224,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: Number = 0.75,
        target: str = "pixels",
        normalise_target: bool = True,
    ) -> None:
        super().__init__()
        self.encoder: Any = _encoder(encoder, img_size)
        embed = self.encoder.patch_embed
        self.patch, self.in_chans, self.prefix = embed.patch_size[0], embed.proj.in_channels, self._prefix()
        self.mask_ratio, self.target, self.normalise_target = mask_ratio, target, normalise_target
        if target not in ("pixels", "hog"):
            raise UserError(f"target {target!r}: expected pixels or hog")
        if not 0 < mask_ratio < 1:
            raise UserError(f"mask_ratio {mask_ratio}: expected a share between 0 and 1, such as 0.75")
        if target == "hog" and self.patch % CELL:
            raise UserError(f"patches of {self.patch} pixels do not divide into cells of {CELL}: take target='pixels'")
        area = self.patch**2 if target == "pixels" else (self.patch // CELL) ** 2 * BINS
        self.decoder = Decoder(self.encoder.embed_dim, decoder_dim, decoder_depth, decoder_heads, area * self.in_chans)
        self.base_grid: Size = embed.grid_size
        self.img_size: Size = embed.img_size
        self.encoder.pos_embed.requires_grad_(False)
        self.decoder_positions: Tensor
        self.register_buffer("decoder_positions", torch.empty(0), persistent=False)
        self.set_input_size(self.img_size)

    def forward(
        self, images: Float[Tensor, "batch channels height width"], generator: torch.Generator | None = None
    ) -> Masked:
        """Hide patches, and predict them.

        Args:
            images: normalised, of any size that is a multiple of the patch.
            generator: draws the hidden patches, those of the global one unless given.

        Raises:
            UserError: channels or size do not fit.
        """
        grid = self._grid_of(images)
        patches = self._patches(images)
        seen, mask = self._draw(patches, generator)
        encoder_positions, decoder_positions = self._positions(grid, images.device)
        tokens = self._encode(torch.take_along_dim(patches, seen[..., None], 1), encoder_positions[seen])
        prediction = self._decode(tokens, seen, decoder_positions)
        with torch.no_grad():
            target = self._target(images, patches)
        error = (prediction.float() - target).square().mean(2)
        return Masked((error * mask).sum() / (mask.numel() - seen.numel()), prediction, mask)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Keep the tables of another size from now on; parameters stay the same objects.

        Raises:
            UserError: it is not a multiple of the patch.
        """
        sides: tuple[int, ...] = to_2tuple(img_size)
        size = (sides[0], sides[1])
        grid = self._checked_grid(size)
        encoder, like = self.encoder, self.encoder.pos_embed
        before = 0 if encoder.no_embed_class else self.prefix
        table = F.pad(sincos_positions(encoder.embed_dim, grid, self.base_grid), (0, 0, before, 0))
        replace_data(like, table[None].to(like))
        encoder.patch_embed.set_input_size(size)
        self.img_size = size
        self.decoder_positions = sincos_positions(self.decoder.embed.out_features, grid, self.base_grid).to(like)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass instead of keeping their activations."""
        self.encoder.set_grad_checkpointing(enable)

    def encoder_state(self) -> dict[str, Tensor]:
        """Weights for timm's classifier of the encoder's name, size and pooling, which lacks nothing but its head."""
        return {name: value.detach().clone() for name, value in self.encoder.state_dict().items()}

    @torch.no_grad()
    def reconstruct(
        self,
        images: Float[Tensor, "batch channels height width"],
        generator: torch.Generator | None = None,
        *,
        mean: Sequence[Number] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[Number] = IMAGENET_DEFAULT_STD,
    ) -> Float[Tensor, "batch three channels height width"]:
        """Pictures of what is asked of the model, what it sees, and what it makes of that, 0 to 1, for looking at.

        Hidden pixels take mean and deviation of their true patch where the target is normalised by them: what can be
        judged is their structure, not their brightness. Histograms are drawn as `draw_histograms` does.

        Args:
            images: normalised.
            generator: as in `forward`.
            mean: that was subtracted from the images.
            std: that they were divided by.
        """
        grid, patches = self._grid_of(images), self._patches(images)
        _, prediction, mask = self(images, generator)
        prediction, hidden = prediction.float(), mask[..., None]
        scale = [torch.tensor(each, device=images.device, dtype=images.dtype)[:, None, None] for each in (mean, std)]
        pictures = (images * scale[1] + scale[0]).clamp(0, 1)
        visible = self._image(torch.where(hidden, 0.0, 1.0).expand_as(patches), grid) * (pictures - 0.5) + 0.5
        if self.target == "hog":
            drawn = [draw_histograms(self._cells(each, grid)) for each in (self._target(images, patches), prediction)]
            return torch.stack([drawn[0], visible, drawn[1]], 1)
        if self.normalise_target:
            prediction = prediction * _deviation(patches) + patches.mean(2, keepdim=True)
        filled = self._image(torch.where(hidden, prediction, patches), grid) * scale[1] + scale[0]
        return torch.stack([pictures, visible, filled.clamp(0, 1)], 1)

    def _prefix(self) -> int:
        return sum(token.shape[1] for token in (self.encoder.cls_token, self.encoder.reg_token) if token is not None)

    def _checked_grid(self, size: Size) -> Size:
        if min(size) < 1 or size[0] % self.patch or size[1] % self.patch:
            near = "x".join(str(max(1, round(side / self.patch)) * self.patch) for side in size)
            raise UserError(f"image size {size[0]}x{size[1]}: expected multiples of {self.patch}, such as {near}")
        return size[0] // self.patch, size[1] // self.patch

    def _grid_of(self, images: Tensor) -> Size:
        if images.shape[1] != self.in_chans:
            raise UserError(f"images of {images.shape[1]} channels, but the encoder takes {self.in_chans}")
        return self._checked_grid((images.shape[2], images.shape[3]))

    def _positions(self, grid: Size, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of the patches for encoder and decoder."""
        table: Tensor = self.encoder.pos_embed
        if grid == self.encoder.patch_embed.grid_size:
            return table[0, table.shape[1] - grid[0] * grid[1] :], self.decoder_positions
        dims = (self.encoder.embed_dim, self.decoder.embed.out_features)
        here, there = (sincos_positions(dim, grid, self.base_grid).to(device, table.dtype) for dim in dims)
        return here, there

    def _draw(
        self, patches: Float[Tensor, "batch patches values"], generator: torch.Generator | None
    ) -> tuple[Int64[Tensor, "batch seen"], Bool[Tensor, "batch patches"]]:
        """Numbers of the visible patches in random order, and where the hidden ones are."""
        batch, count = patches.shape[:2]
        visible = round(count * (1 - self.mask_ratio))
        if not 0 < visible < count:
            given = f"mask_ratio {self.mask_ratio} of {count} patches leaves {visible} visible"
            raise UserError(f"{given}: there must be some of both, so take larger pictures or another ratio")
        device = patches.device if generator is None else generator.device
        noise = torch.rand(batch, count, generator=generator, device=device).to(patches.device)
        seen = noise.argsort(1)[:, :visible]
        return seen, torch.ones_like(noise, dtype=torch.bool).scatter(1, seen, False)

    def _encode(self, patches: Tensor, positions: Tensor) -> Tensor:
        encoder, projection = self.encoder, self.encoder.patch_embed.proj
        tokens = encoder.patch_embed.norm(F.linear(patches, projection.weight.flatten(1), projection.bias)) + positions
        own = [
            token.expand(len(tokens), -1, -1) for token in (encoder.cls_token, encoder.reg_token) if token is not None
        ]
        tokens = encoder.norm_pre(encoder.pos_drop(torch.cat([*own, tokens], 1)))
        return encoder.fc_norm(encoder.norm(self._run(encoder.blocks, tokens)))  # type: ignore[no-any-return]

    def _decode(self, tokens: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        decoder = self.decoder
        own, visible = decoder.embed(tokens).split([self.prefix, seen.shape[1]], 1)
        shape = (*seen.shape, visible.shape[2])
        hidden = decoder.mask_token.to(visible.dtype).expand(len(visible), len(positions), -1)
        places = hidden.scatter(1, seen[..., None].expand(shape), visible) + positions
        tokens = self._run(decoder.blocks, torch.cat([own, places], 1))
        return decoder.head(decoder.norm(tokens[:, self.prefix :]))  # type: ignore[no-any-return]

    def _run(self, blocks: nn.Module, tokens: Tensor) -> Tensor:
        if self.encoder.grad_checkpointing and self.training:
            return checkpoint_seq(blocks, tokens)  # type: ignore[no-any-return]
        return blocks(tokens)  # type: ignore[no-any-return]

    def _target(self, images: Tensor, patches: Tensor) -> Float[Tensor, "batch patches values"]:
        if self.target == "hog":
            cells, side = oriented_gradients(images, normalise=self.normalise_target), self.patch // CELL
            batch, channels, rows, columns, bins = cells.shape
            cells = cells.view(batch, channels, rows // side, side, columns // side, side, bins)
            return cells.permute(0, 2, 4, 1, 3, 5, 6).flatten(3).flatten(1, 2)
        patches = patches.float()
        return (patches - patches.mean(2, keepdim=True)) / _deviation(patches) if self.normalise_target else patches

    def _cells(self, values: Tensor, grid: Size) -> Float[Tensor, "batch channels rows columns bins"]:
        side = self.patch // CELL
        cells = values.view(len(values), *grid, self.in_chans, side, side, BINS).permute(0, 3, 1, 4, 2, 5, 6)
        return cells.flatten(4, 5).flatten(2, 3)

    def _patches(self, images: Tensor) -> Float[Tensor, "batch patches values"]:
        (batch, channels, height, width), side = images.shape, self.patch
        cut = images.reshape(batch, channels, height // side, side, width // side, side)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _image(self, patches: Tensor, grid: Size) -> Float[Tensor, "batch channels height width"]:
        cut = patches.view(len(patches), *grid, self.in_chans, self.patch, self.patch)
        return cut.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _encoder(encoder: VisionTransformer | str, img_size: int) -> Any:
    made: Any = create_model(encoder, size=img_size, num_classes=0) if isinstance(encoder, str) else encoder
    kind = type(made).__name__
    if (
        not isinstance(made, VisionTransformer)
        or type(made.patch_embed) is not PatchEmbed
        or hasattr(made, "dist_token")
    ):
        raise UserError(f"{kind} is no plain vision transformer of timm: take one such as vit_base_patch16_224")
    if made.pos_embed is None or made.attn_pool is not None or len(set(made.patch_embed.patch_size)) > 1:
        raise UserError(
            f"{kind} without positions, with attention pooling or patches that are not square: take another"
        )
    if isinstance(encoder, str):
        made.apply(_initialise)
        nn.init.xavier_uniform_(made.patch_embed.proj.weight.data.flatten(1))
        for token in (made.cls_token, made.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
    made.reset_classifier(0)
    return made


def _deviation(patches: Float[Tensor, "batch patches values"]) -> Float[Tensor, "batch patches one"]:
    return (patches.var(2, keepdim=True) + VARIANCE_FLOOR).sqrt()


def masked_loss(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The loss of a masked autoencoder as `leap_shared.vision.Trainer` takes it: labels do not matter."""
    del targets
    loss: Tensor = model(images).loss
    return loss


def save_reconstruction(
    model: MaskedAutoencoder,
    images: Float[Tensor, "batch 3 height width"],
    path: Path,
    generator: torch.Generator | None = None,
    *,
    mean: Sequence[Number] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[Number] = IMAGENET_DEFAULT_STD,
) -> None:
    """Write what `MaskedAutoencoder.reconstruct` gives as a .png, a row for each image, atomically."""
    pictures = model.reconstruct(images, generator, mean=mean, std=std)
    sheet = pictures.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    with atomic_writer(path) as file:
        Image.fromarray((sheet * 255).round().byte().cpu().numpy()).save(file, format="PNG")
