"""bench.py at its smallest sizes: its tables have their rows and finite numbers."""
import sys

import pytest

import bench


@pytest.fixture
def printed(monkeypatch, capsys):
    """flags -> [{column: cell}] of the rows that bench.py prints; of columns of one name the first."""
    def rows(*flags):
        monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cpu", *flags])
        bench.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        head = cells[0]
        return [{name: row[head.index(name)] for name in head} for row in cells if row != head]
    return rows


def test_the_papers_schedule_costs_hours_by_operations_and_more_at_a_larger_size(printed, monkeypatch):
    unet, *others = bench.configs("tiny")
    unet |= dict(block_out_channels=[16, 32], cross_attention_dim=32)
    monkeypatch.setattr(bench, "configs", lambda model: (unet, *others))
    rows = printed("--cost", "--tflops", "0.005")
    small, large = rows[:4], rows[4:]
    assert [row["stage"] for row in small] == [row["stage"] for row in large] and len(large) == 4
    for row in rows:
        operations, hours = float(row["operations"]), float(row["hours at 0.005 TFLOP/s"])
        assert hours > 0 and hours == pytest.approx(operations / 5e9 / 3600, rel=0.1, abs=0.5)
    for a, b in zip(small, large):                                 # four times the pixels
        assert 3.9 * float(a["operations"]) <= 1.1 * float(b["operations"]) < float("inf")
        assert float(b["disk, GB, at most"]) == pytest.approx(4 * float(a["disk, GB, at most"]), rel=0.1)


def test_an_edit_training_steps_and_candidates_of_tiny_are_timed(printed):
    small = "--model", "tiny", "--size", "32", "--frames", "2", "--steps", "1", "--runs", "1"
    rows = {row["what"]: row for row in printed(*small) + printed("--training", *small)}
    assert rows.keys() >= {"a frame of an edit, 1 steps, FFG", "U-Net, 2 frames, with motion and EPM",
                           "VAE decode, per frame", "clip candidate, 1 steps, FFG", "training step, a clip",
                           "curate.py images, a candidate, 1 steps, networks loaded"}
    for row in rows.values():
        rate, median, best, cpu = (float(row[name]) for name in ("a second", "s", "min", "CPU s"))
        assert 0 < best <= median < float("inf") and cpu > 0 and rate * best == pytest.approx(1, rel=0.02)
