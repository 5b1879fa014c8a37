"""Quotas: the number of pairs of each stratum in each pool, whole and with exact totals.

Two steps on a table with one row per pool and one column per stratum: fit it to the totals, then
round it without changing them.
"""

import numpy as np

from sage_select.arrays import Float64Array, Int64Array


def fit_totals(
    ideal: Float64Array, *, rows: Int64Array, columns: Int64Array, most: Int64Array
) -> Float64Array:
    """Return the table nearest to `ideal` with the given row and column sums.

    Iterative proportional fitting: scale columns and rows in turn (Deming and Stephan, 1940).

    Args:
        ideal: [K, C], the table to approximate.
        rows: [K], row sums.
        columns: [C], column sums.
        most: [C], upper bound of each column's cells.

    Returns:
        float64 [K, C].
    """
    # scaling cannot move a zero: start slightly above, so that a stratum the mix never asks for is
    # assigned, too
    table = np.maximum(ideal, 1e-9 * rows[:, None])
    caps = np.broadcast_to(most.astype(np.float64), table.shape)
    for _ in range(10_000):
        table = _scale_columns_below(table, columns.astype(np.float64), caps)
        # columns and caps now hold exactly; stop once the rows do, too
        sums = table.sum(axis=1)
        if np.abs(sums - rows).max() < 1e-9 * rows.max():
            break
        table = table * (rows / sums)[:, None]
    return np.asarray(table, dtype=np.float64)


def _scale_columns_below(
    table: Float64Array, columns: Float64Array, caps: Float64Array
) -> Float64Array:
    """Scale each column to its sum, with cells limited to their caps."""
    capped = np.zeros(table.shape, dtype=bool)
    # capping a cell raises the scale of its column, which can lift other cells above their caps
    while True:
        remaining = columns - np.where(capped, caps, 0).sum(axis=0)
        free = np.where(capped, 0, table).sum(axis=0)
        scale = np.divide(remaining, free, out=np.zeros_like(remaining), where=free > 0)
        scaled: Float64Array = np.where(capped, caps, table * scale)
        above = ~capped & (scaled > caps)
        if not above.any():
            return scaled
        capped |= above


def round_keeping_totals(
    table: Float64Array, *, rows: Int64Array, columns: Int64Array, most: Int64Array
) -> Int64Array:
    """Round cells to a neighbouring whole number with exact row and column sums.

    Controlled rounding: all cells are rounded down, then the missing pairs are added one by one, as
    a flow from rows to columns (Ford and Fulkerson, 1956). A table whose totals are whole always
    has such a rounding (Cox, 1987).

    Args:
        table: [K, C], a table that nearly has these sums.
        rows: [K], row sums.
        columns: [C], column sums.
        most: [C], upper bound of each column's cells.

    Returns:
        int64 [K, C].
    """
    whole = np.rint(table)
    table = np.where(np.abs(table - whole) < 1e-6, whole, table)  # treat 2.9999999 as 3
    floor, ceiling = np.floor(table), np.ceil(table)
    cells = floor.astype(np.int64)
    missing = columns - cells.sum(axis=0)
    _diffuse(cells, table, ceiling, rows, missing)
    # Placing the remaining pairs means moving others. If the fit stopped before its totals were
    # exact, neighbouring whole numbers may not suffice: the second round allows 0 to `most`.
    upper = np.broadcast_to(most.astype(np.float64), table.shape)
    for least, greatest in ((floor, ceiling), (np.zeros_like(table), upper)):
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
    """Round cells up in the columns that have fallen furthest behind so far, in place."""
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
    table: Float64Array,
    least: Float64Array,
    most: Float64Array,
    missing: Int64Array,
) -> list[tuple[int, int, int]] | None:
    """Find changes (row, column, +1 or -1) that add a pair to row `start`; the last step is first.

    A breadth-first search, so that the fewest cells change; None if there is no such path.
    """
    came_from: dict[int, tuple[int, int | None]] = {}  # column -> row, column it gives up
    frontier: list[tuple[int, int | None]] = [(start, None)]
    seen = np.zeros(len(cells), dtype=bool)
    seen[start] = True
    while frontier:
        next_frontier: list[tuple[int, int | None]] = []
        for row, given_up in frontier:
            for column in np.argsort(cells[row] - table[row], kind="stable").tolist():
                if column in came_from or cells[row, column] >= most[row, column]:
                    continue
                came_from[column] = (row, given_up)
                if missing[column] > 0:
                    return _trace(column, came_from)
                donors = np.flatnonzero(~seen & (cells[:, column] > least[:, column]))
                seen[donors] = True
                next_frontier += [(donor, column) for donor in donors.tolist()]
        frontier = next_frontier
    return None


def _trace(column: int, came_from: dict[int, tuple[int, int | None]]) -> list[tuple[int, int, int]]:
    """Follow `came_from` back to the start row, and list the changes on the way."""
    path = []
    while True:
        row, given_up = came_from[column]
        path.append((row, column, +1))
        if given_up is None:
            return path
        path.append((row, given_up, -1))
        column = given_up
