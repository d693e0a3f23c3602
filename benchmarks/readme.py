"""Writes what is generated: into the documents, between markers, the tables of benchmarks/results/
and the list of refusals (docs/errors.md); and the words that a shell completes.

python -m benchmarks.readme            # rewrite the tables
python -m benchmarks.readme --check    # exit 1 if a file does not have them
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import completion_words, errors_page, reliability_page, scaling_page

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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


def tables() -> dict[tuple[str, str], str]:
    """{(file, name of its markers): table}."""
    record = json.loads((RESULTS / "loader.json").read_text())
    pages = {("README.md", "table"): make_table(record)}
    for module in (scaling_page, reliability_page, errors_page):
        page = module.__name__.split(".")[-1].removesuffix("_page")
        for name, table in module.tables(RESULTS).items():
            pages[f"docs/{page}.md", name] = table
    return pages


def main() -> None:
    """Run the command."""
    is_check = "--check" in sys.argv[1:]
    for (file, name), table in tables().items():
        path, begin, end = ROOT / file, f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        text = path.read_text()
        head, rest = text.split(begin)
        _, tail = rest.split(end)
        wanted = f"{head}{begin}\n{table}\n{end}{tail}"
        if is_check and text != wanted:
            print(f"{file}: its {name} is not what benchmarks.readme writes; run it")
            sys.exit(1)
        if not is_check:
            path.write_text(wanted)
    words = completion_words.text()
    if is_check and words != completion_words.FILE.read_text():
        print(f"{completion_words.FILE}: not what benchmarks.readme writes; run it")
        sys.exit(1)
    if not is_check:
        completion_words.FILE.write_text(words)


if __name__ == "__main__":
    main()
