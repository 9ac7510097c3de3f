"""Masked pre-training: what is hidden, what is asked, what the size changes, and what a classifier gets of it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from skimage import data
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from leap_efficienttrain.cost import gmac
from leap_efficienttrain.hog import oriented_gradients
from leap_efficienttrain.mae import Masked, MaskedAutoencoder, masked_loss, save_reconstruction, sincos_positions
from leap_efficienttrain.presets import make
from leap_efficienttrain.recipes import get, train_config
from leap_efficienttrain.sizes import flexible
from leap_efficienttrain.training import CurriculumTrainer
from leap_shared.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vit(**changes: Any) -> VisionTransformer:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{**sizes, **changes})


def autoencoder(encoder: VisionTransformer | None = None, **changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    light = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    return MaskedAutoencoder(encoder or vit(), **{**light, **changes})


def images(count: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, height, width, generator=generator(seed))


def patches(pictures: Tensor, side: int = 8) -> list[list[Tensor]]:
    """Row-major patches of each picture, cut one by one."""
    height, width = pictures.shape[2:]
    corners = [(row, column) for row in range(0, height, side) for column in range(0, width, side)]
    return [[image[:, r : r + side, c : c + side] for r, c in corners] for image in pictures]


@given(rows=st.integers(2, 6), columns=st.integers(2, 6), ratio=st.floats(0.3, 0.75), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_the_same_exact_share_of_every_picture_is_hidden(rows: int, columns: int, ratio: float, seed: int) -> None:
    model = autoencoder(mask_ratio=ratio)
    mask = model(images(3, 8 * rows, 8 * columns), generator(seed)).mask
    assert mask.shape == (3, rows * columns)
    assert set(mask.sum(1).tolist()) == {rows * columns - round(rows * columns * (1 - ratio))}


def test_three_quarters_of_each_size_of_the_presets_are_hidden() -> None:
    model = autoencoder(vit(img_size=64, patch_size=16))
    shares = {size: model(images(1, size, size)).mask.float().mean().item() for size in (96, 160, 192, 224)}
    assert shares == {96: 0.75, 160: 0.75, 192: 0.75, 224: 0.75}


def test_every_patch_is_hidden_as_often_as_any_other() -> None:
    shares = autoencoder()(images(4000), generator()).mask.float().mean(0)
    torch.testing.assert_close(shares, torch.full((16,), 0.75), atol=0.03, rtol=0)  # 4 deviations of the mean


def test_predictions_depend_on_the_visible_patches_alone() -> None:
    model, pictures = autoencoder(), images()
    before = model(pictures, generator())
    hidden = before.mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = images(seed=1)
    assert torch.equal(model(torch.where(hidden, noise, pictures), generator()).prediction, before.prediction)
    assert not torch.equal(model(torch.where(hidden, pictures, noise), generator()).prediction, before.prediction)


def test_the_encoder_gets_tokens_as_timm_embeds_them() -> None:
    model, pictures = autoencoder(), images()
    given_tokens: list[Tensor] = []
    model.encoder.blocks.register_forward_pre_hook(lambda _, tokens: given_tokens.append(tokens[0]))
    mask = model(pictures, generator()).mask
    encoder = model.encoder
    whole = encoder._pos_embed(encoder.patch_embed(pictures))
    for tokens, all_tokens, hidden in zip(given_tokens[0], whole, mask, strict=True):
        visible = all_tokens[1:][~hidden]
        nearest = torch.cdist(visible, tokens[1:]).argmin(1)
        assert sorted(nearest.tolist()) == [0, 1, 2, 3]
        torch.testing.assert_close(tokens[1:][nearest], visible, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tokens[0], all_tokens[0])


def expected_target(target: str, patch: Tensor, picture: Tensor, number: int, columns: int) -> Tensor:
    if target == "pixels":
        flat = patch.flatten()
        return (flat - flat.mean()) / (flat.var() + 1e-6).sqrt()
    row, column = divmod(number, columns)
    cells = oriented_gradients(picture[None])[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    return torch.stack([cells[c, i, j] for c in range(3) for i in range(2) for j in range(2)]).flatten()


@pytest.mark.parametrize("target", ["pixels", "hog"])
def test_the_loss_is_the_mean_squared_error_of_normalised_hidden_patches(target: str) -> None:
    model = autoencoder(vit(img_size=64, patch_size=16), target=target)
    pictures = images(2, 64, 96)
    loss, prediction, mask = model(pictures, generator())
    errors = [
        (prediction[row, number] - expected_target(target, patch, pictures[row], number, 6)).square().mean()
        for row, all_patches in enumerate(patches(pictures, 16))
        for number, patch in enumerate(all_patches)
        if mask[row, number]
    ]
    torch.testing.assert_close(loss, torch.stack(errors).mean(), atol=1e-5, rtol=1e-5)


def test_pixels_as_they_are_can_be_the_target() -> None:
    model, pictures = autoencoder(normalise_target=False), images()
    loss, prediction, mask = model(pictures, generator())
    flat = torch.stack([torch.stack([patch.flatten() for patch in every]) for every in patches(pictures)])
    torch.testing.assert_close(loss, (prediction - flat)[mask].square().mean())


def test_visible_patches_add_nothing_to_the_loss() -> None:
    out = autoencoder()(images(), generator())
    (gradient,) = torch.autograd.grad(out.loss, out.prediction)
    assert torch.equal(gradient.abs().sum(2) > 0, out.mask)


@pytest.mark.parametrize("changes", [{}, {"global_pool": "avg"}, {"reg_tokens": 2}, {"no_embed_class": True}])
def test_every_trained_parameter_gets_a_gradient(changes: dict[str, Any]) -> None:
    """Else DistributedDataParallel would need find_unused_parameters."""
    model = autoencoder(vit(**changes))
    model(images()).loss.backward()
    without = {name for name, value in model.named_parameters() if value.requires_grad and value.grad is None}
    assert not without
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == ["encoder.pos_embed"]


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    model, found = autoencoder(), []
    for enabled in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enabled)
        model(images(), generator()).loss.backward()
        found.append(model.encoder.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*found)


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), quarter=st.integers(1, 4))
def test_positions_are_sines_and_cosines_of_column_and_row(rows: int, columns: int, quarter: int) -> None:
    table = sincos_positions(4 * quarter, (rows, columns)).numpy()
    for number, waves in enumerate(table):
        row, column = divmod(number, columns)
        frequency = 10000.0 ** (-np.arange(quarter) / quarter)
        parts = [wave(place * frequency) for place in (column, row) for wave in (np.sin, np.cos)]
        np.testing.assert_allclose(waves, np.concatenate(parts), atol=1e-6)


def test_positions_of_another_grid_span_the_same_picture() -> None:
    """The middle of two places has the position between theirs: that of 0.5 on a base grid of twice the side."""
    table, base = sincos_positions(8, (2, 2), (4, 4)).numpy(), 0.5
    np.testing.assert_allclose(table[0, [0, 2]], [np.sin(base), np.cos(base)], atol=1e-6)
    np.testing.assert_allclose(table[3, [4, 6]], [np.sin(base + 2), np.cos(base + 2)], atol=1e-6)


def step(model: MaskedAutoencoder, optimizer: Any, pictures: Tensor, numbers: torch.Generator) -> float:
    loss = model(pictures, numbers).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def test_a_size_change_keeps_parameters_moments_and_average() -> None:
    model = autoencoder()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], 1e-3)
    step(model, optimizer, images(), generator())
    average = copy.deepcopy(model)
    flex = flexible(model, optimizer, average)
    before, state = dict(model.named_parameters()), copy.deepcopy(optimizer.state_dict()["state"])
    flex.set_size(48)
    assert all(value is before[name] for name, value in model.named_parameters())
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(now[key][part], state[key][part]) for key in state for part in state[key])
    expected = sincos_positions(32, (6, 6), (4, 4))
    for each in (model, average):
        torch.testing.assert_close(each.encoder.pos_embed[0, 1:], expected, atol=0, rtol=0)
        assert each.img_size == each.encoder.patch_embed.img_size == (48, 48)
    step(model, optimizer, images(2, 48, 48), generator())
    flex.set_size(32)
    torch.testing.assert_close(model.encoder.pos_embed[0, 1:], sincos_positions(32, (4, 4)), atol=0, rtol=0)


def test_a_picture_of_another_size_is_taken_without_a_change_and_gives_the_same() -> None:
    model, pictures = autoencoder(), images(2, 40, 24)
    before = model(pictures, generator())
    model.set_input_size((40, 24))
    after = model(pictures, generator())
    torch.testing.assert_close(before.loss, after.loss)
    torch.testing.assert_close(before.prediction, after.prediction)


@pytest.mark.parametrize("changes", [{}, {"global_pool": "avg"}, {"reg_tokens": 2}, {"no_embed_class": True}])
def test_a_classifier_takes_the_encoder_whole(changes: dict[str, Any]) -> None:
    model, classifier = autoencoder(vit(**changes)), vit(**changes, img_size=48)
    model.set_input_size(48)
    missing = classifier.load_state_dict(model.encoder_state(), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["head.weight", "head.bias"], [])
    pictures = images(2, 48, 48)
    torch.testing.assert_close(classifier.forward_features(pictures), model.encoder.forward_features(pictures))


def test_an_encoder_of_timm_can_be_named() -> None:
    model = MaskedAutoencoder("vit_tiny_patch16_224", img_size=96, decoder_dim=32, decoder_depth=1, decoder_heads=2)
    classifier = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=3)
    assert classifier.load_state_dict(model.encoder_state(), strict=False).missing_keys == ["head.weight", "head.bias"]
    assert model(images(1, 96, 96)).prediction.shape == (1, 36, 768)


@functools.cache
def sources() -> tuple[Any, ...]:
    return data.astronaut(), data.coffee(), data.chelsea()


def photographs(side: int, count: int, numbers: torch.Generator) -> Tensor:
    """Squares of scikit-image's photographs, from random places, normalised."""
    pictures = []
    for number in range(count):
        photo = sources()[number % 3]
        spare = [length - 2 * side for length in photo.shape[:2]]
        row, column = (int(torch.randint(length, (), generator=numbers)) for length in spare)
        pictures.append(torch.from_numpy(photo[row : row + 2 * side : 2, column : column + 2 * side : 2].copy()))
    return (torch.stack(pictures).permute(0, 3, 1, 2).float() / 255 - 0.45) / 0.25


@pytest.mark.parametrize("target", ["pixels", "hog"])
def test_training_on_photographs_through_two_sizes_lowers_the_loss(target: str) -> None:
    numbers = generator()
    model = autoencoder(vit(embed_dim=64), decoder_dim=64, target=target)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], 3e-3)
    flex = flexible(model, optimizer)
    held = photographs(32, 48, generator(1))
    before = model(held, generator(2)).loss.item()
    for size in (16, 32):
        flex.set_size(size)
        for _ in range(30):
            step(model, optimizer, photographs(size, 24, numbers), numbers)
    after = model(held, generator(2)).loss.item()
    spread = (model._target(held, model._patches(held)) ** 2).mean().item()  # what predicting 0 costs
    assert after < 0.8 * min(before, spread)


def test_a_training_goes_on_to_the_same_bits_from_its_state() -> None:
    def started() -> tuple[MaskedAutoencoder, Any]:
        model = autoencoder()
        return model, torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], 1e-3)

    numbers, (model, optimizer) = generator(), started()
    step(model, optimizer, images(), numbers)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), numbers.get_state()))
    expected = [step(model, optimizer, images(), numbers) for _ in range(3)]
    again, (model, optimizer) = generator(9), started()
    for part, state in zip((model.load_state_dict, optimizer.load_state_dict, again.set_state), saved, strict=True):
        part(state)
    assert [step(model, optimizer, images(), again) for _ in range(3)] == expected


def test_the_curriculums_trainer_takes_it_through_its_sizes(tmp_path: Path) -> None:
    pictures = (photographs(64, 16, generator()).permute(0, 2, 3, 1) * 0.25 + 0.45) * 255
    labels = np.arange(16) % 2
    np.savez(tmp_path / "photographs.npz", images=pictures.round().byte().numpy(), labels=labels)
    recipe = get("vit_base_mae", epochs=5, base_size=64, batch=8, micro_batch=None)
    config = train_config(recipe, str(tmp_path / "photographs.npz"), amp="no", workers=0, tensorboard=False)
    model = autoencoder(vit(img_size=64, patch_size=16))
    out = tmp_path / "run"
    run = CurriculumTrainer(recipe.curriculum, config, out, model=model, loss_fn=masked_loss, device="cpu").trainer
    run.train()
    assert [state.size for state in recipe.curriculum.plan(16).states] == [48, 48, 48, 48, 64]
    assert run.update == 10
    assert model.img_size == (64, 64)
    assert load_file(out / "weights.safetensors").keys() == model.state_dict().keys()


def test_global_random_numbers_draw_where_no_generator_is_given() -> None:
    def drawn(seed: int) -> Masked:
        torch.manual_seed(seed)
        return model(images())

    model = autoencoder()
    assert torch.equal(drawn(0).mask, drawn(0).mask)
    assert not torch.equal(drawn(0).mask, drawn(1).mask)


def test_the_trainers_loss_is_the_models() -> None:
    model = autoencoder()
    torch.manual_seed(0)
    loss = masked_loss(model, images(), torch.zeros(2, dtype=torch.int64))
    torch.manual_seed(0)
    assert torch.equal(loss, model(images()).loss)


def test_weights_in_half_precision_give_a_loss_in_single() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = autoencoder()(images(), generator()).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, autoencoder()(images(), generator()).loss, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_reconstruction_shows_visible_patches_as_they_are(normalise: bool) -> None:
    model = autoencoder(normalise_target=normalise)
    pictures = photographs(32, 2, generator())
    options = {"mean": (0.45,) * 3, "std": (0.25,) * 3}
    true, seen, made = model.reconstruct(pictures, generator(), **options).unbind(1)
    mask = model(pictures, generator()).mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    mask = mask.expand_as(true)
    torch.testing.assert_close(true, pictures * 0.25 + 0.45, atol=1e-5, rtol=0)
    torch.testing.assert_close(made[~mask], true[~mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[~mask], true[~mask], atol=1e-5, rtol=0)
    assert set(seen[mask].tolist()) == {0.5}


@pytest.mark.parametrize("target", ["pixels", "hog"])
def test_reconstructions_are_written_in_rows_of_three(target: str, tmp_path: Path) -> None:
    model = autoencoder(target=target)
    save_reconstruction(model, photographs(32, 2, generator()), tmp_path / "seen.png", generator())
    with Image.open(tmp_path / "seen.png") as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (96, 64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "preset", "epochs", "published"),
    [
        ("vit_base_patch16_224", "et:iccv", 1600, 1.54),
        ("vit_large_patch16_224", "et:iccv", 1600, 1.53),
        ("vit_base_patch16_224", "et++:deit", 400, 3.98),
    ],
)
def test_the_curriculum_saves_what_the_papers_say(name: str, preset: str, epochs: int, published: float) -> None:
    with torch.device("meta"):
        model = MaskedAutoencoder(name)
    costs: dict[int, float] = {}
    for size in (96, 160, 192, 224):
        model.set_input_size(size)
        costs[size] = gmac(model, size)
    legs = make(preset, epochs, 224).plan().legs
    speedup = 1600 * costs[224] / sum(float(leg.passes) * costs[leg.stage.size] for leg in legs)
    assert speedup == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: autoencoder(target="edges"), "target 'edges': expected pixels or hog"),
        (lambda: autoencoder(mask_ratio=1), "mask_ratio 1: expected a share"),
        (lambda: autoencoder(decoder_heads=3), "heads that divide"),
        (lambda: autoencoder(decoder_dim=18), "multiple of 4"),
        (lambda: autoencoder(vit(patch_size=4), target="hog"), "patches of 4 pixels"),
        (lambda: autoencoder(vit(pos_embed="none")), "without positions"),
        (lambda: autoencoder(vit(global_pool="map")), "attention pooling"),
        (lambda: MaskedAutoencoder("resnet18"), "ResNet is no plain vision transformer"),
        (lambda: autoencoder()(images(2, 36, 32)), "36x32: expected multiples of 8, such as 32x32"),
        (lambda: autoencoder()(images()[:, :1]), "1 channels, but the encoder takes 3"),
        (lambda: autoencoder(mask_ratio=0.01)(images()), "leaves 16 visible"),
        (lambda: flexible(autoencoder()).set_size(100), "100x100: expected multiples of 8"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(make_model: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_model()
