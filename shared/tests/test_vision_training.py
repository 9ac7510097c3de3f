from __future__ import annotations

import contextlib
import copy
import csv
import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import tyro
from torch import nn

from leap_shared import checkpoints
from leap_shared.errors import UserError
from leap_shared.vision import (
    AugmentationConfig,
    DataConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
    Trainer,
    build_transform,
    evaluate,
    evaluation_loader,
    open_source,
)
from leap_shared.vision.logs import MetricLog
from leap_shared.vision.optimisation import parameter_groups

PLAIN = AugmentationConfig(
    scale=(1.0, 1.0),
    ratio=(1.0, 1.0),
    flip=0.0,
    colour_jitter=0.0,
    auto_augment=None,
    erasing=0.0,
    mixup=0.0,
    cutmix=0.0,
    label_smoothing=0.0,
)
SGD = OptimiserConfig(name="sgd", lr=0.05, base_batch=None, weight_decay=1e-4)


class Small(nn.Module):
    """Two convolutions with dropout; batch normalisation on demand."""

    def __init__(self, num_classes: int = 3, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(8, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


def small(**options: object) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small(**options)


def write_pictures(folder: Path, count: int = 48, name: str = "all.npz") -> str:
    """Noise, in which the label's colour channel is brighter."""
    if (folder / name).exists():
        return str(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(name))
    labels = np.arange(count) % 3
    images = generator.integers(0, 160, (count, 12, 12, 3), dtype=np.uint8)
    images[np.arange(count), :, :, labels] += 90
    np.savez(folder / name, images=images, labels=labels)
    return str(folder / name)


def settings(folder: Path, **changes: object) -> TrainConfig:
    data = DataConfig(write_pictures(folder), image_size=12, crop_fraction=1.0)
    config = TrainConfig(
        data, epochs=2, batch_size=8, augmentation=PLAIN, optimiser=SGD, workers=0, log_updates=2, tensorboard=False
    )
    return replace(config, **changes)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    parts = trainer.learner.models.items()
    return {f"{part}.{name}": value.clone() for part, model in parts for name, value in model.state_dict().items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing


def trained(config: TrainConfig, out: Path, **options: object) -> Trainer:
    trainer = Trainer(config, out, device="cpu", **({"model": small()} | options))
    trainer.train()
    return trainer


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    data = DataConfig(write_pictures(folder, 96), write_pictures(folder, 20, "val.npz"), image_size=12)
    config = settings(
        folder / "other", data=data, epochs=6, optimiser=replace(SGD, lr=0.3, ema_decay=0.9), tensorboard=True
    )
    return trained(config, folder / "out")


def test_a_small_network_learns_the_colours(finished):
    assert finished.metrics["weights"]["top1"] > 90
    assert finished.metrics["weights"]["images"] == 20


def test_csv_and_json_lines_hold_the_same_numbers(finished):
    lines = rows(finished.out)
    with (finished.out / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in lines if row["phase"] == "train"] == list(range(2, 73, 2))
    assert [(row["epoch"], row["weights"]) for row in lines if row["phase"] == "validation"] == [
        (epoch, kind) for epoch in range(1, 7) for kind in ("weights", "ema")
    ]
    for line, row in zip(lines, table, strict=True):
        assert {name: str(value) for name, value in line.items()} == {name: text for name, text in row.items() if text}


def test_tensorboard_reads_the_logged_losses(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.out / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    expected = {row["step"]: row["loss"] for row in rows(finished.out) if row["phase"] == "train"}
    assert losses == pytest.approx(expected, rel=1e-6)
    assert "validation/ema/top1" in events.Tags()["scalars"]


def test_tensorboard_passes_over_what_a_killed_run_logged_too_far(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop in ((0, 5), (3, 7)):
        log = MetricLog(tmp_path, start)
        for step in range(start + 1, stop + 1):
            log.write({"step": step, "phase": "train", "loss": start + 0.5})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(step, 0.5 if step <= 3 else 3.5) for step in range(1, 8)]


@pytest.mark.parametrize("full", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_while_logging_is_one_line_and_spoils_no_row(tmp_path, full):
    log, written = MetricLog(tmp_path, tensorboard=full == "tensorboard"), []

    def write_rows():
        for step in range(1000):
            log.write({"step": step, "phase": "t", "loss": 0.5})
            written.append(step)

    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"^cannot write .*{full}: File too large\. Free some space") as refused:
            write_rows()
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(refused.value)
    with (tmp_path / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert len(written) > 10
    assert steps[: len(written)] == written


def test_a_log_that_cannot_be_written_stops_the_run_with_its_checkpoints_kept(tmp_path, monkeypatch):
    log_row = MetricLog.write

    def full(self, row):
        if row["step"] > 4:
            raise UserError("cannot write metrics.jsonl")
        log_row(self, row)

    monkeypatch.setattr(MetricLog, "write", full)
    with pytest.raises(UserError, match="cannot write"):
        trained(settings(tmp_path, save_updates=2), tmp_path / "out")
    good = Trainer(settings(tmp_path, save_updates=2), tmp_path / "out", device="cpu", model=small())
    assert good.checkpoints.restore({"trainer": good}) == 4


def test_the_written_weights_score_what_the_log_says(finished):
    config = finished.config
    loader = evaluation_loader(open_source(config.data.validation), build_transform(config.data), batch_size=7)
    for name in ("weights", "ema"):
        model = Small()
        checkpoints.load_into(model, checkpoints.read(finished.out / f"{name}.safetensors"))
        scores = evaluate(model, loader)
        assert scores["top1"] == finished.metrics[name]["top1"]
        assert scores["loss"] == pytest.approx(finished.metrics[name]["loss"], rel=1e-5)
    best = max(row["top1"] for row in rows(finished.out) if row["phase"] == "validation")
    model = Small()
    checkpoints.load_into(model, checkpoints.read(finished.out / "best.safetensors"))
    assert evaluate(model, loader)["top1"] == best


def test_accumulation_gives_the_gradients_of_the_large_batch(tmp_path):
    """Only the order of float32 additions differs: a few parts in 1e6 after ten updates of SGD."""
    large = trained(settings(tmp_path, batch_size=8), tmp_path / "large")
    parts = trained(settings(tmp_path, batch_size=2, accumulation=4), tmp_path / "parts")
    start = small().state_dict()
    for name, value in parts.model.state_dict().items():
        torch.testing.assert_close(value, large.model.state_dict()[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(value, start[name], rtol=1e-3, atol=1e-4)


class Stopped(Exception):  # noqa: N818 - stands for a kill, not for an error
    pass


RICH = {
    "augmentation": AugmentationConfig(),
    "optimiser": OptimiserConfig(lr=0.01, base_batch=8, ema_decay=0.9, clip_norm=1.0),
    "schedule": ScheduleConfig(warmup_epochs=0.5),
    "batch_size": 4,
    "accumulation": 2,
    "save_updates": 2,
}


def rich(folder: Path, **changes: object) -> TrainConfig:
    config = settings(folder, **RICH)
    data = replace(config.data, validation=write_pictures(folder, 9, "val.npz"))
    return replace(config, data=data, **changes)


def rich_model() -> Small:
    return small(dropout=0.3, norm=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return trained(rich(folder), folder / "out", model=rich_model())


@pytest.mark.parametrize("call", [1, 6, 11, 13, 23])
def test_a_run_stopped_in_any_update_goes_on_to_the_same_bits(call, uninterrupted, tmp_path):
    calls = iter(range(1, 1000))

    def stop(model, images, targets):
        if next(calls) == call:
            raise Stopped
        return uninterrupted.learner.loss_fn(model, images, targets)

    with pytest.raises(Stopped):
        trained(rich(tmp_path), tmp_path / "out", model=rich_model(), loss_fn=stop)
    torch.manual_seed(call)
    resumed = trained(rich(tmp_path), tmp_path / "out", model=rich_model())
    assert_same_bits(weights(resumed), weights(uninterrupted))
    logged, expected = (
        [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows(trainer.out)]
        for trainer in (resumed, uninterrupted)
    )
    assert logged == expected


def test_a_finished_run_starts_again_without_changing_anything(uninterrupted):
    before = (uninterrupted.out / "metrics.jsonl").read_text()
    again = Trainer(uninterrupted.config, uninterrupted.out, device="cpu", model=small(dropout=0.3, norm=True))
    assert again.train() == uninterrupted.metrics
    assert_same_bits(weights(again), weights(uninterrupted))
    assert (uninterrupted.out / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_killed_process_with_workers_goes_on_to_the_same_bits(uninterrupted, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name.split("-")[1] for path in (tmp_path / "out" / "checkpoints").glob("step*")]
    resumed = trained(rich(tmp_path, workers=1), tmp_path / "out", model=rich_model())
    assert_same_bits(weights(resumed), weights(uninterrupted))


def run_and_die(folder: Path) -> None:
    """What the process of the test above does: workers on, killed in the fifth update."""
    torch.set_num_threads(1)
    calls = iter(range(1000))

    def die(model, images, targets):
        if next(calls) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return trainer.learner.mixup and nn.functional.cross_entropy(model(images), targets)

    trainer = Trainer(rich(folder, workers=2), folder / "out", device="cpu", model=rich_model(), loss_fn=die)
    trainer.train()


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step_and_keeps_the_last_checkpoint(tmp_path):
    calls = iter(range(1, 1000))

    def diverge(model, images, targets):
        return model(images).sum() * (float("nan") if next(calls) == 5 else 1e-3)

    config = settings(tmp_path, save_updates=2)
    with pytest.raises(UserError, match=r"nan at step 5, the last good checkpoint is .*step-0*4-"):
        trained(config, tmp_path / "out", loss_fn=diverge)
    good = Trainer(config, tmp_path / "out", device="cpu", model=small())
    assert good.checkpoints.restore({"trainer": good}) == 4
    assert all(value.isfinite().all() for value in good.model.state_dict().values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    calls = iter(range(1, 1000))

    def loss(model, images, targets):
        extra = (model(images).sum() * 0).abs().sqrt() if next(calls) == 4 else 0
        return model(images).square().mean() + extra

    with pytest.raises(
        UserError, match=r"trainer\.\S+ is not finite at step 4, the last good checkpoint is .*step-0*2-"
    ):
        trained(settings(tmp_path, save_updates=2), tmp_path / "out", loss_fn=loss)


def test_bfloat16_computes_in_bfloat16_and_stays_near_float32(tmp_path):
    seen = []

    def loss(model, images, targets):
        logits = model(images)
        seen.append(logits.dtype)
        return nn.functional.cross_entropy(logits, targets)

    coarse = trained(settings(tmp_path, amp="bf16"), tmp_path / "bf16", loss_fn=loss)
    exact = trained(settings(tmp_path), tmp_path / "float32")
    assert set(seen) == {torch.bfloat16}
    assert coarse.model.head[2].weight.dtype == torch.float32
    for name, value in coarse.model.state_dict().items():
        torch.testing.assert_close(value, exact.model.state_dict()[name], rtol=0.02, atol=0.02)


def test_several_losses_are_logged_by_name(tmp_path):
    def losses(model, images, targets):
        entropy = nn.functional.cross_entropy(model(images), targets)
        return {"loss": 2 * entropy, "entropy": entropy}

    trained(settings(tmp_path), tmp_path / "out", loss_fn=losses)
    for row in rows(tmp_path / "out"):
        assert row["loss"] == pytest.approx(2 * row["entropy"])


def rates(folder: Path, **changes: object) -> list[float]:
    """The learning rate that each update really used."""
    found = []

    def loss(model, images, targets):
        found.append(trainer.learner.optimiser.param_groups[0]["lr"])
        return model(images).sum() * 0

    trainer = Trainer(settings(folder, **changes), folder / "out", device="cpu", model=small(), loss_fn=loss)
    trainer.train()
    return found


def cosine(base: float, low: float, time: float) -> float:
    return low + (base - low) * (1 + math.cos(math.pi * time)) / 2


def test_cosine_per_update_with_warm_up_inside_its_clock_and_linear_scaling(tmp_path):
    schedule = ScheduleConfig(warmup_epochs=0.5, warmup_lr=0.1, min_lr=0.2)
    found = rates(tmp_path, optimiser=OptimiserConfig(name="sgd", lr=1.0, base_batch=16), schedule=schedule)
    warmup = [0.05 + time / 3 * 0.45 for time in range(3)]
    assert found == pytest.approx(warmup + [cosine(0.5, 0.1, time / 12) for time in range(3, 12)])


def test_cosine_per_epoch_with_warm_up_before_it_and_cool_down_after_it(tmp_path):
    schedule = ScheduleConfig(per="epoch", warmup_epochs=1.0, warmup_prefix=True, cooldown_epochs=1, min_lr=0.01)
    found = rates(tmp_path, schedule=schedule)
    assert found == pytest.approx([0.0] * 6 + [0.05] * 6 + [cosine(0.05, 0.01, 0.5)] * 6 + [0.01] * 6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleConfig(kind="constant"), [0.05] * 12),
        (ScheduleConfig(kind="linear"), [0.05 * (1 - time / 12) for time in range(12)]),
        (ScheduleConfig(kind="step", decay_epochs=(1,)), [0.05] * 6 + [0.005] * 6),
        (ScheduleConfig(kind="multistep", decay_epochs=(1,), decay_rate=0.5), [0.05] * 6 + [0.025] * 6),
        (ScheduleConfig(lag_updates=1), [cosine(0.05, 0, max(time - 1, 0) / 12) for time in range(12)]),
    ],
)
def test_schedules_follow_their_formula(schedule, expected, tmp_path):
    assert rates(tmp_path, schedule=schedule) == pytest.approx(expected)


def test_a_number_of_updates_takes_the_place_of_epochs(tmp_path):
    found = rates(tmp_path, epochs=1, updates=8)
    assert found == pytest.approx([cosine(0.05, 0, time / 8) for time in range(8)])


def test_a_users_rate_is_used_and_scaled_by_layer(tmp_path):
    found = []

    def loss(model, images, targets):
        found.append([group["lr"] for group in trainer.learner.optimiser.param_groups])
        return model(images).sum() * 0

    trainer = Trainer(
        settings(tmp_path, epochs=1),
        tmp_path / "out",
        device="cpu",
        model=small(),
        loss_fn=loss,
        groups=lambda model: [
            {"params": model.body.parameters(), "lr_scale": 0.5},
            {"params": model.head.parameters()},
        ],
        learning_rate=lambda trainer: trainer.update + trainer.done / trainer.updates,
    )
    trainer.train()
    assert found == [pytest.approx([0.5 * rate, rate]) for rate in (time + time / 6 for time in range(6))]


def test_no_decay_is_taken_from_the_model_the_patterns_and_the_shapes():
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    groups = parameter_groups(model, OptimiserConfig(no_decay=("head.*", "blocks.*.mlp.fc1.weight")))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared = {names[id(value)] for group in groups if not group["weight_decay"] for value in group["params"]}
    decayed = {names[id(value)] for group in groups if group["weight_decay"] for value in group["params"]}
    assert {"pos_embed", "head.weight", "blocks.0.mlp.fc1.weight", "norm.weight", "blocks.0.attn.qkv.bias"} <= spared
    assert {"blocks.0.mlp.fc2.weight", "patch_embed.proj.weight"} <= decayed
    assert spared | decayed == set(names.values())


def test_layer_decay_lowers_the_rate_of_early_layers(tmp_path):
    config = settings(
        tmp_path,
        model="test_vit",
        model_options={"img_size": 32},
        data=DataConfig(write_pictures(tmp_path), image_size=32),
        optimiser=replace(SGD, layer_decay=0.5),
    )
    trainer = Trainer(config, tmp_path / "out", device="cpu")
    trainer.schedule.set(0, 0, 6)
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    groups = trainer.learner.optimiser.param_groups
    lr = {names[id(value)]: group["lr"] for group in groups for value in group["params"]}
    assert lr["head.weight"] == pytest.approx(0.05)
    assert lr["blocks.1.mlp.fc1.weight"] == pytest.approx(2 * lr["blocks.0.mlp.fc1.weight"])


def test_clipping_bounds_the_step(tmp_path):
    config = settings(tmp_path, optimiser=OptimiserConfig(name="momentum", lr=1.0, base_batch=None, clip_norm=0.5))
    config = replace(config, updates=1, optimiser=replace(config.optimiser, weight_decay=0.0))
    after = trained(config, tmp_path / "out", loss_fn=lambda model, images, targets: 1e4 * model(images).sum()).model
    moved = [new - old for new, old in zip(after.parameters(), small().parameters(), strict=True)]
    assert torch.stack([step.norm() for step in moved]).norm().item() == pytest.approx(0.5, rel=1e-4)


def staged(stop_at: int | None, folder: Path) -> Trainer:
    """Epoch by epoch: other batches, another transform and another width of the network."""
    calls = iter(range(1000))

    def enter(epoch, trainer):
        trainer.batch_size, trainer.accumulation = (8, 1) if epoch == 0 else (4, 3)
        size = (8, 12, 12)[epoch]
        trainer.train_transform = build_transform(replace(trainer.config.data, image_size=size), PLAIN)
        trainer.learner.mixup = None

    def loss(model, images, targets):
        sizes.append(tuple(images.shape))
        if next(calls) == stop_at:
            raise Stopped
        return nn.functional.cross_entropy(model(images), targets)

    sizes: list[tuple[int, ...]] = []
    trainer = Trainer(
        settings(folder, epochs=3, save_updates=1),
        folder / "out",
        device="cpu",
        model=small(),
        loss_fn=loss,
        on_epoch_start=enter,
    )
    try:
        trainer.train()
    except Stopped:
        return staged(None, folder)
    assert stop_at is None
    assert sizes[-1] == (4, 3, 12, 12)
    return trainer


def test_stages_change_batches_and_sizes_and_resume_to_the_same_bits(tmp_path):
    whole = staged(None, tmp_path / "whole")
    assert whole.update == 6 + 4 + 4
    for stop_at in (6, 13):
        assert_same_bits(weights(staged(stop_at, tmp_path / f"{stop_at}")), weights(whole))


class Tally:
    """Something with a state that a run keeps."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def streamed(folder: Path, updates: int | None = None) -> tuple[Trainer, Tally, list[tuple[int, int]]]:
    """Epochs of other lengths, whose batches come from elsewhere."""
    tally, asked = Tally(), []

    def stream(trainer):
        asked.append((trainer.epoch, trainer.done))
        for number in range(trainer.done, trainer.lengths[trainer.epoch]):
            if tally.count == updates:
                raise Stopped
            tally.count += 1
            generator = torch.Generator().manual_seed(10 * trainer.epoch + number)
            yield torch.rand(4, 3, 8, 8, generator=generator), torch.arange(4) % 3

    trainer = Trainer(
        settings(folder, epochs=50, save_updates=1),
        folder / "out",
        device="cpu",
        model=small(dropout=0.5),
        lengths=(3, 1, 4),
        stream=stream,
        parts={"tally": tally},
    )
    with contextlib.suppress(Stopped):
        trainer.train()
    return trainer, tally, asked


def test_batches_may_come_from_elsewhere_in_epochs_of_any_length(tmp_path):
    trainer, tally, asked = streamed(tmp_path)
    assert (trainer.update, tally.count, asked) == (8, 8, [(0, 0), (1, 0), (2, 0)])


def test_a_stream_goes_on_where_it_was_and_parts_keep_their_state(tmp_path):
    whole, _, _ = streamed(tmp_path / "whole")
    streamed(tmp_path / "killed", updates=6)
    again, tally, asked = streamed(tmp_path / "killed")
    assert asked == [(2, 2)]
    assert tally.count == 8
    assert_same_bits(weights(again), weights(whole))


def test_another_model_may_validate_in_place_of_the_one_that_learns(tmp_path):
    config = settings(tmp_path, epochs=1)
    config = replace(config, data=replace(config.data, validation=config.data.train))

    def shifted(model):
        twin = copy.deepcopy(model)
        twin.head[2].bias.data[1] += 1e4
        return twin

    trainer = Trainer(config, tmp_path / "out", device="cpu", model=small(), for_validation=shifted)
    trainer.train()
    ones = sum(label == 1 for _, label in trainer.validation_data) / len(trainer.validation_data)
    assert trainer.metrics["weights"]["top1"] == pytest.approx(100 * ones)


def test_progress_is_reported_to_the_end(tmp_path):
    class Bar:
        done = 0

        def advance(self, n: int = 1, *, text: str | None = None) -> None:
            self.done += n

    class Person:
        bar, lines = Bar(), []

        def progress(self, *, description: str, total: int | None = None) -> Bar:
            self.total = total
            return self.bar

        def log(self, text: str) -> None:
            self.lines.append(text)

    person = Person()
    config = rich(tmp_path)
    trained(config, tmp_path / "out", model=rich_model(), reporter=person)
    assert person.bar.done == person.total == 12
    assert len(person.lines) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed is 1, was 0"),
        ({"optimiser": replace(SGD, lr=0.1)}, "'lr': 0.1.*'lr': 0.05"),
        ({"batch_size": 4}, "global batch is 4, was 8"),
    ],
)
def test_a_run_does_not_go_on_under_other_settings(changes, words, tmp_path):
    trained(settings(tmp_path, epochs=1), tmp_path / "out")
    with pytest.raises(UserError, match=words):
        trained(settings(tmp_path, **{"epochs": 1, **changes}), tmp_path / "out")


def test_a_run_goes_on_with_moved_data_and_another_split_of_the_batch(tmp_path):
    trained(settings(tmp_path), tmp_path / "out")
    trained(settings(tmp_path / "moved", batch_size=4, accumulation=2), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "swin_tiny_patch4_window7_225"}, "did you mean .*swin_tiny_patch4_window7_224"),
        ({"model": "test_vit", "model_options": {"no_such": 1}}, "test_vit does not take"),
        ({"optimiser": replace(SGD, name="adamww")}, "did you mean .*adamw"),
        ({"optimiser": replace(SGD, betas=(0.9, 0.99))}, "sgd takes no betas"),
        ({"batch_size": 50}, "batch_size 50 .* more than the 48 training pictures"),
        ({"amp": "fp16"}, "fp16 needs CUDA"),
        ({"model": "test_vit", "model_options": {"img_size": 12, "num_classes": 2}}, "3 classes.*the model 2 outputs"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_starts(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        Trainer(settings(tmp_path, **{"model": "test_vit", **changes}), tmp_path / "out", device="cpu")


def test_fewer_classes_than_the_pictures_have_are_refused(tmp_path):
    config = settings(tmp_path)
    with pytest.raises(UserError, match="3 classes, num_classes 2"):
        Trainer(
            replace(config, data=replace(config.data, num_classes=2)), tmp_path / "out", device="cpu", model=small()
        )


def test_validation_with_other_classes_is_refused(tmp_path):
    for split, names in (("train", "ab"), ("val", "bc")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").touch()
    data = DataConfig(str(tmp_path / "train"), str(tmp_path / "val"))
    with pytest.raises(UserError, match=r"differ in their classes .*'a', 'c'"):
        Trainer(settings(tmp_path, data=data), tmp_path / "out", device="cpu", model=small())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 5, "augmentation": AugmentationConfig()}, "even number"),
        ({"workers": -1}, "workers=-1"),
        ({"updates": 5, "schedule": ScheduleConfig(cooldown_epochs=1)}, "updates goes with"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        settings(tmp_path, **changes)


def test_the_command_line_can_set_every_field():
    flags = "--data.train x --model-options depth 3 pool avg --optimiser.lr 0.1 --optimiser.no-decay a b.*"
    flags += " --schedule.kind step --updates 7 --augmentation.auto-augment None"
    config = tyro.cli(TrainConfig, args=shlex.split(flags))
    assert config.model_options == {"depth": 3, "pool": "avg"}
    assert (config.optimiser.no_decay, config.schedule.kind, config.updates) == (("a", "b.*"), "step", 7)
    assert asdict(config)["augmentation"]["auto_augment"] is None


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_and_resumes_on_cuda(amp, tmp_path):
    config = rich(tmp_path, amp=amp)
    Trainer(replace(config, save_updates=None), tmp_path / "out", device="cuda", model=rich_model()).train()
    resumed = Trainer(config, tmp_path / "out", device="cuda", model=rich_model())
    assert math.isfinite(resumed.train()["ema"]["loss"])
    assert resumed.update == 12


if __name__ == "__main__":
    run_and_die(Path(sys.argv[1]))
