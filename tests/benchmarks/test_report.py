"""What is made of samples: ratios, goals, and the tables that show them."""

from __future__ import annotations

import json

import pytest

from benchmarks.readme import BEGIN, END, cell, replace, table
from benchmarks.report import Goal, Measure, Summary, ratio_interval, render
from benchmarks.turns import Entry, Plan, Side, SideError, Sides


def measure(ours: float, theirs: float, *goals: Goal) -> Measure:
    sides = {"Gangline": Summary.of([[ours]]), "peer": Summary.of([[theirs]])}
    return Measure("it", "s", sides, goals, {"other": "pip install it"})


def test_a_summary_is_of_all_samples_and_keeps_the_rounds():
    summary = Summary.of([[1.0, 2.0, 9.0], [4.0, 5.0]])
    assert (summary.median, summary.least, summary.most, summary.samples) == (4.0, 1.0, 9.0, 5)
    assert summary.rounds == [2.0, 4.5]


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (Goal("Gangline", "peer", 0.5), 0.5, True),
        (Goal("Gangline", "peer", 0.49), 0.5, False),
        (Goal("Gangline", "peer", -1.0, difference=True), -1.0, True),
        (Goal("Gangline", None, 0.9), 1.0, False),
    ],
)
def test_goals(goal: Goal, value: float, met: bool):
    (verdict,) = measure(1.0, 2.0, goal).verdicts()
    assert (verdict.value, verdict.met) == (value, met)


def test_a_goal_against_a_missing_peer_has_no_verdict():
    assert measure(1.0, 2.0, Goal("Gangline", "other", 1.0)).verdicts() == []


def test_results_survive_a_file():
    there = measure(1.0, 2.0, Goal("Gangline", "peer", 0.1))
    assert Measure.from_json(json.loads(json.dumps(there.as_json()))) == Measure(
        there.what, there.unit, there.sides, list(there.goals), there.absent
    )


def test_tables_show_what_is_missed_and_what_is_missing():
    missed = measure(1e-3, 2e-3, Goal("Gangline", "peer", 0.1))
    assert "0.50, goal 0.10 MISSED" in render([missed])
    assert "missing: pip install it" in render([missed])
    assert "0 of 1 goals met" in render([missed])
    assert cell(missed, "peer") == "2 ms<br>**0.50, goal 0.10: missed**"
    assert table([missed]).splitlines()[0] == "|  | Gangline | peer | other |"


def test_the_readme_is_changed_between_its_markers_only():
    assert replace(f"a {BEGIN} old {END} b", "new") == f"a {BEGIN}\nnew\n{END} b"
    with pytest.raises(ValueError, match="there must be one"):
        replace("a", "new")


def test_a_peer_that_is_missing_or_fails_is_left_out_and_the_run_goes_on(capfd: pytest.CaptureFixture[str]):
    with Sides() as sides:
        sides.add("Gangline", "standin", ours=True)
        sides.add("missing", "standin", needs=["no_such_package"])
        sides.add("failing", "standin")
        entries = {
            "Gangline": Entry("Gangline", "row", (3,)),
            "missing": Entry("missing", "row", (3,)),
            "failing": Entry("failing", "fail"),
        }
        done = sides.measure(Plan("it", entries, [Goal("Gangline", "failing", 1.0)]), 2)
    assert done.sides["Gangline"].samples == 6
    assert done.absent == {"missing": "pip install 'gangline[bench]'", "failing": "it failed"}
    assert "as it was told to" in capfd.readouterr().err


def test_a_side_that_does_not_start_says_why():
    with pytest.raises(SideError, match=r"No module named 'benchmarks\.sides\.no_such'"):
        Side("no_such")


def test_a_launcher_that_starts_each_process_alone_is_noticed():
    with pytest.raises(SideError, match=r"as the ranks \[0\], not as 2 ranks"):
        Side("standin", ranks=2, launcher=["sh", "-c", '"$@" & exec "$@"', "twice"])


def test_our_own_failure_is_raised():
    with Sides() as sides:
        sides.add("Gangline", "standin", ours=True)
        with pytest.raises(SideError, match="as it was told to"):
            sides.measure(Plan("it", {"Gangline": Entry("Gangline", "fail")}), 1)


def test_a_goal_for_an_interval_is_missed_only_where_noise_does_not_explain_it():
    theirs = Summary.of([[1.0]] * 20)
    noisy = Summary.of([[0.9 + 0.4 * (number % 2)] for number in range(20)])
    slower = Summary.of([[1.1 + 0.01 * (number % 2)] for number in range(20)])
    goal = Goal("Gangline", "Gangline before", 1.05, interval=True)
    for ours, met in ((noisy, True), (slower, False)):
        (verdict,) = Measure("x", "s", {"Gangline": ours, "Gangline before": theirs}, [goal]).verdicts()
        assert verdict.met is met
    low, high = ratio_interval([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])  # too few rounds to leave any out
    assert (low, high) == (1.0, 3.0)
