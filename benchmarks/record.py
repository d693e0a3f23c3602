"""Where a benchmark's numbers go."""

import json


def write_record(record, path):
    """Write a record (dict) as indented JSON, so that a change of it reads as a diff; path None:
    nowhere."""
    if path is not None:
        with open(path, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
