"""The verbs train and eval, end to end on small pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import leap_flatten as lf
from leap_flatten import recipes
from leap_flatten.verbs.training import Eval, Train
from leap_shared.checkpoints import read
from leap_shared.cli import App
from leap_shared.vision import Trainer, build_transform, evaluate, evaluation_loader, open_source, running
from leap_shared.vision.learner import Learner

app = App("leap-flatten", "leap_flatten", (Train, Eval))
TINY = "flatten_pvt_v2_b0"
SMALL = ("--img-size", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu")
ONCE = (*SMALL, "--accumulation", "1", "--epochs", "2")
ROUNDING = 1e-5  # pictures meet in other batches, whose sums are in another order


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
def finished(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert call("train", "--cfg", TINY, "--data", pictures, "--ema", *ONCE, "--out", out) == 0
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in found]


def small_model(path: Path, name: str = TINY, **options: Any) -> Path:
    torch.manual_seed(1)
    lf.save_safetensors(lf.create_model(name, **options), path)
    return path


def test_training_writes_weights_average_and_logs(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("weights", "ema", "best"):
        assert read(finished / f"{name}.safetensors")["head.weight"].shape == (3, 256)
    scored = [(row["epoch"], row["weights"], row["images"]) for row in rows(finished) if row["phase"] == "validation"]
    assert scored == [(epoch, name, 9.0) for epoch in (1, 2) for name in ("weights", "ema")]


@pytest.mark.parametrize("changes", [{"warmup_epochs": 3}, {"warmup_epochs": 0}])
def test_every_update_takes_the_rate_that_the_recipe_gives_it(changes: dict[str, int], tmp_path: Path) -> None:
    recipe = replace(recipes.get(TINY), epochs=8, cooldown_epochs=2, **changes)
    images, used = np.zeros((8, 8, 8, 3), np.uint8), []
    np.savez(tmp_path / "pictures.npz", images=images, labels=np.arange(8) % 2)
    source = str(tmp_path / "pictures.npz")
    config = recipe.train_config(source, image_size=8, batch_size=2, accumulation=2, workers=0, tensorboard=False)

    def loss(model: nn.Module, pictures: Tensor, targets: Tensor) -> Tensor:
        used.append({group["lr"] for group in trainer.learner.optimiser.param_groups})
        return model(pictures).mean()

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    trainer = Trainer(config, tmp_path / "out", model=model, device="cpu", loss_fn=loss)
    trainer.train()
    rates = recipe.learning_rates(batch=4, steps_per_epoch=2)
    assert [rate for (rate,) in used[::2]] == pytest.approx(rates[:-1], rel=1e-9)


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


def test_a_finished_run_is_left_as_it_is_though_another_file_of_weights_is_newer(
    pictures: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows(finished)
    (finished / "best.safetensors").touch()
    told = answer(capsys, "train", "--cfg", TINY, "--data", pictures, "--ema", *ONCE, "--out", finished)
    assert rows(finished) == before
    assert [row["weights"] for row in told] == ["weights", "ema"]
    assert told[0]["loss"] == before[-2]["loss"]


def test_a_run_does_not_go_on_with_an_average_that_it_never_had(
    pictures: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = complaint(capsys, "train", "--cfg", TINY, "--data", pictures, *ONCE, "--out", finished)
    assert "'ema_decay': None" in told
    assert "take the former settings or another folder" in told


@pytest.mark.parametrize("kind", ["weights", "ema"])
def test_eval_says_what_the_training_said_last(
    kind: str, pictures: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (told,) = answer(capsys, "eval", TINY, "--checkpoint", finished / f"{kind}.safetensors", "--data", pictures, *SMALL)
    last = next(row for row in reversed(rows(finished)) if row.get("weights") == kind)
    assert (told["top1"], told["top5"], told["images"]) == (last["top1"], last["top5"], 9.0)
    assert told["loss"] == pytest.approx(last["loss"], rel=ROUNDING)
    assert told["published top1"] is None


def test_eval_scores_every_protocol_with_every_denominator(
    pictures: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "weights.safetensors"
    command = ("eval", TINY, "--checkpoint", path, "--data", pictures, *SMALL, "--out", tmp_path)
    told = answer(capsys, *command, "--protocol", "reference", "timm", "--denominator", "mean", "sum")
    expected = []
    for denominator in ("mean", "sum"):
        model = lf.create_model(TINY, checkpoint=path, num_classes=3, img_size=32, denominator=denominator)
        for protocol in get_args(recipes.Protocol):
            config = recipes.get(TINY).data_config("x", image_size=32, protocol=protocol)
            loader = evaluation_loader(open_source(str(pictures / "val")), build_transform(config), batch_size=4)
            expected.append((protocol, denominator, pytest.approx(evaluate(model, loader)["loss"], rel=1e-12)))
    assert [(row["protocol"], row["denominator"], row["loss"]) for row in told] == expected
    assert len({row["loss"] for row in told}) == 4
    assert json.loads((tmp_path / "scores.json").read_text()) == told


def test_eval_shows_the_published_figure_for_the_published_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small_model(tmp_path / "model.safetensors", img_size=32)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", images=images, labels=[0, 999, 5])
    (told,) = answer(capsys, "eval", TINY, "--checkpoint", path, "--data", tmp_path / "pictures.npz", *SMALL)
    assert (told["published top1"], told["published top5"], told["images"]) == (71.098, 90.596, 3.0)


def test_eval_takes_the_average_of_an_envelope(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lf.create_model(TINY, num_classes=3, img_size=32)
    average = {key: value.clone() for key, value in model.state_dict().items()}
    average["head.bias"][1] += 100
    torch.save({"model": model.state_dict(), "state_dict_ema": average}, tmp_path / "file.pth")
    command = ("eval", TINY, "--checkpoint", tmp_path / "file.pth", "--data", pictures, *SMALL)
    (plain,), (told,) = answer(capsys, *command), answer(capsys, *command, "--ema")
    assert told["top1"] == pytest.approx(100 / 3)
    assert told["loss"] > plain["loss"] + 50


def test_fine_tuning_starts_from_the_file_at_another_size_with_another_head(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_model(tmp_path / "source.safetensors", num_classes=5, img_size=64)
    expected = lf.create_model(TINY, num_classes=3, img_size=32)
    lf.load_official(expected, path, resize=True, new_head=True)
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
    command = ("train", "--cfg", TINY, "--data", pictures, *ONCE, "--amp", "bf16", "--no-decay-pos", "--seed", "7")
    assert (
        call(*command, "--denominator", "sum", "--protocol", "timm", "--lr", "0.01", "--out", tmp_path / "run") == 130
    )
    (config,) = (trainer.config for trainer in made)
    assert (config.amp, config.seed, config.epochs, config.accumulation) == ("bf16", 7, 2, 1)
    assert (config.optimiser.lr, config.schedule.min_lr) == (0.01, pytest.approx(2e-4))
    assert (config.data.squash, config.data.image_size) == (False, 32)
    spared = next(group["params"] for group in made[0].learner.optimiser.param_groups if not group["weight_decay"])
    layer = made[0].model.get_submodule("block1.0.attn")
    assert any(parameter is layer.positional_encoding for parameter in spared)
    assert layer.denominator == "sum"


def test_a_trained_folder_without_validation_gives_weights_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pictures(tmp_path / "data", 2, (2, 1)) / "train"
    (told,) = answer(capsys, "train", "--cfg", TINY, "--data", data, *ONCE[:-1], 1, "--out", tmp_path / "run")
    assert told == {"weights": "weights", "written": str(tmp_path / "run" / "weights.safetensors")}
    assert read(tmp_path / "run" / "weights.safetensors")["head.bias"].shape == (2,)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cfg", "flatten_pvt_v2_bo"), "flatten_pvt_v2_bo' is unknown: did you mean flatten_pvt_v2_b"),
        (("--data", "nowhere"), "no pictures at nowhere"),
        (("--finetune", "nowhere.pth"), "nowhere.pth"),
        (("--batch-size", "64"), "is more than the 12 training pictures"),
        (("--batch-size", "3"), "give an even number"),
        (("--img-size", "33"), "must be multiples of 32"),
        (("--lr", "-1"), "lr=-1.0: expected a positive number"),
        (("--gpus", "0"), "--gpus 0: expected 1 or more"),
        (("--validation", "nowhere"), "no pictures at nowhere"),
        (("--device", "cuda:99"), "not available"),
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
        (("--data", "nowhere"), "no pictures at nowhere"),
        (("--ema",), "average"),
        (("--img-size", "64"), "It is for another image size: pass resize=True"),
        (("--batch-size", "0"), "batch_size 0"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(
    flags: tuple[str, ...], message: str, pictures: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "weights.safetensors"
    told = complaint(capsys, "eval", TINY, "--checkpoint", path, "--data", pictures, *SMALL, *flags)
    assert message in told


def test_eval_of_an_unknown_name_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    told = complaint(capsys, "eval", "flatten_swin_tinny", "--checkpoint", "x.pth", "--data", "x")
    assert "did you mean flatten_swin_tiny" in told


def test_eval_resamples_a_checkpoint_of_another_size_on_demand(
    pictures: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "weights.safetensors"
    command = ("eval", TINY, "--checkpoint", path, "--data", pictures, *SMALL, "--img-size", "64", "--resize")
    assert answer(capsys, *command)[0]["images"] == 9.0


@pytest.mark.parametrize("verb", [("eval", "flatten_pvt_tiny", "--checkpoint"), ("train", "--finetune")])
def test_a_checkpoint_of_another_variant_is_named(
    verb: tuple[str, ...], pictures: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--cfg", "flatten_pvt_tiny", *ONCE) if verb[0] == "train" else SMALL
    command = (*verb, finished / "weights.safetensors", "--data", pictures, *more, "--out", tmp_path / "run")
    assert "It fits flatten_pvt_v2_b0" in complaint(capsys, *command)


def test_pictures_of_other_classes_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pictures(tmp_path, 2, (1, 1))
    path = finished / "weights.safetensors"
    told = complaint(capsys, "eval", TINY, "--checkpoint", path, "--data", data, *SMALL)
    assert "val has 2 classes, and" in told
    assert "is for 3: give pictures of its classes" in told


@pytest.mark.parametrize(("part", "verb"), [("train", "eval"), ("val", "train")])
def test_a_folder_without_the_part_that_is_needed_is_refused(
    part: str, verb: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / part / "class0").mkdir(parents=True)
    own = ("--cfg", TINY) if verb == "train" else (TINY, "--checkpoint", finished / "weights.safetensors")
    told = complaint(capsys, verb, *own, "--data", tmp_path)
    assert f"{tmp_path} has no" in told


def test_gpus_start_processes_that_repeat_the_command(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(running, "start_processes", lambda *arguments: started.append(arguments))
    out = tmp_path / "run"
    assert (
        call("train", "--cfg", TINY, "--data", pictures, *ONCE, "--gpus", "2", "--denominator", "sum", "--out", out)
        == 0
    )
    code = "from leap_flatten.cli import main; main()"
    assert started == [(2, ["-c", code, "train", "--config", str(out / "config.yaml"), "--json"])]
    assert "denominator: sum" in (out / "config.yaml").read_text()


def test_a_recipe_that_fine_tunes_says_so_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    told = complaint(capsys, "train", "--cfg", "flatten_swin_base_384", "--data", "nowhere")
    assert "the recipe fine-tunes flatten_swin_base: without --finetune the weights start at random" in told


def test_a_recipe_that_is_not_the_authors_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    told = complaint(capsys, "train", "--cfg", "flatten_deit_tiny", "--data", "nowhere")
    assert "flatten_deit_tiny: no recipe is published, this is that of flatten_swin_tiny" in told


def test_training_in_bfloat16_stays_finite(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("train", "--cfg", TINY, "--data", pictures, *ONCE[:-1], 1, "--amp", "bf16", "--out", tmp_path / "run")
    assert np.isfinite(answer(capsys, *command)[0]["loss"])


@pytest.mark.slow
def test_two_processes_share_a_training(pictures: Path, tmp_path: Path) -> None:
    script = tmp_path / "verb.py"
    script.write_text(
        "from leap_flatten.verbs.training import Train\nfrom leap_shared.cli import App\n"
        "App('leap-flatten', 'leap_flatten', (Train,)).main()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    flags = ("train", "--cfg", TINY, "--data", pictures, *ONCE, "--gpus", "2", "--out", tmp_path / "run", "--json")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *map(str, flags)], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)[0]["images"] == 9.0
    assert [row["step"] for row in rows(tmp_path / "run") if row["phase"] == "train"] == [1, 2]
