"""The verbs train and eval, end to end on small pictures and a small model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

import leap_slide as ls
from leap_shared.checkpoints import read
from leap_shared.cli import App
from leap_shared.errors import UserError
from leap_shared.vision import Trainer, build_transform, evaluate, evaluation_loader, open_source, running
from leap_shared.vision.bodies import build, pretrained_config
from leap_shared.vision.data import derive, isolated
from leap_shared.vision.learner import Learner
from leap_slide import recipes
from leap_slide.checkpoints import OFFICIAL, create_model, load_official, save_safetensors
from leap_slide.convert import reparameterize
from leap_slide.functional import shift_kernel
from leap_slide.models.variants import VARIANTS
from leap_slide.verbs.training import Eval, Train

app = App("leap-slide", "leap_slide", (Train, Eval))
TINY = "mini_slide_swin"
SMALL = ("--img-size", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu")
ONCE = (*SMALL, "--accumulation", "1", "--epochs", "2")
ROUNDING = 1e-5  # pictures meet in other batches, whose sums are in another order
default_cfgs = generate_default_cfgs({TINY: pretrained_config(ls.SlideSwin)})


@register_model
def mini_slide_swin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build(ls.SlideSwin, TINY, pretrained, **{**tiny.KINDS["swin"][1], **kwargs})


@pytest.fixture(autouse=True, scope="module")
def _known() -> Iterator[None]:
    """The small variant among the published ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, TINY, replace(VARIANTS["slide_swin_tiny_w7"], name=TINY))
        patch.setitem(OFFICIAL.variants, TINY, 0)
        patch.setitem(recipes.RECIPES, TINY, replace(recipes.get("slide_swin_tiny_w7"), name=TINY))
        yield


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        app.main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert call(*arguments, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert call(*arguments) == 2, capsys.readouterr().err
    return capsys.readouterr().err


def write_pictures(root: Path, classes: int = 3, counts: tuple[int, int] = (4, 3)) -> Path:
    """Pictures of one colour per class under noise: wider than high."""
    generator = np.random.default_rng(0)
    for part, count in zip(("train", "val"), counts, strict=True):
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 160, (40, 52, 3), dtype=np.uint8)
                pixels[:, :, label % 3] += 90
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pictures: Path, _known: None) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert call("train", "--cfg", TINY, "--data", pictures, "--ema", *ONCE, "--out", out) == 0
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in found]


def small_model(path: Path, **options: Any) -> Path:
    torch.manual_seed(1)
    save_safetensors(create_model(TINY, **options), path)
    return path


def test_training_writes_weights_average_and_logs(finished: Path) -> None:
    for name in ("weights", "ema", "best"):
        assert read(finished / f"{name}.safetensors")["head.weight"].shape == (3, 64)
    scored = [(row["epoch"], row["weights"], row["images"]) for row in rows(finished) if row["phase"] == "validation"]
    assert scored == [(epoch, name, 9.0) for epoch in (1, 2) for name in ("weights", "ema")]


@pytest.mark.parametrize("name", ["weights", "ema"])
def test_training_leaves_the_shifts_as_they_are(name: str, finished: Path) -> None:
    state = read(finished / f"{name}.safetensors")
    shifts = [value for key, value in state.items() if key.endswith("dep_conv.weight")]
    assert len(shifts) == 2
    assert all(torch.equal(value, shift_kernel(8, 3)) for value in shifts)


def test_training_moves_all_else_of_slide_attention(finished: Path) -> None:
    with isolated(derive(0)):  # as the trainer begins
        start = create_model(TINY, num_classes=3, img_size=32).state_dict()
    state = read(finished / "weights.safetensors")
    still = {key for key in start if ".blocks.0.attn." in key and torch.equal(start[key], state[key])}
    assert {key for key in still if key[7] in "01"} == {
        f"layers.{stage}.blocks.0.attn.dep_conv.weight" for stage in (0, 1)
    }


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    pictures: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("train", "--cfg", TINY, "--data", pictures, "--ema", *ONCE, "--out", tmp_path / "run")
    step, calls = Learner.step, iter(range(1, 100))

    def stop(self: Learner, *arguments: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", stop)
        assert call(*command) == 130
    assert call(*command) == 0
    assert rows(tmp_path / "run") == rows(finished)
    for name in ("weights", "ema"):
        found, expected = (read(out / f"{name}.safetensors") for out in (tmp_path / "run", finished))
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", ["weights", "ema"])
def test_eval_says_what_the_training_said_last(
    kind: str, pictures: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (told,) = answer(capsys, "eval", TINY, "--checkpoint", finished / f"{kind}.safetensors", "--data", pictures, *SMALL)
    last = next(row for row in reversed(rows(finished)) if row.get("weights") == kind)
    assert (told["top1"], told["top5"], told["images"]) == (last["top1"], last["top5"], 9.0)
    assert told["loss"] == pytest.approx(last["loss"], rel=ROUNDING)
    assert told["published top1"] is None


def test_eval_scores_every_protocol(
    pictures: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "weights.safetensors"
    command = ("eval", TINY, "--checkpoint", path, "--data", pictures, *SMALL, "--out", tmp_path)
    told = answer(capsys, *command, "--protocol", "reference", "timm")
    expected, model = [], create_model(TINY, checkpoint=path, num_classes=3, img_size=32)
    for protocol in get_args(recipes.Protocol):
        config = recipes.get(TINY).data_config("x", image_size=32, protocol=protocol)
        loader = evaluation_loader(open_source(str(pictures / "val")), build_transform(config), batch_size=4)
        expected.append((protocol, pytest.approx(evaluate(model, loader)["loss"], rel=1e-12)))
    assert [(row["protocol"], row["loss"]) for row in told] == expected
    assert told[0]["loss"] != told[1]["loss"]
    assert json.loads((tmp_path / "scores.json").read_text()) == told


@pytest.mark.parametrize(("form", "top1"), [("slide_swin_tiny_w7", 82.3), ("slide_swin_tiny", None)])
def test_the_published_figure_is_shown_for_the_variant_it_belongs_to(
    form: str, top1: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_model(tmp_path / "model.safetensors", img_size=32)
    monkeypatch.setitem(VARIANTS, TINY, replace(VARIANTS[form], name=TINY))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", images=images, labels=[0, 999, 5])
    command = ("eval", TINY, "--checkpoint", path, "--data", tmp_path / "pictures.npz", *SMALL, "--json")
    assert call(*command) == 0
    told = capsys.readouterr()
    (row,) = json.loads(told.out)
    assert (row["published top1"], row["published top5"], row["images"]) == (top1, None, 3.0)
    assert f"{TINY}: {VARIANTS[form].note}" in told.err


def envelope(path: Path, **entries: Any) -> Path:
    """The authors' training file, with an average of other weights and no score of it."""
    model = create_model(TINY, num_classes=3, img_size=32)
    average = {key: value.clone() for key, value in model.state_dict().items()}
    average["head.bias"][1] += 100
    rest = {"optimizer": {}, "lr_scheduler": {}, "max_accuracy": 50.0, "epoch": 299}
    torch.save({"model": model.state_dict(), "state_dict_ema": average, **rest, **entries}, path)
    return path


def test_eval_scores_the_average_of_a_file_once_though_its_best_score_is_missing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored: list[nn.Module] = []

    def once(model: nn.Module, *arguments: Any, **options: Any) -> dict[str, float]:
        scored.append(model)
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr(running, "evaluate", once)
    command = ("eval", TINY, "--checkpoint", envelope(tmp_path / "file.pth"), "--data", pictures, *SMALL)
    (plain,) = answer(capsys, *command)
    assert len(scored) == 1
    (told,) = answer(capsys, *command, "--ema")
    assert len(scored) == 2
    assert told["top1"] == pytest.approx(100 / 3)
    assert told["loss"] > plain["loss"] + 50


def test_training_with_an_average_goes_on_from_a_file_without_its_best_score(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = envelope(tmp_path / "file.pth")
    command = ("train", "--cfg", TINY, "--data", pictures, *ONCE[:-1], 1, "--ema", "--finetune", path)
    told = answer(capsys, *command, "--out", tmp_path / "run")
    assert [row["weights"] for row in told] == ["weights", "ema"]


def test_eval_takes_a_deploy_file(
    pictures: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "weights.safetensors"
    model = create_model(TINY, checkpoint=path, num_classes=3, img_size=32).eval()
    save_safetensors(reparameterize(model), tmp_path / "deploy.safetensors")
    command = ("--data", pictures, *SMALL)
    (before,) = answer(capsys, "eval", TINY, "--checkpoint", path, *command)
    (after,) = answer(capsys, "eval", TINY, "--checkpoint", tmp_path / "deploy.safetensors", *command)
    assert after["loss"] == pytest.approx(before["loss"], rel=ROUNDING)


def test_a_deploy_file_is_no_start_of_a_training(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = reparameterize(create_model(TINY, num_classes=3, img_size=32).eval())
    save_safetensors(model, tmp_path / "deploy.safetensors")
    command = ("train", "--cfg", TINY, "--data", pictures, *ONCE, "--finetune", tmp_path / "deploy.safetensors")
    told = complaint(capsys, *command, "--out", tmp_path / "run")
    assert "the weights have one path, this model two" in told
    assert not (tmp_path / "run" / "weights.safetensors").exists()


@pytest.fixture
def config(pictures: Path) -> Any:
    options: dict[str, Any] = {"image_size": 32, "batch_size": 4, "accumulation": 1, "epochs": 2, "workers": 0}
    return recipes.get(TINY).train_config(str(pictures / "train"), tensorboard=False, **options)


def test_making_one_path_of_two_in_the_middle_of_a_training_is_refused(config: Any, tmp_path: Path) -> None:
    def middle(epoch: int, trainer: Trainer) -> None:
        if epoch == 1:
            reparameterize(trainer.model)

    trainer = Trainer(config, tmp_path, device="cpu", on_epoch_start=middle)
    with pytest.raises(UserError, match="the model is in training mode"):
        trainer.train()
    assert trainer.epoch == 1
    assert trainer.update == trainer.updates


def test_a_training_of_two_paths_does_not_go_on_with_one(config: Any, tmp_path: Path) -> None:
    def stop(epoch: int, trainer: Trainer) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(config, tmp_path, device="cpu", on_epoch_start=stop).train()
    model = reparameterize(create_model(TINY, num_classes=3, img_size=32).eval()).train()
    with pytest.raises(UserError, match="the weights have two paths, this model one"):
        Trainer(config, tmp_path, device="cpu", model=model).train()


def test_fine_tuning_starts_from_the_file_at_another_size_with_another_head(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_model(tmp_path / "source.safetensors", num_classes=5, img_size=64)
    expected = create_model(TINY, num_classes=3, img_size=32)
    load_official(expected, path, resize=True, new_head=True)
    found: list[dict[str, dict[str, Tensor]]] = []

    def stop(self: Learner, *arguments: Any) -> Any:
        found.append({name: model.state_dict() for name, model in self.models.items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "step", stop)
    command = ("train", "--cfg", TINY, "--data", pictures, *ONCE, "--ema", "--finetune", path)
    assert call(*command, "--out", tmp_path / "run") == 130
    assert found[0].keys() == {"weights", "ema"}
    for state in found[0].values():
        assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


def test_the_flags_reach_the_training(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Trainer] = []

    def stop(self: Trainer) -> Any:
        made.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", stop)
    command = ("train", "--cfg", TINY, "--data", pictures, *ONCE, "--amp", "bf16", "--seed", "7", "--save-updates", "3")
    assert call(*command, "--protocol", "timm", "--lr", "0.01", "--ema", "--out", tmp_path / "run") == 130
    (config,) = (trainer.config for trainer in made)
    assert (config.amp, config.seed, config.epochs, config.accumulation, config.save_updates) == ("bf16", 7, 2, 1, 3)
    assert (config.optimiser.lr, config.schedule.min_lr) == (0.01, pytest.approx(1e-4))
    assert (config.optimiser.clip_norm, config.optimiser.ema_decay) == (5.0, 0.9999)
    assert (config.data.squash, config.data.image_size) == (False, 32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cfg", "slide_swim_tiny"), "slide_swim_tiny' is unknown: did you mean slide_swin_tiny"),
        (("--data", "nowhere"), "no pictures at nowhere"),
        (("--finetune", "nowhere.pth"), "nowhere.pth"),
        (("--batch-size", "64"), "is more than the 12 training pictures"),
        (("--img-size", "33"), "must be multiples of 32"),
        (("--gpus", "0"), "--gpus 0: expected 1 or more"),
    ],
)
def test_a_training_that_cannot_be_is_refused_and_leaves_nothing(
    flags: tuple[str, str], message: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("train", "--cfg", TINY, "--data", pictures, *ONCE, "--out", tmp_path / "run", *flags)
    assert message in complaint(capsys, *command)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--checkpoint", "nowhere.pth"), "nowhere.pth"),
        (("--ema",), "average"),
        (("--img-size", "64"), "It is for another image size: pass resize=True"),
        (("--batch-size", "0"), "batch_size 0"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(
    flags: tuple[str, ...], message: str, pictures: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "weights.safetensors"
    assert message in complaint(capsys, "eval", TINY, "--checkpoint", path, "--data", pictures, *SMALL, *flags)


def test_a_recipe_that_is_not_the_authors_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    told = complaint(capsys, "train", "--cfg", "slide_pvt_tiny", "--data", "nowhere")
    assert "slide_pvt_tiny: no recipe is published, this is the one of its body" in told


def test_training_in_bfloat16_stays_finite(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("train", "--cfg", TINY, "--data", pictures, *ONCE[:-1], 1, "--amp", "bf16", "--out", tmp_path / "run")
    assert np.isfinite(answer(capsys, *command)[0]["loss"])


@pytest.mark.slow
def test_gpus_starts_two_processes_that_share_a_training(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of PVT, whose last norm is frozen: nothing that is trained stays without gradient."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ("train", "--cfg", "slide_pvt_tiny", "--data", pictures, *ONCE[:-1], 1, "--gpus", "2")
    told = answer(capsys, *command, "--out", tmp_path / "run")
    assert (told[0]["weights"], told[0]["images"]) == ("weights", 9.0)
    assert [row["step"] for row in rows(tmp_path / "run") if row["phase"] == "train"] == [1]
