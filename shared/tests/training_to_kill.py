"""A small real training for test_resume: python training_to_kill.py OUT KILLS SEED; prints the digest of the weights.

The process imports torch once and forks one child per attempt, so that each attempt costs milliseconds.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from leap_shared.checkpoints import CheckpointFolder

STEPS, SAVE_EVERY = 2000, 5


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


def train(folder: Path, steps: int = STEPS) -> str:
    """Run to `steps`, from wherever the folder's newest checkpoint stands; digest of weights and history."""
    torch.manual_seed(0)
    random.seed(0)
    data, targets = torch.randn(64, 8), torch.randn(64, 1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 1))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    objects: dict[str, Any] = {
        "model": model,
        "average": average,
        "optimiser": optimiser,
        "schedule": schedule,
        "scaler": torch.amp.GradScaler("cpu"),
        "sampler": Shuffled(),
        "noise": np.random.default_rng(5),
        "total": torch.zeros((), dtype=torch.float64),
        "history": 0,
    }
    store = CheckpointFolder(folder)
    for step in range(store.restore(objects) or 0, steps):
        rows = objects["sampler"].next_batch()
        jitter = objects["noise"].normal(size=(16, 8)).astype(np.float32) * random.random() * float(torch.rand(()))
        loss = nn.functional.mse_loss(model(data[rows] + torch.from_numpy(jitter)), targets[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        average.update_parameters(model)
        objects["total"] += loss.detach()
        objects["history"] = (objects["history"] * 31 + step) % 1_000_003
        if (step + 1) % SAVE_EVERY == 0:
            store.save(step + 1, objects)
    digest = hashlib.sha256()
    for value in (*model.state_dict().values(), *average.state_dict().values(), objects["total"]):
        digest.update(value.numpy().tobytes())
    return f"{digest.hexdigest()} {objects['history']}"


def attempt(folder: Path, seconds: float | None) -> bool:
    """Train in a child; kill it after `seconds`. Whether the kill came in time."""
    child = os.fork()
    if child == 0:
        text = train(folder)
        (folder / "result").write_text(text)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        sys.exit("the training failed")
    return os.WIFSIGNALED(status)


def main() -> None:
    """Kill the training KILLS times at random moments, then let it finish."""
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    train(folder / "warm-up", steps=1)  # so that no child spends its time on imports
    moments = random.Random(seed)
    killed = sum(attempt(folder, moments.uniform(0.02, 0.2)) for _ in range(kills))
    resumed_from = CheckpointFolder(folder).latest()
    attempt(folder, None)
    print(killed, resumed_from.name if resumed_from else None, (folder / "result").read_text(), sep="\n")


if __name__ == "__main__":
    main()
