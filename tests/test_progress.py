"""Progress on a terminal of 80 columns and in a log."""

import io

import pytest

from emomerge import progress
from emomerge.progress import Display, PlainConsole, times


def display(monkeypatch, *, terminal, now=None):
    made = Display()
    made.console = PlainConsole(
        file=io.StringIO(),
        width=80,
        force_terminal=terminal,
        color_system=None,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    if now is not None:
        monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return made


def test_in_80_columns_only_the_note_is_cut(monkeypatch):
    shown = display(monkeypatch, terminal=True)
    with shown.live():
        waiting = shown.line("long-adamw-0.0001-0", 12_000, "waiting", begun=False)
        line = shown.line("merge soup-of-rounds-seed12345", 15_000)
        line.at(4_000)
        line.at(15_000, "loss 1.2345  emoPulse 1.23e-04, which is more than fits")
    last = shown.console.file.getvalue().split("\x1b[2K")[-1]
    rows = [row.strip() for row in last.splitlines() if "15,000" in row or "12,000" in row]
    assert all(len(row) <= 80 for row in rows)
    done = next(row for row in rows if "15,000" in row)
    assert done.startswith("✓ merge soup-of-…") and "15,000/15,000 0:00" in done and done.endswith("…")
    assert "loss 1.2345" in done
    begun = next(row for row in rows if "12,000" in row)
    assert "0/12,000" in begun and ":" not in begun  # its time has not begun
    assert begun.endswith("waiting")
    del waiting


def test_a_line_that_ends_early_is_done(monkeypatch):
    shown = display(monkeypatch, terminal=True)
    with shown.live():
        line = shown.line("long-tion-0", 200)
        line.at(83, "loss 0.1")
        line.end()
    last = shown.console.file.getvalue().split("\x1b[2K")[-1]
    (row,) = (row.strip() for row in last.splitlines() if "long-tion-0" in row)
    assert row.startswith("✓ long-tion-0") and "83/83" in row and "left" not in row


@pytest.mark.parametrize(
    ("elapsed", "left", "finished", "text"),
    [
        (None, None, False, ""),
        (5.4, None, False, "0:05"),
        (59.6, 3599.7, False, "1:00, 1:00:00 left"),
        (3725, 0, True, "1:02:05"),
    ],
)
def test_times(elapsed, left, finished, text):
    assert times(elapsed, left, finished=finished) == text


def test_a_log_tells_once_a_minute_and_at_the_end(monkeypatch):
    now = [100.0]
    shown = display(monkeypatch, terminal=False, now=now)
    with shown.live():
        line = shown.line("sens-0", 2_000, "waiting", begun=False)
        now[0] = 500.0
        line.at(400, "loss 3")  # resumed
        for step in range(401, 2_001):
            now[0] += 0.1
            line.at(step, f"loss {step}")
        line.at(2_000, "again")
    assert shown.console.file.getvalue().splitlines() == [
        "sens-0: 1,000/2,000 (50%), 1:00, 1:40 left, loss 1000",
        "sens-0: 1,600/2,000 (80%), 2:00, 0:40 left, loss 1600",
        "sens-0: 2,000/2,000, 2:40, loss 2000",
    ]


def test_outside_of_the_block_nothing_is_shown(monkeypatch):
    shown = display(monkeypatch, terminal=False)
    shown.line("x", 1).at(1)
    shown.line("x", 1).add()
    assert shown.console.file.getvalue() == ""
