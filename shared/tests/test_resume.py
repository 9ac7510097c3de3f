"""A run that was killed, at any moment, ends with the bits of the run that was left alone."""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import logging
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from leap_shared import files
from leap_shared.checkpoints import CheckpointFolder, check_finite
from leap_shared.errors import UserError

STEPS, SAVE_EVERY, KILLS = 600, 3, 20
PROCESSES = multiprocessing.get_context("forkserver")  # imports torch once, then forks in milliseconds
PROCESSES.set_forkserver_preload(["numpy", "pytest", "torch._dynamo", "leap_shared.checkpoints"])


class Shuffled:
    """Sampler over 64 rows, shuffled anew each pass; its position is part of the state."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.order = torch.randperm(64, generator=self.generator)
        self.position = 0

    def next_batch(self) -> torch.Tensor:
        if self.position == 64:
            self.order, self.position = torch.randperm(64, generator=self.generator), 0
        self.position += 16
        return self.order[self.position - 16 : self.position]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.order, self.position = state["order"], state["position"]


def train(folder: Path, reached: Any) -> str:
    """Run to the end from wherever the newest checkpoint stands; digest of weights, averages and history of steps."""
    torch.manual_seed(0)
    random.seed(0)
    data, targets = torch.randn(64, 8), torch.randn(64, 1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 1))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    sampler, noise, total = Shuffled(), np.random.default_rng(5), torch.zeros((), dtype=torch.float64)
    objects: dict[str, Any] = {
        "model": model,
        "average": average,
        "optimiser": optimiser,
        "schedule": schedule,
        "scaler": torch.amp.GradScaler("cpu"),
        "sampler": sampler,
        "noise": noise,
        "total": total,
        "history": 0,
    }
    store = CheckpointFolder(folder)
    for step in range(store.restore(objects) or 0, STEPS):
        reached.value = step
        rows = sampler.next_batch()
        jitter = noise.normal(size=(16, 8)).astype(np.float32) * random.random() * float(torch.rand(()))
        loss = nn.functional.mse_loss(model(data[rows] + torch.from_numpy(jitter)), targets[rows])
        check_finite(loss, step, store)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        average.update_parameters(model)
        total += loss.detach()
        objects["history"] = (objects["history"] * 31 + step) % 1_000_003
        if (step + 1) % SAVE_EVERY == 0:
            store.save(step + 1, objects)
    digest = hashlib.sha256()
    for value in (*model.state_dict().values(), *average.state_dict().values(), total):
        digest.update(value.numpy().tobytes())
    return f"{digest.hexdigest()} {objects['history']}"


def train_in_child(folder: Path, reached: Any, to_be_killed: bool) -> None:
    torch.set_num_threads(1)
    result = train(folder, reached)
    if not to_be_killed:
        files.write_text(folder / "result", result)
    while to_be_killed:  # a kill that comes late still finds its process
        time.sleep(1)


def run_to_the_end(folder: Path) -> str:
    reached = PROCESSES.Value("q", -1)
    child = PROCESSES.Process(target=train_in_child, args=(folder, reached, False))
    child.start()
    child.join()
    assert child.exitcode == 0
    return (folder / "result").read_text()


def run_until_killed(folder: Path, step: int, delay: float | None) -> None:
    """Kill a training `delay` seconds after it reached `step`, or with None once a half-written file is seen."""
    reached = PROCESSES.Value("q", -1)
    child = PROCESSES.Process(target=train_in_child, args=(folder, reached, True))
    child.start()
    while child.is_alive() and reached.value < step:
        time.sleep(0.0005)
    if delay is not None:
        time.sleep(delay)
    while delay is None and child.is_alive() and reached.value < STEPS - 1 and not leftovers(folder):
        pass
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(files.TEMPORARY_SUFFIX)]  # noqa: PTH208 - fast enough


@pytest.mark.slow
def test_training_killed_at_20_random_moments_loses_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("LEAP_KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"repeat with LEAP_KILL_SEED={seed}")
    moments = random.Random(seed)
    alone, killed = (files.ensure_folder(tmp_path / name) for name in ("alone", "killed"))
    half_written = 0
    for step in sorted(moments.randrange(STEPS * 9 // 10) for _ in range(KILLS)):
        run_until_killed(killed, step, moments.choice([None, moments.uniform(0, 0.02)]))
        half_written += len(leftovers(killed))
    latest = CheckpointFolder(killed).latest()
    assert latest is not None
    print(f"{half_written} files were half-written; the last run starts from {latest.name}")
    assert run_to_the_end(killed) == run_to_the_end(alone)
    assert not leftovers(killed)


def save_and_die(folder: Path, moment: str) -> None:
    """Save step 1, then be killed in saving step 2, at the call that `moment` names."""
    store = CheckpointFolder(folder, keep=1)
    store.save(1, {"weights": torch.ones(1000)})
    setattr(os if moment == "fsync" else Path, moment, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    store.save(2, {"weights": torch.ones(1000) * 2})


# Before the new file is whole on disk, before it gets its name, and before what came before it is swept away.
@pytest.mark.parametrize(("moment", "survivor"), [("fsync", 1), ("replace", 1), ("unlink", 2)])
def test_kill_inside_the_writer_leaves_a_whole_checkpoint(tmp_path: Path, moment: str, survivor: int) -> None:
    child = PROCESSES.Process(target=save_and_die, args=(tmp_path, moment))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(leftovers(tmp_path)) == (survivor == 1)
    objects: dict[str, Any] = {"weights": torch.zeros(1000)}
    store = CheckpointFolder(tmp_path, keep=1)
    assert store.restore(objects) == survivor
    assert objects["weights"].eq(survivor).all()
    store.save(3, objects)
    assert sorted(path.name[:17] for path in tmp_path.iterdir()) == [".lock", "step-000000000003"]


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Let the kernel fail every write beyond `size` bytes of a file, in the middle, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_disk_full_in_the_middle_of_a_checkpoint_keeps_the_one_before(tmp_path: Path) -> None:
    store = CheckpointFolder(tmp_path)
    kept = store.save(1, {"weights": torch.arange(4.0)})
    with no_file_above(10_000), pytest.raises(UserError, match=r"cannot write .*step-0+2.*: File too large") as refused:
        store.save(2, {"weights": torch.zeros(100_000)})
    assert "\n" not in str(refused.value)
    assert store.latest() == kept
    assert not leftovers(tmp_path)
    assert store.save(2, {"weights": torch.zeros(4)}) == store.latest()


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_disk_that_fails_while_saving_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    store = CheckpointFolder(tmp_path)
    kept = store.save(1, {"weights": torch.arange(4.0)})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[moment], full)
        with pytest.raises(UserError, match="No space left"):
            store.save(2, {"weights": torch.zeros(4)})
    objects: dict[str, Any] = {"weights": torch.zeros(4)}
    assert store.restore(objects) == 1
    assert store.latest() == kept
    assert torch.equal(objects["weights"], torch.arange(4.0))
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_weights_that_are_not_finite_are_refused_and_the_checkpoint_before_stays(
    tmp_path: Path, bad: float, dtype: torch.dtype
) -> None:
    store = CheckpointFolder(tmp_path)
    model = nn.Sequential(nn.Linear(2, 2, dtype=dtype))
    objects: dict[str, Any] = {"model": model, "averages": [torch.zeros(2)]}
    with torch.no_grad():
        model[0].bias[1] = bad
    with pytest.raises(UserError, match=r"^model\.0\.bias is not finite at step 1, no checkpoint was saved before it"):
        store.save(1, objects)
    with torch.no_grad():
        model[0].bias[1] = 0
    kept = store.save(1, objects)
    objects["averages"][0][0] = bad
    with pytest.raises(UserError, match=rf"^averages\[0\] is not finite at step 2, .* is .*{kept.name}"):
        store.save(2, objects)
    assert store.latest() == kept


def test_eight_bit_weights_are_judged_too(tmp_path: Path) -> None:
    store = CheckpointFolder(tmp_path)
    store.save(1, {"x": torch.ones(2).to(torch.float8_e5m2)})
    with pytest.raises(UserError, match="x is not finite"):
        store.save(2, {"x": torch.tensor([1, float("inf")]).to(torch.float8_e5m2)})


def test_arrays_and_numbers_need_not_be_finite(tmp_path: Path) -> None:
    objects: dict[str, Any] = {"scores": np.array([1.0, np.nan]), "best": -float("inf")}
    store = CheckpointFolder(tmp_path)
    store.save(1, objects)
    store.restore(objects)
    assert objects["best"] == -float("inf")
    assert np.isnan(objects["scores"][1])


def test_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointFolder(tmp_path)
    store.save(1, {"x": torch.ones(1000)})
    newest = store.save(2, {"x": torch.ones(1000) * 2})
    for damage in (lambda data: data[: len(data) // 2], lambda data: data[:900] + b"\x01" + data[901:]):
        newest.write_bytes(damage(newest.read_bytes()))
        objects: dict[str, Any] = {"x": torch.zeros(1000)}
        with caplog.at_level(logging.WARNING):
            assert store.restore(objects) == 1
        assert "damaged" in caplog.text
        assert objects["x"].eq(1).all()


def test_damaged_checkpoint_makes_room_for_the_run_that_went_back(tmp_path: Path) -> None:
    store = CheckpointFolder(tmp_path)
    store.save(1, {})
    store.save(5, {}).write_bytes(b"damaged")
    assert store.restore({}) == 1
    newest = store.save(2, {})
    assert store.latest() == newest
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("step-*")) == [1, 2]


def test_run_that_forgot_to_restore_cannot_hide_behind_later_checkpoints(tmp_path: Path) -> None:
    kept = CheckpointFolder(tmp_path).save(100, {})
    with pytest.raises(UserError, match=r"later than step 1: restore it first"):
        CheckpointFolder(tmp_path).save(1, {})
    assert CheckpointFolder(tmp_path).latest() == kept


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointFolder(tmp_path, keep=3)
    for step in range(1, 8):
        store.save(step, {"step": step})
    assert sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("step-*")) == [5, 6, 7]


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    objects: dict[str, Any] = {"torch": torch.Generator().manual_seed(3), "numpy": np.random.default_rng(3)}
    store = CheckpointFolder(tmp_path)

    def draws() -> list[float]:
        legacy = np.random.random()  # noqa: NPY002 - the global generator is part of the promise
        own = [float(torch.rand((), generator=objects["torch"])), float(objects["numpy"].random())]
        return [random.random(), float(legacy), float(torch.rand(())), *own]

    store.save(1, objects)
    store.restore(objects)
    wanted = draws()
    assert draws() != wanted
    assert store.restore(objects) == 1
    assert draws() == wanted


def test_plain_values_and_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    values = {"a": [1, (2.5, None)], 3: "x", "n": np.arange(3, dtype=np.uint32), "b": True, "f": np.float64(0.1)}
    objects: dict[str, Any] = {"values": values}
    store = CheckpointFolder(tmp_path)
    store.save(1, objects)
    objects = {"values": None}
    store.restore(objects)
    back = objects["values"]
    assert back["a"] == [1, (2.5, None)]
    assert back[3] == "x"
    assert back["n"].dtype == np.uint32
    assert back["n"].tolist() == [0, 1, 2]
    assert back["b"] is True
    assert back["f"] == 0.1


def test_named_tuples_and_counters_come_back_as_plain_data(tmp_path: Path) -> None:
    pair = collections.namedtuple("pair", "a b")  # noqa: PYI024 - a class made on the spot
    objects: dict[str, Any] = {"pair": pair(1, [2]), "counter": collections.Counter("aab")}
    store = CheckpointFolder(tmp_path)
    store.save(1, objects)
    store.restore(objects)
    assert objects == {"pair": (1, [2]), "counter": {"a": 2, "b": 1}}


@pytest.mark.parametrize(
    ("value", "complaint"),
    [({"f": train}, r"state\.f is a function"), ([np.array([{}], dtype=object)], r"state\[0\] is a ndarray")],
)
def test_object_that_cannot_be_saved_is_named(tmp_path: Path, value: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        CheckpointFolder(tmp_path).save(1, {"state": value})
    assert not list(tmp_path.glob("*step*"))


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one cycle": lambda optimiser: torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.0, total_steps=20),
    "milestones": lambda optimiser: torch.optim.lr_scheduler.MultiStepLR(optimiser, [3, 5, 5]),
    "plateau": lambda optimiser: torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, patience=1),
    "sequence": lambda optimiser: torch.optim.lr_scheduler.SequentialLR(
        optimiser,
        [
            torch.optim.lr_scheduler.ConstantLR(optimiser, 0.1, 3),
            torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5),
        ],
        [3],
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch 2.6 warns of its own SequentialLR
def test_learning_rates_go_on_where_they_were(tmp_path: Path, kind: str) -> None:
    def make() -> dict[str, Any]:
        optimiser = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5, momentum=0.9)
        return {"optimiser": optimiser, "schedule": SCHEDULES[kind](optimiser)}

    def rates(objects: dict[str, Any], steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            objects["optimiser"].step()
            objects["schedule"].step(*([1.0] if kind == "plateau" else []))
            found.append(objects["optimiser"].param_groups[0]["lr"])
        return found

    first = make()
    rates(first, 4)
    store = CheckpointFolder(tmp_path)
    store.save(4, first)
    second = make()
    assert store.restore(second) == 4
    assert rates(second, 6) == rates(first, 6)


def test_checkpoint_is_plain_data_for_torch(tmp_path: Path) -> None:
    objects = {"model": nn.Linear(2, 2), "noise": np.random.default_rng(0), "values": {"a": (1, "b")}}
    path = CheckpointFolder(tmp_path).save(7, objects)
    assert torch.load(path, weights_only=True)["step"] == 7


def test_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    store = CheckpointFolder(tmp_path)
    store.save(1, {"model": nn.Linear(3, 2)})
    with pytest.raises(UserError, match="differ in ema"):
        store.restore({"model": nn.Linear(3, 2), "ema": None})
    with pytest.raises(UserError, match=r"model in .* does not fit"):
        store.restore({"model": nn.Linear(4, 2)})
    tensors = CheckpointFolder(tmp_path / "tensors")
    tensors.save(1, {"x": torch.ones(1)})
    for other in (torch.ones(4), torch.ones(1, dtype=torch.float64)):
        with pytest.raises(UserError, match=r"x in .* does not fit.*expected torch\.float"):
            tensors.restore({"x": other})
    with pytest.raises(UserError, match=r"x in .* does not fit"):
        tensors.restore({"x": np.random.default_rng(0)})


def test_empty_folder_restores_nothing(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "absent").restore({}) is None


def hold(folder: Path, ready: Any, done: Any) -> None:
    CheckpointFolder(folder).save(1, {})
    ready.set()
    done.wait(30)


def test_two_runs_cannot_save_into_one_folder(tmp_path: Path) -> None:
    ready, done = PROCESSES.Event(), PROCESSES.Event()
    other = PROCESSES.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(UserError, match="another run saves"):
            CheckpointFolder(tmp_path).save(2, {})
    finally:
        done.set()
        other.join()
    CheckpointFolder(tmp_path).save(2, {})


def test_folder_that_cannot_be_locked_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", no_locks)
    CheckpointFolder(tmp_path).save(1, {})
    assert "cannot be locked" in caplog.text


@pytest.mark.gpu
def test_generators_of_the_gpu_go_on_where_they_were(tmp_path: Path) -> None:
    objects: dict[str, Any] = {"own": torch.Generator("cuda").manual_seed(3)}

    def draws() -> list[float]:
        return [float(torch.rand((), device="cuda", generator=g)) for g in (None, objects["own"])]

    store = CheckpointFolder(tmp_path)
    store.save(1, objects)
    wanted = draws()
    assert draws() != wanted
    store.restore(objects)
    assert draws() == wanted


def test_finite_loss_that_carries_a_graph_passes() -> None:
    check_finite(torch.ones((), requires_grad=True) * 2, 1)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_nan_loss_stops_with_the_step_and_the_last_good_checkpoint(tmp_path: Path, loss: float | torch.Tensor) -> None:
    store = CheckpointFolder(tmp_path)
    check_finite(0.5, 6, store)
    with pytest.raises(UserError, match="at step 7, no checkpoint"):
        check_finite(loss, 7, store)
    kept = store.save(5, {})
    with pytest.raises(UserError, match=f"at step 7, the last good checkpoint is .*{kept.name}"):
        check_finite(loss, 7, store)
    assert store.latest() == kept
