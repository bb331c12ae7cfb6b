"""The poster's communication column, cell by cell."""

import pytest

from loft_hpc.analysis.commcost import POSTER, Division, loft_bytes, poster_table

# facts/loft.md: the formula's values for the ten cells, S = 2 then S = 4
VALUES = [104.5906, 144.2791, 104.6014, 144.3006, 104.7753, 144.6485, 104.7861, 144.6700, 791.0972, 1284.8371]


def test_all_ten_cells():
    rows = poster_table()
    assert [row.gigabytes for row in rows] == pytest.approx(VALUES, abs=5e-5)
    assert all(abs(row.difference_gigabytes) <= 0.02 for row in rows)


def test_the_one_misprint():
    assert [(row.cell.dataset, row.cell.workers) for row in poster_table() if row.misprint] == [("ImageNet", 2)]
    misprinted = next(row for row in poster_table() if row.misprint)
    assert misprinted.improvement == pytest.approx(26.49, abs=0.005)
    assert misprinted.cell.improvement_printed == 21.60


def test_parameter_counts_of_the_facts():
    shared = [row.divided.shared for row in poster_table()[::2]]
    assert shared == [9_922_122, 9_924_810, 9_968_292, 9_970_980, 10_286_248]
    assert {row.divided.partitioned for row in poster_table()} == {32_451_072, 12_389_888}


def test_formula():
    assert len(POSTER) == 10
    assert loft_bytes(Division(partitioned=100, shared=10), workers=4, transfers=3) == 4 * 3 * (100 + 40)
    assert loft_bytes(Division(100, 10), 4, 3, momentum_travels=True) == 2 * 4 * 3 * 140
    assert loft_bytes(Division(100, 10), 1, 3) == 0
