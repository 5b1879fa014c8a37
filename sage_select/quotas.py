"""Quotas: how many pairs of each stratum each pool gets, in whole pairs and with exact totals.

Two steps on a table with one row per pool and one column per stratum: fit it to the totals, then
round it without losing them.
"""

import numpy as np

from sage_select.arrays import Float64Array, Int64Array


def fit_totals(
    ideal: Float64Array, *, rows: Int64Array, columns: Int64Array, most: Int64Array
) -> Float64Array:
    """The table nearest to `ideal` with these row and column sums and cells of at most `most`.

    Iterative proportional fitting: alternate scalings of rows and columns (Deming and Stephan,
    1940). Cells start a hair above zero, so that a stratum the mix never asks for can be dealt.
    """
    table = np.maximum(ideal, 1e-9 * rows[:, None])
    caps = np.broadcast_to(most.astype(np.float64), table.shape)
    for _ in range(10_000):
        table = _scale_columns_below(table, columns.astype(np.float64), caps)
        sums = table.sum(axis=1)
        if np.abs(sums - rows).max() < 1e-9 * rows.max():
            break
        table = table * (rows / sums)[:, None]
    return np.asarray(table, dtype=np.float64)


def _scale_columns_below(
    table: Float64Array, columns: Float64Array, caps: Float64Array
) -> Float64Array:
    """Each column scaled to its sum, cells cut at the cap and the rest scaled on."""
    full = np.zeros(table.shape, dtype=bool)
    while True:
        left = columns - np.where(full, caps, 0).sum(axis=0)
        free = np.where(full, 0, table).sum(axis=0)
        scale = np.divide(left, free, out=np.zeros_like(left), where=free > 0)
        scaled: Float64Array = np.where(full, caps, table * scale)
        over = ~full & (scaled > caps)
        if not over.any():
            return scaled
        full |= over


def round_keeping_totals(
    table: Float64Array, *, rows: Int64Array, columns: Int64Array, most: Int64Array
) -> Int64Array:
    """Controlled rounding: cells to a neighbouring whole number, row and column sums exact.

    Everything is rounded down, then the missing pairs are put back one by one, as a flow from rows
    to columns (Ford and Fulkerson, 1956). A table whose totals are whole always has such a
    rounding (Cox, 1987).
    """
    whole = np.rint(table)
    table = np.where(np.abs(table - whole) < 1e-6, whole, table)  # what the fit left of a 3.0
    floor, ceiling = np.floor(table), np.ceil(table)
    cells = floor.astype(np.int64)
    missing = columns - cells.sum(axis=0)
    _diffuse(cells, table, ceiling, rows, missing)
    # what is left needs pairs to be moved aside; a fit that stopped short of exact totals may even
    # need a wider choice than the neighbouring whole numbers
    everything = np.broadcast_to(most.astype(np.float64), table.shape)
    for least, greatest in ((floor, ceiling), (np.zeros_like(table), everything)):
        for k, lacking in enumerate((rows - cells.sum(axis=1)).tolist()):
            for _ in range(lacking):
                path = _augmenting_path(k, cells, table, least, greatest, missing)
                if path is None:
                    break
                for row, column, change in path:
                    cells[row, column] += change
                missing[path[0][1]] -= 1
    assert (cells.sum(axis=0) == columns).all()
    assert (cells.sum(axis=1) == rows).all()
    return cells


def _diffuse(
    cells: Int64Array,
    table: Float64Array,
    ceiling: Float64Array,
    rows: Int64Array,
    missing: Int64Array,
) -> None:
    """Round cells up where a column has fallen furthest behind so far, in place."""
    behind = np.zeros(cells.shape[1])
    for k, lacking in enumerate((rows - cells.sum(axis=1)).tolist()):
        behind += table[k] - cells[k]
        free = (cells[k] < ceiling[k]) & (missing > 0)
        chosen = np.argsort(np.where(free, -behind, np.inf), kind="stable")[
            : min(lacking, free.sum())
        ]
        cells[k, chosen] += 1
        missing[chosen] -= 1
        behind[chosen] -= 1


def _augmenting_path(
    start: int,
    cells: Int64Array,
    wish: Float64Array,
    least: Float64Array,
    most: Float64Array,
    missing: Int64Array,
) -> list[tuple[int, int, int]] | None:
    """Changes (row, column, +1 or -1) that add a pair to row `start`, the last column's first."""
    came_from: dict[int, tuple[int, int | None]] = {}  # column -> row, the column it gave up
    frontier: list[tuple[int, int | None]] = [(start, None)]
    seen = np.zeros(len(cells), dtype=bool)
    seen[start] = True
    while frontier:
        following: list[tuple[int, int | None]] = []
        for row, given_up in frontier:
            for column in np.argsort(cells[row] - wish[row], kind="stable").tolist():
                if column in came_from or cells[row, column] >= most[row, column]:
                    continue
                came_from[column] = (row, given_up)
                if missing[column] > 0:
                    return _trace(column, came_from)
                others = np.flatnonzero(~seen & (cells[:, column] > least[:, column]))
                seen[others] = True
                following += [(other, column) for other in others.tolist()]
        frontier = following
    return None


def _trace(column: int, came_from: dict[int, tuple[int, int | None]]) -> list[tuple[int, int, int]]:
    path = []
    while True:
        row, given_up = came_from[column]
        path.append((row, column, +1))
        if given_up is None:
            return path
        path.append((row, given_up, -1))
        column = given_up
