"""docs/errors.md: every line with which the project refuses something, its cause and its cure.

The lines are read off the sources (benchmarks/refusals.py); `python -m benchmarks.readme` writes
the page. Cause and cure are said by the messages themselves and by the condition in the code: to
change what stands here, change the message. Where a message only says what is wrong, its cure is in
benchmarks/cures.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.cures import ACTIONS, cure_by_words, last_cure
from benchmarks.refusals import Refusal, find_refusals

# Title of a room, and the beginnings of the paths that belong to it; the first that fits counts.
ROOMS = {
    "Commands and their settings": (
        "ffcv_ssl/config", "train.py", "evaluate.py", "write_dataset.py", "demo.py",
        "ffcv_ssl/evaluation/protocol_settings", "ffcv_ssl/evaluation/command_words",
        "ffcv_ssl/evaluation/protocol_calls",
    ),
    "Views and ops": ("pipelines", "ffcv_ssl/transforms", "ffcv_ssl/pipeline"),
    "Images to write": ("ffcv_ssl/sources",),
    "Writing a file": ("ffcv_ssl/writer", "ffcv_ssl/fields"),
    "Reading a file": ("ffcv_ssl/reader", "ffcv_ssl/beton", "ffcv_ssl/inspect"),
    "Loading": ("ffcv_ssl/loader", "ffcv_ssl/traversal_order"),
    "Methods": ("ffcv_ssl/methods",),
    "Training": ("ffcv_ssl/training", "ffcv_ssl/files"),
    "Evaluation": ("ffcv_ssl/evaluation",),
    "Jobs and chains": ("ffcv_ssl/jobs",),
    "Watching": ("ffcv_ssl/monitor",),
    "Python names": ("ffcv_ssl",),
}  # fmt: skip
EXIT_CODES = {"NonFiniteLoss": 1, "Interrupted": 75}
USERS = ("UserError", "BetonError", "CheckpointError", "SourceError", "SampleError", "")
LONGEST_CONDITION = 90


def tables(results: Path) -> dict[str, str]:
    """{name of its markers: the list}. `results` has no part in it."""
    return {"refusals": page()}


def page() -> str:
    """The list of messages, room by room."""
    rooms: dict[str, list[Refusal]] = {title: [] for title in ROOMS}
    for refusal in find_refusals():
        rooms[room_of(refusal.file)].append(refusal)
    total = sum(map(len, rooms.values()))
    parts = [f"{total} messages."]
    for title, refusals in rooms.items():
        parts.append(f"## {title}")
        ordered = sorted(refusals, key=lambda refusal: sort_key(refusal.shown()))
        parts += list(dict.fromkeys(entry(refusal) for refusal in ordered))
    return "\n\n".join(parts)


def room_of(file: str) -> str:
    """The title under which the messages of a file stand."""
    return next(title for title, begins in ROOMS.items() if file.startswith(begins))


def sort_key(line: str) -> str:
    """By the first fixed words: placeholders do not count."""
    return re.sub(r"<[^<> ]*>|\W", "", line).lower()


def entry(refusal: Refusal) -> str:
    """One message: its line, when it comes, and what to do."""
    line = refusal.shown()
    tick = "``" if "`" in line else "`"
    cure = cure_of(refusal)
    return f"- {tick}{line}{tick}\n  - when: {cause_of(refusal)}\n  - to do: {cure}"


def cause_of(refusal: Refusal) -> str:
    """Where the message comes from and under which condition, with the class of the error."""
    condition = refusal.condition
    where = f"`{refusal.function}` of `{refusal.file}`"
    if condition.startswith("except"):
        where += f" met {condition.removeprefix('except').strip(' ()') or 'an error'}"
    elif condition and len(condition) <= LONGEST_CONDITION:
        where += f" found `{condition}`"
    return f"{where}; {error_of(refusal.error)}"


def error_of(name: str) -> str:
    """The class, and the exit code of a command that always ends with it."""
    code = EXIT_CODES.get(name, 2)
    parts = [name] * bool(name) + [f"exit code {code}"] * (name in (*USERS, *EXIT_CODES))
    return ", ".join(parts)


def cure_of(refusal: Refusal) -> str:
    """What to do: what the message asks for, else a cure of this kind of message, else what the
    message expected. Empty if none is known."""
    line = refusal.shown()
    return _asked_for(line) or cure_by_words(refusal) or _expected(line) or last_cure(refusal)


def _asked_for(line: str) -> str:
    """What follows the first semicolon of a message, from the first clause that begins with a word
    of action."""
    _, _, remedy = line.partition("; ")
    clauses = re.finditer(r"(?:^|[,:;?] )([a-z-]+)", remedy)
    begins = [clause.start(1) for clause in clauses if clause[1] in ACTIONS]
    return remedy[begins[0] :] if begins else ""


def _expected(line: str) -> str:
    """What a message expected, without the facts that follow."""
    for word in ("expected ", "must be "):
        if word in line:
            wanted = line.rpartition(word)[2].partition("; ")[0]
            if re.match(r"[-\d<]\S* to ", wanted):
                return f"give a value from {wanted}"
            is_limit = re.match(
                r"(at most|at least|below|above|more than|less than|-1 or) ", wanted
            )
            return f"give a value that is {wanted}" if is_limit else f"give {wanted}"
    return ""
