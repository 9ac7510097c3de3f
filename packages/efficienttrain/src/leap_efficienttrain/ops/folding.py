"""The crop with its matrices folded: a quarter of the products along the rows' axis and a half along the columns'.

P[m, n] stays the same where m and n both move by half their lengths, and where both are mirrored. So a signal is split
into the parts that are even or odd under either, and P = sum_k U_k^T P_k V_k with entries 1 and -1 in U_k and V_k and
blocks P_k of a sixteenth of its size. Rows are split by both symmetries, columns by halves alone, which are contiguous.
What splits and joins are sums of a few rows, for which `torch.embedding_bag` goes through memory once.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leap_efficienttrain.ops.weights import crop_axis

__all__ = ["Bags", "Plan", "parts", "plan_of"]

Array = NDArray[np.float64]
Places = NDArray[np.int64]
Entries = tuple[Places, Places, Array]


class Bags:
    """A sparse matrix times the rows of a float32 matrix.

    Args:
        entries: rows, columns and values, in arrays that broadcast together.
        count: of rows.
    """

    def __init__(self, entries: list[Entries], count: int) -> None:
        flat = [[x.ravel() for x in np.broadcast_arrays(*part)] for part in entries]
        rows, columns, values = (np.concatenate(x) for x in zip(*flat, strict=True))
        order = np.argsort(rows, kind="stable")
        self.columns = torch.from_numpy(columns[order].astype(np.int32))
        self.values = torch.from_numpy(values[order].astype(np.float32))
        self.starts = torch.from_numpy(np.searchsorted(rows[order], np.arange(count)).astype(np.int32))

    def __call__(self, x: Tensor) -> Tensor:
        """The product, (count, x.shape[1])."""
        return torch.embedding_bag(x, self.columns, self.starts, False, 0, False, self.values)[0]


def parts(length: int, period: int, halves: int, mirrored: bool) -> list[Array]:
    """Matrices that split a signal into even and odd parts, (numbers of the part, length) each.

    Args:
        length: of the signal.
        period: the reflection, if `mirrored`, takes n to period - n.
        halves: 2 where parts are even or odd under a move by half the length too, else 1.
        mirrored: whether there is a reflection.
    """
    place = np.arange(length)
    moves = [(place + length // 2 * half) % length for half in range(halves)]
    if mirrored:
        moves += [(period - move) % length for move in moves]
    first = np.min(moves, 0) == place
    found = []
    for odd in range(len(moves)):
        table = np.zeros((length, length))
        for number, move in enumerate(moves):
            swaps = (number % halves) * (odd % halves) + (number // halves) * (odd // halves)
            np.add.at(table, (place, move), (-1.0) ** swaps)
        found.append(np.sign(table[first & table.any(1)]))
    return found


def _blocks(matrix: Array, left: list[Array], right: list[Array]) -> Tensor:
    """The blocks P_k, (parts, rows, columns) in float32, zeros where a part has fewer than the largest."""
    found = np.zeros((len(left), max(map(len, left)), max(map(len, right))))
    for number, (u, v) in enumerate(zip(left, right, strict=True)):
        found[number, : len(u), : len(v)] = (u @ matrix @ v.T) / abs(u).sum(1)[:, None] / abs(v).sum(1)
    return torch.from_numpy(found.astype(np.float32))


def _axis(length: int, size: int, mirrored: bool) -> tuple[list[Array], list[Array]]:
    """The parts of an axis of the input and of the output."""
    common, halves = math.gcd(length, size), 2 - length % 2
    given, wanted = (parts(n, n // common, halves, mirrored) for n in (length, size))
    return given, wanted


def _entries(tables: list[Array]) -> tuple[Places, Places, Places, Array]:
    """Part, row, column and sign of every entry, as columns that three further axes broadcast against."""
    part = np.concatenate([np.full(np.count_nonzero(table), number) for number, table in enumerate(tables)])
    row, place = np.concatenate([np.nonzero(table) for table in tables], 1)
    sign = np.concatenate([table[table != 0] for table in tables])
    return part[:, None, None, None], row[:, None, None, None], place[:, None, None, None], sign[:, None, None, None]


class Plan:
    """Matrices and sums for the crop of some images, or for its adjoint.

    Args:
        height: of the crop's input.
        width: of the crop's input.
        size: of its output, even.
        images: how many come at once.
        adjoint: from the output's gradient to the input's.
    """

    def __init__(self, height: int, width: int, size: int, images: int, adjoint: bool) -> None:
        axes = crop_axis(height, size), crop_axis(width, size)
        tall, wide = _axis(height, size, True), _axis(width, size, False)
        matrices = [axis.matrix for axis in axes]
        given, wanted = ([axis.sine for axis in axes], [axis.alternating for axis in axes])
        if adjoint:
            tall, wide, given, wanted = tall[::-1], wide[::-1], wanted, given
            matrices = [matrix.T for matrix in matrices]
        self.adjoint, self.images = adjoint, images
        self.rows = _blocks(matrices[0], tall[1], tall[0])
        self.columns = _blocks(matrices[1], wide[1], wide[0]).mT.contiguous()
        self.row_parts, self.out_rows, self.in_rows = self.rows.shape
        self.halves, self.in_columns, self.out_columns = self.columns.shape
        self.given = torch.from_numpy(given[1][: self.in_columns].astype(np.float32))
        self.wanted = torch.from_numpy(wanted[1][: self.out_columns].astype(np.float32))
        self.count = self.in_rows * self.row_parts * images * self.halves
        self.products = self.out_rows * self.row_parts * images * self.halves
        parity = (-1.0) ** (size // 2 * np.arange(self.halves))  # of s and t, where they move by half their lengths
        self.split = self._splitting(tall[0], given[0][:, None] * parity)
        self.join = self._joining(tall[1], wanted[0][:, None] * parity)

    def _splitting(self, tables: list[Array], weights: Array) -> Bags:
        """From (image, place, half) to (row, part, image, half), and to one weighted sum over places for each image."""
        part, row, place, sign = _entries(tables)
        image, half, other = np.ogrid[: self.images, : self.halves, : self.halves]
        target = ((row * self.row_parts + part) * self.images + image) * self.halves + half
        source = (image * len(weights) + place) * self.halves + other
        entries = [(target, source, sign * (-1.0) ** (half * other))]
        image, place, half = np.ogrid[: self.images, : len(weights), : self.halves]
        entries.append((self.count + image, (image * len(weights) + place) * self.halves + half, weights))
        return Bags(entries, self.count + self.images)

    def _joining(self, tables: list[Array], weights: Array) -> Bags:
        """From (half, part, row, image), and one row for each image behind them, to (image, place, half)."""
        part, row, place, sign = _entries(tables)
        image, half, other = np.ogrid[: self.images, : self.halves, : self.halves]
        source = ((other * self.row_parts + part) * self.out_rows + row) * self.images + image
        target = (image * len(weights) + place) * self.halves + half
        entries = [(target, source, sign * (-1.0) ** (half * other))]
        image, place, half = np.ogrid[: self.images, : len(weights), : self.halves]
        entries.append(((image * len(weights) + place) * self.halves + half, self.products + image, -weights))
        return Bags(entries, self.images * weights.size)

    def __call__(self, x: Tensor) -> Tensor:
        """Images (images, height, width) in float32, contiguous, to images."""
        found = self.split(x.view(-1, self.in_columns))
        single = torch.mv(found[self.count :], self.given)
        out = found.new_empty(self.products + self.images, self.out_columns)
        torch.outer(single, self.wanted, out=out[self.products :])
        shape = self.row_parts, self.out_rows, -1
        if self.adjoint:
            wide = torch.bmm(found[: self.count].view(-1, self.halves, self.in_columns).transpose(0, 1), self.columns)
            targets = out[: self.products].view(self.halves, *shape)
            for half, target in zip(wide, targets, strict=True):
                torch.bmm(self.rows, half.view(self.in_rows, self.row_parts, -1).transpose(0, 1), out=target)
        else:
            split = found[: self.count].view(self.in_rows, self.row_parts, -1).transpose(0, 1)
            short = torch.bmm(self.rows, split).view(-1, self.halves, self.in_columns)
            target = out[: self.products].view(self.halves, -1, self.out_columns)
            torch.bmm(short.transpose(0, 1), self.columns, out=target)
        return self.join(out).view(self.images, -1, self.halves * self.out_columns)


@functools.lru_cache(maxsize=32)
def plan_of(height: int, width: int, size: int, images: int, adjoint: bool) -> Plan:
    """The plan for a shape, made once."""
    with torch.inference_mode(mode=False):
        return Plan(height, width, size, images, adjoint)
