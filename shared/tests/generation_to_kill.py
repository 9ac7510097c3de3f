"""A small generation for test_offline_generation: python generation_to_kill.py OUT; waits in its midst to be killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from leap_shared.offline import generation, production
from leap_shared.offline.online import SACConfig

ENVIRONMENT = "InvertedPendulum-v5"
TINY: dict[str, Any] = {
    "level": ["medium-replay", "expert"],
    "config": SACConfig(hidden=(8,), batch_size=8),
    "steps": 240,
    "rows": 60,
    "target_score": 1.0,
    "num_envs": 3,
    "random_steps": 30,
    "evaluate_every": 60,
    "evaluation_episodes": 2,
    "formats": ("d4rl",),
}


def wait_to_be_killed(_done: int, text: str) -> None:
    """After 150 of 240 steps, of which 120 are safe."""
    if text.startswith("training 150/"):
        print(text, flush=True)
        time.sleep(600)


def main() -> None:
    """Generate and wait."""
    torch.set_num_threads(1)
    production.REPORT_SECONDS = 0.0
    generation.generate_mujoco(ENVIRONMENT, out=Path(sys.argv[1]), progress=wait_to_be_killed, **TINY)


if __name__ == "__main__":
    main()
