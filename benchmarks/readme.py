"""Writes the table of benchmarks/results/loader.json into README.md, between its two markers.

python -m benchmarks.readme            # rewrite the table
python -m benchmarks.readme --check    # exit 1 if README.md does not have it
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "loader.json"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def make_table(record: dict) -> str:
    """The Markdown table of one result file."""
    results, found = record["results"], record["ratios"]
    columns = list(results["ffcv-ssl"])
    lines = ["| images/s | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for peer, row in results.items():
        cells = [f"{row[c]['images_per_s']:,.0f}" if c in row else "" for c in columns]
        lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    shares = [f"{found[c]['share_of_bare_decode']:.0%}" for c in columns]
    lines.append("| ffcv-ssl, share of the bare decode | " + " | ".join(shares) + " |")
    for peer in results:
        if f"times_{peer}" in found[columns[0]]:
            cells = [
                f"{found[c].get(f'times_{peer}', 0):.1f} x".replace("0.0 x", "") for c in columns
            ]
            lines.append(f"| ffcv-ssl, against {peer} | " + " | ".join(cells) + " |")
    images, machine = record["images"], record["machine"]
    lines += [
        "",
        f"Two views at 224 px of {images['images']} photographs (max side 500, quality 90, mean "
        f"{images['mean_bytes'] // 1000} kB), {machine['threads']} threads of {machine['cpu']}, "
        "medians of "
        f"{results['ffcv-ssl'][columns[0]]['runs']} interleaved runs on {record['date']}. From "
        "`Loader(...)` to the first batch in a second process: "
        f"{record['start_up']['warm_s']:.2f} s.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    wanted = f"{head}{BEGIN}\n{make_table(json.loads(RESULTS.read_text()))}\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        if text != wanted:
            print(
                "README.md: its table differs from benchmarks/results/loader.json; "
                "run python -m benchmarks.readme"
            )
            sys.exit(1)
        return
    readme.write_text(wanted)


if __name__ == "__main__":
    main()
