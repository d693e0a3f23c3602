"""What a command says while it works: a live line on a terminal, plain lines elsewhere."""

import copy
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import time

import pytest

from ffcv_ssl.training import console
from ffcv_ssl.training.console import (
    ERASE,
    Console,
    LiveConsole,
    PlainConsole,
    in_words,
    is_terminal,
    showing,
)
from ffcv_ssl.training.world import World


class Terminal:
    """A pseudo-terminal; `stream` writes to it, `text()` is what it has received."""

    def __init__(self, columns=120):
        self.reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        os.set_blocking(self.reader, False)
        self.stream = open(writer, "w", buffering=1)  # noqa: SIM115
        self.received = b""

    def text(self):
        try:
            while piece := os.read(self.reader, 1 << 16):
                self.received += piece
        except BlockingIOError:
            pass
        return self.received.decode()

    def screen(self):
        """The lines that are left to see, without colors."""
        lines = [""]
        for piece in self.text().replace("\r\n", "\n").split("\n"):
            lines[-1] = piece.rpartition(ERASE)[2]
            lines.append("")
        return lines[:-1]


@pytest.fixture
def attach(monkeypatch):
    """attach(): from now on stdout and stderr are a terminal, which it returns. (Between fixtures
    and test pytest puts its own streams there.)"""

    def attach():
        made = Terminal()
        for name in ("WORLD_SIZE", "SLURM_STEP_ID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stdout", made.stream)
        monkeypatch.setattr(sys, "stderr", made.stream)
        monkeypatch.setattr(console, "REDRAW_S", 0.01)
        return made

    return attach


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which a test sets: clock[0]."""
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    return now


def wait_for(is_true):
    began = time.monotonic()
    while not is_true():
        assert time.monotonic() - began < 10
        time.sleep(0.005)


def test_a_phase_is_one_line_below_whatever_is_printed(attach):
    terminal = attach()
    with showing("auto", World()) as shown, shown.phase("evaluating", 40) as phase:
        assert isinstance(shown, LiveConsole)
        phase.advance(10)
        print("first line")
        print("a warning", file=sys.stderr)
        wait_for(lambda: "10 of 40 images" in terminal.screen()[-1])
        *above, last = terminal.screen()
        assert above == ["first line", "a warning"] and last.startswith("evaluating  ")
    assert terminal.screen() == ["first line", "a warning", ""]


def test_a_line_that_is_printed_in_pieces_stays_whole(attach):
    terminal = attach()
    with showing("auto", World()) as shown, shown.phase("evaluating", 40):
        wait_for(lambda: "0 of 40" in terminal.text())
        print("half", end="", file=sys.stderr)
        time.sleep(0.05)
        print(" and half", file=sys.stderr)
    assert terminal.screen() == ["half and half", ""]


def test_after_an_error_the_terminal_is_as_before(attach):
    terminal = attach()
    with pytest.raises(KeyboardInterrupt), showing("auto", World()) as shown:
        with shown.phase("evaluating", 40):
            raise KeyboardInterrupt
    assert terminal.screen() == [""] and sys.stderr is sys.stdout is terminal.stream
    assert "\x1b[?25l" not in terminal.text()  # the cursor was never hidden
    assert not any(thread.name == "console" for thread in console.threading.enumerate())


def test_stdout_that_is_no_terminal_gets_nothing_of_the_line(attach, monkeypatch):
    terminal = attach()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with showing("auto", World()) as shown, shown.phase("evaluating", 40) as phase:
        phase.advance(10)
        print('{"a": 1}')
        wait_for(lambda: "10 of 40 images" in terminal.text())
        assert sys.stdout.getvalue() == '{"a": 1}\n'


@pytest.mark.parametrize("columns", [20, 40, 69, 80, 200])
def test_the_line_is_narrower_than_the_terminal(monkeypatch, columns):
    made = Terminal(columns)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", made.stream)
    shown = LiveConsole()
    with shown.phase("evaluating the untrained network", 123456, beyond=lambda: "  (run: 3 h)"):
        line = made.screen()[-1]
    shown.close()
    plain = re.sub(r"\x1b\[[\d;]*m", "", line)
    assert 0 < len(plain) < columns and "\x1b" not in plain


def test_several_ranks_and_dumb_terminals_get_plain_lines(attach):
    attach()
    assert is_terminal({"TERM": "xterm"})
    for name in ("WORLD_SIZE", "SLURM_STEP_ID"):
        assert not is_terminal({"TERM": "xterm", name: "1"})
    assert not is_terminal({"TERM": "dumb"}) and not is_terminal({})
    with showing("plain", World()) as shown:
        assert isinstance(shown, PlainConsole)
    for world, setting in ((World(1, 2), "auto"), (World(), "none")):
        with showing(setting, world) as shown:
            assert type(shown) is Console and shown is world.console


def test_an_announced_phase_says_at_once_what_it_does_and_soon_how_long_it_takes(clock):
    lines = []
    with PlainConsole(lines.append).phase("evaluating", 8021, announced=True) as phase:
        assert lines == ["evaluating: 8,021 images"]
        before_batch = phase.counting(lambda: None, 256)
        for seconds in (2.0, 3.5, 5.0, 6.5):  # 2 s for the first batch to come
            clock[0] = seconds
            before_batch()
    # 256 images in 1.5 s: 46 s in all after 2 s
    assert lines == ["evaluating: 8,021 images", "evaluating: about 49 s"]


def test_a_short_phase_and_a_phase_that_is_not_announced_say_nothing(clock):
    lines = []
    shown = PlainConsole(lines.append)
    with shown.phase("evaluating", 100, announced=True) as phase:
        for clock[0] in (1.0, 2.5, 4.0):
            phase.advance(40)
    assert lines == ["evaluating: 100 images"]
    for step in shown.over(range(100), "epoch 2 of 5", 100):
        clock[0] = 4.0 + step / 2
    assert len(lines) == 1


def test_where_nothing_was_said_for_a_minute_there_is_a_line(clock):
    lines = []
    for number in PlainConsole(lines.append).over(range(100), "epoch 2 of 5", 100):
        clock[0] = 2.0 * (number + 1)
    assert lines == [
        "epoch 2 of 5: 30%, 2 min left",
        "epoch 2 of 5: 60%, 80 s left",
        "epoch 2 of 5: 90%, 20 s left",
    ]


def test_durations_are_said_as_people_say_them():
    seconds = [0.4, 40, 99, 100, 3599, 3600, 6300, 100_000, 900_000]
    assert [in_words(s) for s in seconds] == [
        "0 s", "40 s", "99 s", "2 min", "1 h", "1 h", "1 h 45 min", "27 h 47 min", "10 days 10 h",
    ]  # fmt: skip


def test_drawing_takes_less_than_a_thousandth_of_the_time(attach):
    attach()
    with showing("auto", World()) as shown, shown.phase("evaluating", 10_000) as phase:
        began, drawn = time.thread_time(), 50
        for _ in range(drawn):
            shown._draw()
        a_drawing_s = (time.thread_time() - began) / drawn
        began = time.thread_time()
        for _ in range(5000):
            phase.advance()
        an_advance_s = (time.thread_time() - began) / 5000
    # at the interval that is set outside of this test; with room for slow machines
    assert a_drawing_s < 0.004 and an_advance_s < 20e-6


def test_a_copy_of_a_world_shares_its_console(attach):
    attach()
    world = World()
    with showing("auto", world) as shown:
        assert copy.deepcopy(world).console is shown
