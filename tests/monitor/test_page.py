"""The page loads nothing, runs no text of users' files, and stays small."""

import base64
import hashlib
import html.parser
import json
import re

import pytest
from support.metric_runs import training_record, write_config, write_metric_run, write_records
from support.small_files import REPOSITORY

from ffcv_ssl.monitor.board import Board
from ffcv_ssl.monitor.page import SCRIPTS, as_data, make_page

MEGABYTE = 10**6
EVIL = "</script><script>alert(1)</script><!--<script>&lt;\u2028"


class Elements(html.parser.HTMLParser):
    """The elements of a page, and the texts of its scripts."""

    def __init__(self, page):
        super().__init__()
        self.found, self.scripts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def page_of(*paths):
    board = Board(paths)
    board.refresh()
    return make_page(board.since("", 0), {"written": "now"})


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory):
    """The page of a run whose every text is an attack."""
    folder = tmp_path_factory.mktemp("evil") / "<script>alert(1)<" / "img src=x onerror=alert(2)>"
    folder.mkdir(parents=True)
    write_records(folder, [{**training_record(1), EVIL: 1, f"val/{EVIL}/top1": 0.5}])
    write_config(folder, method=EVIL, **{EVIL: EVIL})
    (folder / "results.jsonl").write_text(
        json.dumps({"protocol": EVIL, "metrics": {EVIL: {"top1": 1}}})
    )
    return page_of(folder)


def test_texts_of_users_are_data_only(evil_page):
    elements = Elements(evil_page)
    assert [tag for tag, _ in elements.found].count("script") == 3
    assert "alert(" not in elements.scripts[1] + elements.scripts[2]
    data = json.loads(elements.scripts[0])
    assert EVIL in data["update"]["runs"][0]["tables"]["training"]["columns"]
    assert data["update"]["runs"][0]["config"][" ".join(EVIL.split())]


def test_a_policy_allows_these_scripts_alone_and_no_address(evil_page):
    elements = Elements(evil_page)
    (policy,) = [a["content"] for _, a in elements.found if a.get("http-equiv")]
    digests = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in elements.scripts[1:]
    ]
    assert re.findall("'sha256-(.*?)'", policy) == digests
    assert policy.startswith("default-src 'none';") and "http" not in policy
    assert "unsafe-eval" not in policy


def test_nothing_is_loaded(evil_page):
    for tag, attributes in Elements(evil_page).found:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith(("#", "data:")), tag


def test_data_survive_and_have_no_tags():
    value = {EVIL: [EVIL, 1.5, None]}
    assert json.loads(as_data(value)) == value
    assert not set("<>&") & set(as_data(value))
    with pytest.raises(ValueError):
        as_data(float("nan"))


def test_the_page_of_long_and_of_many_runs_stays_small(tmp_path):
    write_records(tmp_path / "long", (training_record(step) for step in range(1, 9001)))
    for number in range(40):
        write_metric_run(tmp_path / f"many/{number}", 300)
    for name in ("long", "many"):
        assert len(page_of(tmp_path / name)) < 8 * MEGABYTE


def test_every_asset_is_in_the_page_and_in_a_wheel(evil_page):
    folder = REPOSITORY / "ffcv_ssl/monitor/assets"
    assert {path.name for path in folder.iterdir()} == {*SCRIPTS, "page.css"}
    for path in folder.iterdir():
        assert path.read_text().strip() in evil_page
    assert '"ffcv_ssl.monitor": ["assets/*"]' in (REPOSITORY / "setup.py").read_text()
