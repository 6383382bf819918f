"""bench.py at its smallest sizes: its tables have their rows and finite numbers."""
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench.py"


def printed(*flags):
    """[{column: cell}] of the rows that bench.py prints; of columns of one name the first."""
    done = subprocess.run([sys.executable, str(BENCH), "--device", "cpu", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("| ")]
    head = rows[0]
    return [{name: row[head.index(name)] for name in head} for row in rows if row != head]


def test_the_papers_schedule_costs_hours_in_proportion_to_operations_and_more_at_a_larger_size():
    rows = printed("--cost", "--tflops", "50")
    small, large = rows[:4], rows[4:]
    assert [row["stage"] for row in small] == [row["stage"] for row in large] and len(large) == 4
    for row in rows:
        operations, hours = float(row["operations"]), float(row["hours at 50 TFLOP/s"])
        assert hours > 0 and hours == pytest.approx(operations / 50e12 / 3600, rel=0.1, abs=0.5)
    for a, b in zip(small, large):                                 # four times the pixels
        assert 4 * float(a["operations"]) <= 1.1 * float(b["operations"]) < float("inf")
        assert float(b["disk, GB, at most"]) == pytest.approx(4 * float(a["disk, GB, at most"]), rel=0.1)


def test_training_steps_and_scored_candidates_of_tiny_are_timed_and_counted():
    rows = {row["what"]: row for row in printed("--training", "--model", "tiny", "--size", "32", "--frames", "4", "--steps", "1",
                                                "--runs", "1")}
    assert rows.keys() >= {f"{kind}, {scored}" for scored in ("scored", "not scored") for kind in (
        "image candidate, 1 steps, 4 in a batch", "clip candidate, 1 steps, FFG")}
    assert rows.keys() >= {f"training step, a clip, {how}" for how in (
        "EPM", "no EPM", "EPM, checkpointing", "no EPM, checkpointing")}
    for row in rows.values():
        rate, median, best, cpu = (float(row[name]) for name in ("a second", "s", "min", "CPU s"))
        assert 0 < best <= median < float("inf") and cpu > 0 and rate * best == pytest.approx(1, rel=0.02)
