"""bench/results/families.json covers every family, and the README repeats it."""

import copy

import pytest

from bench.families.measure import ERRORS, RELAY, passes
from bench.families.table import README, page, read, table
from bench.families.tiny import name_of, writer_of
from lowmem_drf.models.generators import FAMILIES


def test_every_family_was_measured_and_passes():
    rows = read()
    assert rows.keys() == {name_of(family) for family in FAMILIES}, "run: python -m bench.families"
    for name, row in rows.items():
        assert passes(row) and len(row["trainings"]) >= 2 and writer_of(name), name


def test_the_readme_repeats_the_results():
    assert README.read_text(encoding="utf-8") == page(read()), "run: python -m bench.families --only"
    assert "| not measured |" in table({})


@pytest.mark.parametrize("change", [("relay", "1", RELAY), ("decode", None, 1e-3), ("export", None, 1e-3)])
def test_a_figure_beyond_its_limit_fails(change):
    row, (key, k, value) = copy.deepcopy(next(iter(read().values()))), change
    assert passes(row)
    row[key] = value if k is None else row[key] | {k: value}
    assert not passes(row)


def test_a_rise_within_its_error_fails():
    row = copy.deepcopy(next(iter(read().values())))
    one = row["trainings"]["0"]
    one["error"] = one["rise"] / ERRORS
    assert not passes(row)
