"""Where a benchmark's numbers go."""

from __future__ import annotations

import json


def write_record(record: dict, path: str | None) -> None:
    """Write a record as indented JSON, whose changes read well as a diff. None writes nothing."""
    if path is not None:
        with open(path, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
