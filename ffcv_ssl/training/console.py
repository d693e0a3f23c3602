"""What a command says while it works: one live line on a terminal, plain lines elsewhere.

    with showing("auto", world) as console:
        with console.phase("evaluating", 8021, "images") as phase:
            for batch in loader:
                phase.advance(len(batch))

Guarantees: the live line is on stderr, below all other lines, which stay as they are; stdout gets
nothing of it. The cursor is never hidden, so that even a kill leaves a terminal in order. Plain
lines are on stdout: those of phases that are announced, and one where nothing was said for a
minute.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Setting = Literal["auto", "plain", "none"]

REDRAW_S = 0.5
"""Seconds between two drawings of the live line, which take 0.3 ms."""
PLAIN_S, WORTH_A_LINE_S, MEASURED_S = 60.0, 5.0, 1.0
"""Seconds without a plain line after which there is one; what must be left of a phase for its
estimate to be said; what must be seen of it for an estimate."""
BAR_WIDTH, NARROW = 24, 70
ERASE = "\r\x1b[2K"
_LAUNCHED = ("WORLD_SIZE", "SLURM_STEP_ID")  # by torchrun, by srun: several ranks, one terminal


def in_words(seconds: float) -> str:
    """A duration as one would say it: 40 s, 12 min, 1 h 45 min, 3 days 4 h."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} days {hours % 24} h"


class Phase:
    """Something that takes a while: `advance` counts what is done of `total` units."""

    def __init__(
        self, console: Console, name: str, total: int, unit: str, beyond: Callable[[], str]
    ) -> None:
        self.console, self.name, self.total, self.unit = console, name, total, unit
        self.done, self.counted_s, self.beyond = 0, 0.0, beyond
        self.began = self.spoke = time.perf_counter()
        self.first: tuple[float, int] | None = None
        self.is_announced = self.is_estimated = False

    def advance(self, amount: int = 1) -> None:
        """Count `amount` units as done."""
        self.done = min(self.total, self.done + amount)
        now = time.perf_counter()
        if self.first is None:  # what comes before it may be the start of threads and kernels
            self.first = now, self.done
        self.counted_s = now - self.first[0]
        self.console.on_advance(self, now)

    def counting(self, call: Callable[[], object], amount: int) -> Callable[[], None]:
        """A function for the beginning of each batch of `amount`: it calls `call`, and counts the
        batch before as done."""
        batches = 0

        def at_batch() -> None:
            nonlocal batches
            call()
            self.advance(amount if batches else 0)
            batches += 1

        return at_batch

    @property
    def per_s(self) -> float | None:
        """Units per second, or None as long as too little is known."""
        if self.first is None or self.counted_s <= 0 or self.done <= self.first[1]:
            return None
        return (self.done - self.first[1]) / self.counted_s

    @property
    def left_s(self) -> float | None:
        """Seconds to the end, or None as long as too little is known."""
        return None if self.per_s is None else (self.total - self.done) / self.per_s


class Console:
    """Says nothing of phases: the setting `none`, and ranks that do not print."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Console:
        """A copy of a world, as in a copy of a method, shares its console."""
        return self

    @contextlib.contextmanager
    def phase(
        self,
        name: str,
        total: int,
        unit: str = "images",
        announced: bool = False,
        beyond: Callable[[], str] = str,
        done: int = 0,
    ) -> Iterator[Phase]:
        """The block is a phase. announced: plain lines say its name at once, and how long it takes
        as soon as that is known. beyond: returns what else is to be said at the end of a line.
        done: what was done before."""
        phase = Phase(self, name, total, unit, beyond)
        phase.is_announced, phase.done = announced, done
        self.on_begin(phase)
        try:
            yield phase
        finally:
            self.on_end(phase)

    def over(
        self, items: Iterable[T], name: str, total: int, unit: str = "steps", **options: Any
    ) -> Iterator[T]:
        """Yield the items; each counts as done when the next one is asked for."""
        with self.phase(name, total, unit, **options) as phase:
            for item in items:
                yield item
                phase.advance()

    def on_begin(self, phase: Phase) -> None:
        """Called when a phase begins."""

    def on_advance(self, phase: Phase, now: float) -> None:
        """Called when something of a phase is done."""

    def on_end(self, phase: Phase) -> None:
        """Called when a phase ends."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainConsole(Console):
    """Lines on stdout, said by `say`: the name of an announced phase, how long a phase is going to
    take, and once a minute where it is."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self.say = say

    def on_begin(self, phase: Phase) -> None:
        if phase.is_announced:
            self.say(f"{phase.name}: {phase.total:,} {phase.unit}")

    def on_advance(self, phase: Phase, now: float) -> None:
        if phase.left_s is None:
            return
        if phase.is_announced and not phase.is_estimated and phase.counted_s >= MEASURED_S:
            phase.is_estimated = True
            if phase.left_s >= WORTH_A_LINE_S:
                whole_s = now - phase.began + phase.left_s
                self._say(phase, f"about {in_words(whole_s)}", now)
        elif now - phase.spoke >= PLAIN_S and phase.done < phase.total:
            share = phase.done / phase.total
            self._say(phase, f"{share:.0%}, {in_words(phase.left_s)} left", now)

    def _say(self, phase: Phase, text: str, now: float) -> None:
        phase.spoke = now
        self.say(f"{phase.name}: {text}{phase.beyond()}")


class LiveConsole(Console):
    """One line on stderr, drawn anew twice a second by a thread while a phase runs."""

    def __init__(self) -> None:
        from rich.console import Console as RichConsole

        self.stream, self.phases = sys.stderr, list[Phase]()
        self.rich = RichConsole(file=self.stream)
        self.lock, self.ended = threading.RLock(), threading.Event()
        self.is_drawn = self.is_within_line = False  # the line; what others have printed
        self.former = sys.stdout, sys.stderr
        sys.stderr = _AboveLine(sys.stderr, self)  # type: ignore[assignment]
        if sys.stdout is not None and sys.stdout.isatty():
            sys.stdout = _AboveLine(sys.stdout, self)  # type: ignore[assignment]
        self.thread = threading.Thread(target=self._keep_drawing, name="console", daemon=True)
        self.thread.start()

    def on_begin(self, phase: Phase) -> None:
        with self.lock:
            self.phases.append(phase)
        self._draw()

    def on_end(self, phase: Phase) -> None:
        with self.lock:
            self.phases.remove(phase)
        self._draw()

    def close(self) -> None:
        self.ended.set()
        self.thread.join(timeout=5)
        with self.lock:
            self.phases.clear()
            self.erase()
        for name, former in zip(("stdout", "stderr"), self.former):
            if isinstance(getattr(sys, name), _AboveLine):
                setattr(sys, name, former)

    def erase(self) -> None:
        """Take the line off the terminal; the lock must be held."""
        if self.is_drawn:
            self.is_drawn = False
            with contextlib.suppress(OSError, ValueError):  # a terminal that was closed
                self.stream.write(ERASE)
                self.stream.flush()

    def _keep_drawing(self) -> None:
        while not self.ended.wait(REDRAW_S):
            self._draw()

    def _draw(self) -> None:
        with self.lock, contextlib.suppress(OSError, ValueError):
            if not self.phases or self.is_within_line:
                self.erase()
                return
            self.stream.write(ERASE + self._line(self.phases[-1]))
            self.stream.flush()
            self.is_drawn = True

    def _line(self, phase: Phase) -> str:
        """The phase in at most a terminal's width."""
        from rich.progress_bar import ProgressBar

        seconds = time.perf_counter() - phase.began
        parts = [f"{phase.done:,} of {phase.total:,} {phase.unit}", in_words(seconds)]
        if phase.left_s is not None:
            parts[1:] = [f"{phase.per_s:.3g}/s", f"{in_words(phase.left_s)} left"]
        text = "  ".join(parts) + phase.beyond()
        room = self._width() - 1
        if room < NARROW:
            return f"{phase.name}  {text}"[:room]
        with self.rich.capture() as bar:
            self.rich.print(ProgressBar(max(1, phase.total), phase.done, width=BAR_WIDTH), end="")
        room -= BAR_WIDTH + 4
        name = phase.name[: max(10, room - len(text))]
        return f"{name}  {bar.get()}  {text[: room - len(name)]}"

    def _width(self) -> int:
        """Columns of the terminal, which its user may change at any time."""
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80


class _AboveLine:
    """A stream whose lines come above the live line of a console."""

    def __init__(self, stream: Any, console: LiveConsole) -> None:
        self._stream, self._console = stream, console

    def write(self, text: str) -> int:
        with self._console.lock:
            self._console.erase()
            number = self._stream.write(text)
            if text:
                self._console.is_within_line = not text.endswith("\n")
            if text.endswith("\n"):
                self._stream.flush()
            return number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_terminal(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether stderr is a terminal of this process alone that can erase a line."""
    is_launched = any(name in environment for name in _LAUNCHED)
    if is_launched or environment.get("TERM", "dumb") == "dumb" or sys.stderr is None:
        return False
    return sys.stderr.isatty()


@contextlib.contextmanager
def showing(setting: str, world: Any) -> Iterator[Console]:
    """Within the block, `world.console` shows phases as `setting` says: auto, plain or none."""
    before = world.console
    world.console = Console()
    if world.is_first and setting != "none":
        is_live = setting == "auto" and is_terminal()
        world.console = LiveConsole() if is_live else PlainConsole(world.say)
    try:
        yield world.console
    finally:
        world.console.close()
        world.console = before
