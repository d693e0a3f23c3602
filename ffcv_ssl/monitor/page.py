"""The page: one HTML file with its styles, its scripts and plotly.js, that loads nothing.

What stands in users' files reaches the page as JSON alone, in a block that is not executed; the
scripts write it as text. A Content-Security-Policy allows these scripts, by their digests, and no
others.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

SCRIPTS = (
    "elements.js",
    "store.js",
    "theme.js",
    "panels.js",
    "tables.js",
    "views.js",
    "runs.js",
    "main.js",
)
GENERATOR = "ffcv-ssl monitor"

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{generator}">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>ffcv-ssl monitor</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#panels">Skip to the curves</a>
<header>
<h1>ffcv-ssl monitor</h1>
<p id="status" role="status"></p>
</header>
<noscript><p>This page draws its curves with JavaScript; allow it to run.</p></noscript>
<main>
<section id="headlines" aria-label="Headline numbers"></section>
<section id="runs" aria-labelledby="runs-title" hidden></section>
<div id="toolbar"></div>
<section id="panels" aria-label="Curves" tabindex="-1"></section>
<section id="views" aria-labelledby="views-title" hidden></section>
<section id="finals" aria-labelledby="finals-title" hidden></section>
<section id="evaluations" aria-labelledby="evaluations-title" hidden></section>
<section id="config" aria-labelledby="config-title" hidden></section>
</main>
<script type="application/json" id="board">{board}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def make_page(update: dict[str, Any] | None, about: dict[str, Any]) -> str:
    """The page as HTML.

    update: what `Board.since` gives, or None for a page that asks its server for it. about: further
    facts for the scripts: `written` (text) or `poll_s`.
    """
    plotly, script = _inline(_plotly()), _inline(_script())
    return _PAGE.format(
        generator=GENERATOR, policy=_policy(plotly, script), style=_asset("page.css"),
        board=as_data({"update": update, **about}), plotly=plotly, script=script,
    )  # fmt: skip


def as_data(value: Any) -> str:
    """JSON that is the same inside HTML: without the characters that could end a script."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _script() -> str:
    parts = "\n".join(_asset(name) for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}\n}})();'


def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """A script as it may stand between tags, the very text whose digest the browser makes."""
    return script.replace("\r\n", "\n").replace("</script", "<\\/script")


def _policy(*scripts: str) -> str:
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
