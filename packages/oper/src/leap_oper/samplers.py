"""Rows drawn with given probabilities, with replacement: in O(1), from the cumulative sum, or as the authors draw."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from leap_shared.devices import resolve_device
from leap_shared.errors import UserError

__all__ = ["AliasSampler", "CdfSampler", "ReferenceSampler"]

MAX_ROWS = 2**31 - 1
CARRY_BITS = 31  # of a unit of the table: MAX_ROWS such fractions still sum below 2^62
PIECE_ROWS = {"cpu": 1 << 17, "cuda": 1 << 22}


def _flat(probs: ArrayLike | Tensor) -> NDArray[Any] | Tensor:
    flat = probs.detach().reshape(-1) if isinstance(probs, Tensor) else np.asarray(probs).reshape(-1)
    if len(flat) > MAX_ROWS:
        raise UserError(f"there are {len(flat)} probabilities: at most {MAX_ROWS} rows fit a sampler, split the data")
    if not len(flat):
        raise UserError("probabilities must be finite, not negative and not all zero: there are none")
    return flat


def _pieces(flat: NDArray[Any] | Tensor, device: torch.device) -> Iterator[tuple[slice, Float64[Tensor, " piece"]]]:
    size = PIECE_ROWS.get(device.type, PIECE_ROWS["cpu"])
    for start in range(0, len(flat), size):
        rows = slice(start, min(start + size, len(flat)))
        piece = flat[rows] if isinstance(flat, Tensor) else torch.tensor(flat[rows])
        yield rows, piece.to(device, torch.float64)


def _largest(flat: NDArray[Any] | Tensor, device: torch.device) -> float:
    """Largest of the probabilities, all of which are checked.

    Raises:
        UserError: one is not finite or negative, or all are zero.
    """
    largest = 0.0
    for rows, piece in _pieces(flat, device):
        wrong = ~(torch.isfinite(piece) & (piece >= 0))
        if wrong.any():
            row = int(wrong.int().argmax())
            raise UserError(
                f"probabilities must be finite, not negative and not all zero: row {rows.start + row} "
                f"has {piece[row].item():g}"
            )
        largest = max(largest, piece.max().item())
    if not largest:
        raise UserError("probabilities must be finite, not negative and not all zero: all are zero")
    return largest


@contextlib.contextmanager
def memory_for(what: str, size: int, device: torch.device) -> Iterator[None]:
    """Say how many bytes `what` needs when the device has too few."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        raise UserError(
            f'{what} needs {size} bytes on {device}, which has too few: free some, or give device="cpu"'
        ) from error


class _TableSampler:
    """What the samplers of one int64 table share: whole-number weights, and draws from one random number each.

    Weights become whole numbers of sum rows * 2^fraction_bits, what is lost by rounding down being carried to the next
    rows, so that every later step is exact and the same on every device; a row of weight 0 stays 0. A row's probability
    is off by less than 2^-fraction_bits / rows (2^-35 / rows at 1e8 rows).
    """

    def __init__(self, probs: ArrayLike | Tensor, device: str | torch.device = "cpu", seed: int = 0) -> None:
        flat, device = _flat(probs), resolve_device(device) if isinstance(device, str) else device
        self.rows = len(flat)
        self._row_bits = self.rows.bit_length()
        self._fraction_bits = 62 - self._row_bits
        with memory_for(f"a sampler of {self.rows} rows", 8 * self.rows, device):
            self.table = torch.empty(self.rows, dtype=torch.int64, device=device)
            self.set_probs(flat)
        self.generator = torch.Generator(self.table.device).manual_seed(seed)

    def set_probs(self, probs: ArrayLike | Tensor) -> None:
        """Draw by these from now on. The table keeps its place in memory, so a captured CUDA graph goes on with it.

        Raises:
            UserError: there is not one per row, one is negative or not finite, or all are zero.
        """
        flat, device = _flat(probs), self.table.device
        if len(flat) != self.rows:
            raise UserError(f"there are {len(flat)} probabilities for {self.rows} rows: give one per row")
        largest = _largest(flat, device)
        total = math.fsum((piece / largest).sum().item() for _, piece in _pieces(flat, device))
        wanted, carry = self.rows << self._fraction_bits, 0
        for rows, piece in _pieces(flat, device):
            exact = piece.div(largest).mul_(wanted / total)
            whole = exact.floor()
            sums = exact.sub_(whole).mul_(1 << CARRY_BITS).long().cumsum_(0).add_(carry)
            last, carry = carry >> CARRY_BITS, int(sums[-1])
            sums.bitwise_right_shift_(CARRY_BITS)
            out = self.table[rows].copy_(whole).add_(sums)
            out[1:] -= sums[:-1]
            out[0] -= last
        self.table[self.table.argmax()] += wanted - self.table.sum()
        self._arrange()

    def _arrange(self) -> None:
        raise NotImplementedError

    def _positions(self, count: int) -> Int64[Tensor, " count"]:
        """Whole numbers below rows * 2^fraction_bits, each floor(r * rows / 2^(row_bits + 1)) of 63 random bits r."""
        shift = self._row_bits + 1
        random = torch.randint(2**63 - 1, (count,), generator=self.generator, device=self.table.device)
        low = (random & ((1 << shift) - 1)).mul_(self.rows).bitwise_right_shift_(shift)
        return low.add_(random.bitwise_right_shift_(shift), alpha=self.rows)

    def draw_uniform(self, shape: Sequence[int]) -> Int64[Tensor, "*shape"]:
        """Independent rows, each as likely as any other, from the same generator."""
        return self._positions(math.prod(shape)).bitwise_right_shift_(self._fraction_bits).view(tuple(shape))

    def state_dict(self) -> dict[str, Any]:
        """State of the generator; the probabilities belong to the caller."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, to the same bits."""
        self.generator.set_state(state["generator"])


class AliasSampler(_TableSampler):
    """O(1) per draw from one table on `device`, 8 bytes a row: threshold and alias packed into an int64.

    The table is that of Vose's sweep over light and heavy rows, found at once by prefix sums instead of one row after
    the other (Lehmann, Hübschle-Schneider and Sanders 2019), piece by piece and in place. A draw takes a row and a
    fraction u: it is that row if u < threshold, else the row's alias. Nothing in :meth:`draw` waits for the device.

    Raises:
        UserError: a probability is negative or not finite, all are zero, there are more than 2^31 - 1, or the device
            has too little memory.
    """

    def draw(self, shape: Sequence[int]) -> Int64[Tensor, "*shape"]:
        """Independent rows."""
        fractions = self._positions(math.prod(shape))
        rows = fractions >> self._fraction_bits
        fractions &= (1 << self._fraction_bits) - 1
        entries = self.table.index_select(0, rows)
        own = fractions < entries >> self._row_bits
        return torch.where(own, rows, entries.bitwise_and_((1 << self._row_bits) - 1)).view(tuple(shape))

    def mass(self) -> Float64[Tensor, " rows"]:
        """Probability of each row that the table stands for."""
        full = 1 << self._fraction_bits
        threshold, alias = self.table >> self._row_bits, self.table & ((1 << self._row_bits) - 1)
        total = threshold.index_add(0, alias, full - threshold)
        return total.double() / (self.rows << self._fraction_bits)

    def _arrange(self) -> None:
        """Weights to packed entries; a row that has its entry holds the entry's complement, which is negative.

        Light rows lack what heavy rows have too much; both are put in a row by prefix sums. A light row is topped up by
        the heavy row in whose excess its lack begins, and a heavy row that gave too much by the next heavy row.
        """
        table, bits, full = self.table, self._row_bits, 1 << self._fraction_bits
        light, heavy = _Side(table, full, light=True), _Side(table, full, light=False)
        while light.fill(1) | heavy.fill(2):
            if count := int(torch.searchsorted(light.sums[:-1], heavy.sums[-1:])):
                giver = torch.searchsorted(heavy.sums[1:], light.sums[:count], right=True)
                rows = light.rows[:count]
                table[rows] = (table[rows] << bits | heavy.rows[giver]).bitwise_not_()
            known = int(torch.searchsorted(heavy.sums[1:], light.sums[-1:], right=True))
            if known := min(known, len(heavy.rows) - (not heavy.exhausted)):
                excess = heavy.sums[1 : known + 1]
                left = full + excess - light.sums[torch.searchsorted(light.sums, excess)]
                rows, following = heavy.rows[:known], heavy.rows[1 : known + 1]
                alias = rows.clone()
                alias[: len(following)] = following
                alias = torch.where(left < full, alias, rows)
                table[rows] = (left.clamp_(max=full - 1) << bits | alias).bitwise_not_()
            light.drop(count)
            heavy.drop(known)
        table.bitwise_not_()


class _Side:
    """The light or the heavy rows, found piece by piece, and the running sums of their distances from the mean."""

    def __init__(self, table: Int64[Tensor, " rows"], mean: int, *, light: bool) -> None:
        self._table, self._mean, self._light = table, mean, light
        self._size = PIECE_ROWS.get(table.device.type, PIECE_ROWS["cpu"])
        self._start = 0
        self.rows = table.new_empty(0)
        self.sums = table.new_zeros(1)  # before the first of `rows`, then after each

    @property
    def exhausted(self) -> bool:
        return self._start >= len(self._table)

    def fill(self, wanted: int) -> bool:
        """Have at least `wanted` rows, if there are as many; say whether there is any."""
        while len(self.rows) < wanted and not self.exhausted:
            piece = self._table[self._start : self._start + self._size]
            inside = (piece >= 0) & (piece < self._mean) if self._light else piece >= self._mean
            found = inside.nonzero().flatten()
            distances = (piece[found] - self._mean).abs_()
            self.rows = torch.cat([self.rows, found.add_(self._start)])
            self.sums = torch.cat([self.sums, self.sums[-1:] + distances.cumsum_(0)])
            self._start += self._size
        return len(self.rows) > 0

    def drop(self, count: int) -> None:
        self.rows, self.sums = self.rows[count:], self.sums[count:]


class CdfSampler(_TableSampler):
    """O(log rows) per draw by bisection of the cumulative sum (int64, 8 bytes a row) on `device`.

    Raises:
        UserError: as :class:`AliasSampler`.
    """

    def draw(self, shape: Sequence[int]) -> Int64[Tensor, "*shape"]:
        """Independent rows."""
        return torch.searchsorted(self.table, self._positions(math.prod(shape)), right=True).view(tuple(shape))

    def _arrange(self) -> None:
        self.table.cumsum_(0)


class ReferenceSampler:
    """The authors' stream, bit for bit: NumPy's legacy generator, `n_prefetch` batches at a time.

    Raises:
        UserError: a probability is negative or not finite, or all are zero.
    """

    def __init__(self, probs: ArrayLike | Tensor, batch_size: int = 256, seed: int = 0, n_prefetch: int = 1000) -> None:
        self.rows = len(_flat(probs))
        self.set_probs(probs)
        self.batch_size = batch_size
        self.n_prefetch = max(1, min(n_prefetch, self.rows // batch_size))
        self.random = np.random.RandomState(seed)
        self._ready = np.empty((0, batch_size), np.int64)

    def set_probs(self, probs: ArrayLike | Tensor) -> None:
        """Draw by these from the next refill on: what was drawn ahead is handed out first.

        Raises:
            UserError: there is not one per row, one is negative or not finite, or all are zero.
        """
        flat = _flat(probs)
        if len(flat) != self.rows:
            raise UserError(f"there are {len(flat)} probabilities for {self.rows} rows: give one per row")
        _largest(flat, torch.device("cpu"))
        cumulative = np.asarray(flat.cpu() if isinstance(flat, Tensor) else flat, dtype=np.float64).cumsum()
        cumulative /= cumulative[-1]
        self.cumulative = cumulative

    def draw(self, shape: Sequence[int]) -> Int64[Tensor, "*shape"]:
        """The next batches; the last size must be `batch_size`."""
        if not shape or shape[-1] != self.batch_size:
            raise UserError(f"shape {tuple(shape)} must end with the batch size {self.batch_size}")
        count = math.prod(shape[:-1])
        drawn, ready = [self._ready], len(self._ready)
        while ready < count:
            uniform = self.random.random_sample(self.n_prefetch * self.batch_size)
            rows = self.cumulative.searchsorted(uniform, side="right").reshape(-1, self.batch_size)
            drawn.append(rows)
            ready += len(rows)
        together = np.concatenate(drawn) if len(drawn) > 1 else self._ready
        taken, self._ready = together[:count], together[count:]
        return torch.from_numpy(taken.copy()).reshape(tuple(shape))

    def draw_uniform(self, shape: Sequence[int]) -> Int64[Tensor, "*shape"]:
        """The authors' uniform batches, from the same generator: one call each, in order."""
        return torch.from_numpy(self.random.randint(self.rows, size=tuple(shape)))

    def state_dict(self) -> dict[str, Any]:
        """State of the generator and the batches drawn ahead; the probabilities belong to the caller."""
        return {"random": self.random.get_state(legacy=False), "ready": self._ready.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, to the same bits.

        Raises:
            UserError: the state is that of another batch size.
        """
        ready = np.array(state["ready"], dtype=np.int64)
        if ready.ndim != 2 or ready.shape[1] != self.batch_size:
            raise UserError(f"the state holds batches of shape {ready.shape}, expected (n, {self.batch_size})")
        self.random.set_state(state["random"])
        self._ready = ready
