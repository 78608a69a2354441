"""benchmarks/: that its figures are of samples that belong together, and are what its tables say."""

import json
import statistics

import pytest
from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"
ROWS = json.loads((BENCHMARKS / "results.json").read_text(encoding="utf-8"))["rows"]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """bench.py's Bench for three pairs, without processes."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from bench import Bench

    class Folder:
        root = tmp_path

    return Bench(Folder, 3)


def test_row_has_the_ratios_of_the_pairs(bench):
    row = bench.row("epoch", "s", [1.0, 4.0, 3.0], [2.0, 2.0, 6.0], "bare loop", goal=1.0, limit=2.9)
    assert (row["ours"], row["reference"], row["n"]) == (3.0, 2.0, 3)
    assert row["ratio"] == {"median": 0.5, "min": 0.5, "max": 2.0}
    assert row["met"] is False  # by its limit alone


@pytest.mark.parametrize("ours, reference", [(3, 6), (6, 3), (6, 6), (3, 2), (2, 2), (0, 0)])
def test_row_refuses_samples_that_are_not_one_for_each_pair(bench, ours, reference):
    with pytest.raises(ValueError, match=f"epoch: {ours} samples of ours, {reference} of bare loop, 3 pairs"):
        bench.row("epoch", "s", [1.0] * ours, [1.0] * reference, "bare loop")


def test_bench_that_is_measured_anew_replaces_its_rows_and_no_others(bench):
    from bench import merge

    first = merge({}, {"date": "Monday"}, {"wire": 1}, [{"bench": name} for name in ("epoch", "start", "start")])
    then = merge(first, {"date": "Tuesday"}, {"data": 2}, [{"bench": "start", "name": "new"}, {"bench": "adam"}])
    made = [(row["bench"], row["run"], row.get("name")) for row in then["rows"]]
    assert made == [("epoch", "Monday", None), ("adam", "Tuesday", None), ("start", "Tuesday", "new")]
    assert (then["wire"], then["data"], list(then["runs"])) == (1, 2, ["Monday", "Tuesday"])
    last = merge(then, {"date": "Friday"}, {}, [{"bench": "epoch"}])
    assert list(last["runs"]) == ["Tuesday", "Friday"]  # nothing is left of Monday's


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['name']}, {row['against']}")
def test_stored_rows_follow_from_their_samples(row):
    ours, reference = row["samples"]["ours"], row["samples"]["reference"]
    assert row["n"] == len(ours) == len(reference) >= 5
    ratios = [mine / other for mine, other in zip(ours, reference, strict=True)]
    assert row["ratio"] == pytest.approx({"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)})
    assert row["ours"] == statistics.median(ours) and row["reference"] == statistics.median(reference)
    good = row["goal"] is None or row["ratio"]["median"] <= row["goal"]
    good = good and (row["limit"] is None or row["ours"] <= row["limit"])
    assert row["met"] is (None if row["goal"] is row["limit"] is None else good)
