"""Progress as a bar or as lines."""

import re
import sys

import pytest
from detectron2.utils.events import EventStorage

from ia_gcn.engine.progress import LONGEST, SHORTEST, ProgressBar, ProgressWriter


class Clock:
    """Seconds that pass only when a test lets them."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def test_lines_come_at_once_and_then_less_and_less_often(clock, capsys):
    times = []
    bar = ProgressBar(desc="work", total=2000)
    for _ in range(2000):
        out = capsys.readouterr().out
        times += [clock.now] * len(out.splitlines())
        clock.now += 1
        bar.update()
    bar.close()
    assert times[0] == 0
    gaps = [b - a for a, b in zip(times, times[1:])]
    assert gaps[0] == SHORTEST
    assert gaps == sorted(gaps)
    # A second may pass before the next update.
    assert LONGEST <= gaps[-1] <= LONGEST + 1
    assert capsys.readouterr().out.splitlines()[-1] == "work 2000/2000, ETA 00:00, 1.00it/s"


def test_a_line_is_plain_text_and_comes_once(clock, capsys):
    bar = ProgressBar(desc="work", total=3)
    clock.now += SHORTEST
    bar.update(3)
    bar.close()
    out, err = capsys.readouterr()
    assert err == ""
    assert len(out.splitlines()) == len(set(out.splitlines())) == 2
    assert not re.search(r"[\r\x1b]", out)


def test_what_is_over_soon_shows_nothing(clock, capsys):
    for _ in ProgressBar(range(10), "evaluation", delay=SHORTEST, leave=False):
        clock.now += 0.1
    assert capsys.readouterr() == ("", "")


def test_a_disabled_one_shows_nothing(capsys):
    assert list(ProgressBar(range(3), "evaluation", disable=True)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = ProgressBar(desc="work", total=3)
    clock.now += 1
    bar.update()
    bar.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" in err
    assert "1/3" in err


def test_a_training_shows_losses_rate_and_metric(clock, capsys):
    writer = ProgressWriter(max_iter=40, iterations_per_epoch=4)
    with EventStorage(10) as storage:
        for iteration in range(10, 40):
            storage.iter = iteration
            storage.put_scalars(total_loss=0.5, loss_kl=0.25)
            storage.put_scalar("lr", 0.002, smoothing_hint=False)
            if iteration == 20:
                storage.put_scalar("multi_label/mAP", 61.239, smoothing_hint=False)
                storage.put_scalar("ema/multi_label/mAP", 63.5, smoothing_hint=False)
            clock.now += 2
            writer.write()
        storage.iter = 40
        writer.write()
    writer.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "iteration 11/40, ETA ?, ?it/s, epoch 2.8/10, total_loss 0.5, loss_kl 0.25, lr 0.002"
    )
    assert lines[-1].startswith("iteration 40/40, ETA 00:00, ")
    assert lines[-1].endswith("lr 0.002, mAP 61.24, ema/mAP 63.50")
    assert sum(line.startswith("iteration 40/40") for line in lines) == 1
