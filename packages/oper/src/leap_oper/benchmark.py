"""What `leap-oper bench` measures: samplers, trainers, value fitting and reading, beside their peers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leap_oper import peers
from leap_oper.priorities import oper_r
from leap_oper.samplers import AliasSampler, CdfSampler, ReferenceSampler
from leap_oper.trainer import Trainer
from leap_oper.values import ValueFit
from leap_shared.bench import Case, compare, write
from leap_shared.cli import Context
from leap_shared.errors import UserError, did_you_mean
from leap_shared.offline import Transitions, read_d4rl, write_d4rl

__all__ = ["PARTS", "run"]

BATCH, SEEDS, UPDATES = 256, 5, 10
HIDDEN = (256, 256)
CONFIGS: dict[str, dict[str, Any]] = {
    "td3bc": {"hidden": HIDDEN},
    "iql": {"hidden": HIDDEN},
    "cql": {"hidden": HIDDEN, "critic_hidden": HIDDEN},
    "bc": {"hidden": HIDDEN, "policy": "deterministic"},
}
TITLES = {"td3bc": "TD3+BC", "iql": "IQL", "cql": "CQL", "bc": "BC"}
TARGETS = {"td3bc": 2.5, "iql": 1.0, "cql": 1.0, "bc": 1.0}


def run(only: Sequence[str], threads: int, context: Context, *, quick: bool = False) -> list[dict[str, Any]]:
    """Measure the parts, write table, picture and stamp, and return the rows."""
    for name in only:
        if name not in PARTS:
            raise UserError(f"part {name!r} is unknown: {did_you_mean(name, PARTS)}")
    rows = 20_000 if quick else 1_000_000
    effort: dict[str, Any] = {"rounds": 2, "warmup": 1, "min_seconds": 1e-6} if quick else {"rounds": 15}
    measured = []
    for name in only or PARTS:
        cases = PARTS[name](rows, context)
        limits = effort if name != "reader" else {"rounds": 2 if quick else 3, "warmup": 1, "min_seconds": 1e-6}
        measured += compare(
            cases, device=context.device, threads=threads, progress=context.progress, seed=context.seed, **limits
        )
    write(measured, context.out, "oper", plot=True)
    return [row.to_json() for row in measured]


def _installed(package: str, context: Context) -> bool:
    if importlib.util.find_spec(package) is None:
        context.log(f"{package} is not installed, so it is not measured: pip install {package}")
        return False
    return True


def _data(rows: int, observation: int = 17, action: int = 6, seed: int = 0) -> Transitions:
    random = np.random.default_rng(seed)
    states = random.standard_normal((rows + 1, observation), np.float32)
    cut = np.arange(rows) % 1000 == 999
    numbers = random.uniform(-1, 1, (rows, action)), random.standard_normal(rows)
    return Transitions.from_arrays(states[:-1], *numbers, states[1:], np.zeros(rows), cut)


def _samplers(rows: int, context: Context) -> Iterator[Case]:
    random = np.random.default_rng(context.seed)
    probs = random.gamma(2.0, size=rows)
    probs /= probs.sum()
    device = context.device
    alias, cdf = AliasSampler(probs, device), CdfSampler(probs, device)
    contenders: dict[str, Callable[[], object]] = {
        "cumulative sum": lambda: cdf.draw((BATCH,)),
        "numpy choice": lambda: random.choice(rows, BATCH, p=probs),
    }
    if rows < 1 << 24:  # torch.multinomial takes no more
        weights = torch.as_tensor(probs, device=device)
        contenders["torch.multinomial"] = lambda: torch.multinomial(weights, BATCH, replacement=True)
    if _installed("torchrl", context):
        contenders["torchrl PrioritizedSampler"] = _torchrl(probs)
    yield Case(f"draw {BATCH} of {rows:,} rows, alias", lambda: alias.draw((BATCH,)), contenders, dtype="int64")
    reference = ReferenceSampler(probs, BATCH)
    prefetched = {"the authors' prefetching": lambda: reference.draw((1000, BATCH))}
    yield Case(f"1000 draws of {BATCH} at once, alias", lambda: alias.draw((1000, BATCH)), prefetched, dtype="int64")


def _torchrl(probs: Any) -> Callable[[], object]:
    from torchrl.data import LazyTensorStorage, PrioritizedSampler, TensorDictReplayBuffer

    sampler = PrioritizedSampler(len(probs), alpha=1.0, beta=1.0)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(probs)), sampler=sampler, batch_size=BATCH)
    from tensordict import TensorDict

    buffer.extend(TensorDict({"row": torch.arange(len(probs))}, batch_size=[len(probs)]))
    sampler.update_priority(torch.arange(len(probs)), torch.as_tensor(probs / probs.max(), dtype=torch.float32))
    sample: Callable[[], object] = buffer.sample
    return sample


def _trainer(name: str, data: Transitions, seeds: int, context: Context, **changes: Any) -> Callable[[], object]:
    options = CONFIGS[name] | changes
    device = str(context.device)
    trainer = Trainer(name, data, seeds=range(seeds), batch_size=BATCH, device=device, normalise=False, **options)
    return lambda: trainer.training.advance(UPDATES)


def _trainers(rows: int, context: Context) -> Iterator[Case]:
    data = _data(min(rows, 100_000))
    has_d3rlpy = _installed("d3rlpy", context)
    rival = f"d3rlpy {importlib.metadata.version('d3rlpy')}" if has_d3rlpy else ""
    for name, title in TITLES.items():
        ours, contenders = _trainer(name, data, 1, context), {}
        if has_d3rlpy:
            theirs = peers.d3rlpy_updates(name, data, BATCH)
            contenders[rival] = lambda theirs=theirs: theirs(UPDATES)
        if name == "td3bc":
            eager = peers.EagerTD3BC(data, BATCH)
            contenders["eager script"] = lambda eager=eager: [eager.update() for _ in range(UPDATES)]
        if contenders:
            target = {rival: TARGETS[name]} if has_d3rlpy else None
            yield Case(f"{title}, {UPDATES} updates with their batches, (17, 6), 256-256", ours, contenders, target)


def _seeds(rows: int, context: Context) -> Iterator[Case]:
    data = _data(min(rows, 100_000))
    for name, hidden in (("td3bc", HIDDEN), ("bc", HIDDEN), ("bc", (128, 128))):
        together = _trainer(name, data, SEEDS, context, hidden=hidden)
        apart = [_trainer(name, data, 1, context, hidden=hidden) for _ in range(SEEDS)]
        single = {f"{SEEDS} single runs": lambda apart=apart: [one() for one in apart]}
        title = f"{TITLES[name]}, {UPDATES} updates of {SEEDS} seeds, {hidden[0]}-{hidden[1]}"
        yield Case(title, together, single, target=1.3)


def _values(rows: int, context: Context) -> Iterator[Case]:
    data = _data(min(rows, 100_000))
    device = context.device
    columns = [data.observations, data.next_observations, data.rewards[:, None], 1.0 - data.terminals[:, None]]
    tensors = [torch.tensor(column, dtype=torch.float32, device=device) for column in columns]
    for seeds in (1, SEEDS):
        fit = ValueFit([data] * seeds, range(seeds), device=device)
        indices = torch.randint(len(data), (UPDATES, seeds, BATCH), device=device)
        states, after, rewards, going = tensors
        plain = [peers.EagerValueFit(states, after, rewards, going) for _ in range(seeds)]

        def ours(fit: ValueFit = fit, indices: torch.Tensor = indices) -> None:
            for batch in indices:
                fit.update(batch, 3e-4)

        def loops(plain: Any = plain, indices: torch.Tensor = indices) -> None:
            for batch in indices:
                for one, rows_of_one in zip(plain, batch, strict=True):
                    one.update(rows_of_one)

        name = f"OPER-A, {UPDATES} value updates, {seeds} {'seed' if seeds == 1 else 'seeds'}, 17 states"
        yield Case(name, ours, {"eager loop": loops}, target=2.0)


def _reader(rows: int, context: Context) -> Iterator[Case]:
    random = np.random.default_rng(context.seed)
    arrays = {
        "observations": random.standard_normal((rows, 11), np.float32),
        "actions": random.uniform(-1, 1, (rows, 3)).astype(np.float32),
        "rewards": random.standard_normal(rows).astype(np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) % 1000 == 999,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steps.hdf5"
        write_d4rl(path, arrays)
        loops = {"row by row": lambda: peers.row_by_row(path)}
        yield Case(f"D4RL file of {rows:,} rows to OPER-R weights", lambda: oper_r(read_d4rl(path)), loops, target=2.0)


PARTS: dict[str, Callable[[int, Context], Iterator[Case]]] = {
    "samplers": _samplers,
    "trainers": _trainers,
    "seeds": _seeds,
    "values": _values,
    "reader": _reader,
}
