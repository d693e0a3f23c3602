"""The page in a real browser: right values, live news, both color schemes, narrow screens."""

import json
import math
import random
import shutil

import pytest
from support.browser import open_browser
from support.metric_runs import (
    evaluation_record,
    records_of,
    training_record,
    write_config,
    write_metric_run,
    write_records,
    write_views,
)
from support.served_boards import serving

from ffcv_ssl.monitor import board as board_module
from ffcv_ssl.monitor import serve
from ffcv_ssl.monitor.board import Board
from ffcv_ssl.monitor.page import make_page
from ffcv_ssl.training.metrics_log import X_AXES

pytestmark = pytest.mark.whole

TRACES = """[...document.querySelectorAll('.plot')].flatMap((plot) => plot.data.map((trace) => ({
  panel: plot.parentNode.dataset.panel, run: trace.meta.run, key: trace.meta.key, x: trace.x,
  y: trace.y, visible: trace.visible, color: trace.line.color, mode: trace.mode})))"""
WIDTHS = "[document.documentElement.scrollWidth, window.innerWidth]"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as page:
        yield page


@pytest.fixture
def page(browser):
    """A page that is checked afterwards: no error, and no request but its own."""
    browser.show()
    yield browser
    assert browser.errors == []
    foreign = [url for url in browser.requests if not url.startswith(("file:", "data:", "blob:"))]
    assert all(url.startswith("http://127.0.0.1:") for url in foreign)


def show(page, folder, *paths):
    """Write the page of some runs and open it."""
    board = Board(paths)
    board.refresh()
    (folder / "report.html").write_text(make_page(board.since("", 0), {"written": "now"}))
    page.open(f"file://{folder}/report.html")
    page.wait_for("document.querySelector('.plot .main-svg, #panels .empty') !== null")


def traces(page, **wanted):
    """The curves that plotly.js holds, as dicts."""
    found = page.run(TRACES)
    return [one for one in found if all(one[name] == value for name, value in wanted.items())]


def test_every_panel_has_the_values_of_the_metrics(page, tmp_path):
    runs = {"a": list(records_of(40)), "b": list(records_of(25, lift=0.5))}
    runs["a"][5]["train/loss"] = None  # as a NaN is written
    for name, records in runs.items():
        write_config(write_records(tmp_path / name, records))
    show(page, tmp_path, *(tmp_path / name for name in runs))
    for axis in ("epoch", "step", "images", "flops", "seconds"):
        page.click(f"input[value={axis}]")
        found = traces(page)
        keys = {key for record in runs["a"] for key in record} - set(X_AXES)
        assert {(one["run"], one["key"]) for one in found} == {(r, k) for r in runs for k in keys}
        for one in found:
            own = [record for record in runs[one["run"]] if one["key"] in record]
            assert one["x"] == [record[axis] for record in own]
            assert one["y"] == [record[one["key"]] for record in own]
            assert one["visible"] is True


def test_headlines_and_last_numbers_are_shown(page, tmp_path):
    write_metric_run(tmp_path / "a", 40)
    write_views(tmp_path / "a")
    result = {"protocol": "linear", "metrics": {"backbone": {"top1": 0.625}}, "settings": {}}
    (tmp_path / "a/results.jsonl").write_text(json.dumps(result) + "\n")
    show(page, tmp_path, tmp_path / "a")
    card = page.run("document.querySelector('.card').innerText")
    top1 = evaluation_record(40)["val/backbone/top1"]
    for text in ("finished", f"{100 * top1:.2f} %", "70.00 %", "of 4", "10 s", "905.5"):
        assert text in card
    finals = page.run("document.getElementById('finals').innerText")
    assert "train/loss/alignment" in finals and "96" in finals
    assert "62.50 %" in page.run("document.getElementById('evaluations').innerText")
    assert "sigma 1.25" in page.run("document.getElementById('views').innerText")
    style = "[...document.querySelectorAll('.view')].map((one) => getComputedStyle(one).{})"
    pictures = page.run(style.format("backgroundImage"))
    assert len(pictures) == 2 and all(one.startswith('url("data:image/png') for one in pictures)
    assert page.run(style.format("backgroundPosition")) == ["0px 0px", "-105px 0px"]
    (tmp_path / "a/views.json").unlink()
    show(page, tmp_path, tmp_path / "a")
    page.wait_for("document.querySelector('#views img').naturalWidth === 40")
    page.click("#config summary")
    assert "optim.lr" in page.run("document.getElementById('config').innerText")


def test_panels_without_data_are_not_there(page, tmp_path):
    write_records(tmp_path / "a", [{"step": 1, "epoch": 0.1, "train/loss": 2.0}])
    show(page, tmp_path, tmp_path / "a")
    assert {one["panel"] for one in traces(page)} == {"loss"}
    assert page.run("document.getElementById('views').hidden")
    write_records(tmp_path / "a", [])
    show(page, tmp_path, tmp_path / "a")
    assert page.run("document.getElementById('panels').innerText") == "No records yet."


def test_runs_without_epochs_are_drawn_over_steps(page, tmp_path):
    write_records(tmp_path / "a", [{"step": step, "train/loss": 1 / step} for step in (1, 2, 4)])
    show(page, tmp_path, tmp_path / "a")
    (loss,) = traces(page)
    assert (loss["x"], loss["y"]) == ([1, 2, 4], [1, 0.5, 0.25])
    assert page.run("document.querySelector('input[name=axis]:checked').value") == "step"


def test_points_between_gaps_are_seen(page, tmp_path):
    values = [1.0] * 100 + [None, 5.0, None] + [1.0] * 100
    lines = [
        {"step": step, "train/loss": value, "epoch": step} for step, value in enumerate(values)
    ]
    write_records(tmp_path / "a", lines)
    show(page, tmp_path, tmp_path / "a")
    sizes = page.run("document.querySelector('.plot').data[0].marker.size")
    assert [place for place, size in enumerate(sizes) if size] == [101]
    gaps = page.run("document.querySelector('.plot').data[0].connectgaps")
    assert gaps is False


def test_a_long_run_keeps_its_peak_and_says_that_it_is_thinned(page, tmp_path):
    rng = random.Random(0)
    lines = [{"step": s, "epoch": s / 100, "train/loss": rng.random()} for s in range(1, 30_001)]
    lines[12_345]["train/loss"] = 99.0
    write_records(tmp_path / "a", lines)
    show(page, tmp_path, tmp_path / "a")
    (loss,) = traces(page)
    assert max(loss["y"]) == 99 and len(loss["y"]) <= 3000
    assert loss["x"][0] == 0.01 and loss["x"][-1] == 300
    note = page.run("document.querySelector('.panel .note').innerText")
    assert note.startswith("Thinned: the lowest and the highest value of up to")


def test_names_with_tags_are_texts(page, tmp_path):
    folder = tmp_path / "<img src=x onerror=window.hacked=1>" / "<script>window.hacked=1<"
    folder.mkdir(parents=True)
    evil = "</script><script>window.hacked=1</script><b>&lt;"
    records = [{**training_record(step), f"train/loss/{evil}": step} for step in (1, 2)]
    write_config(write_records(folder, records), method=evil)
    write_metric_run(tmp_path / "b<b>%{x}", 10)
    show(page, tmp_path, tmp_path)
    assert page.run("window.hacked") is None
    assert page.run("document.querySelectorAll('main script, main b, main img').length") == 0
    chips = page.run("[...document.querySelectorAll('.chip')].map((chip) => chip.textContent)")
    assert evil in chips
    assert "b<b>%{x}" in page.run("document.getElementById('runs').innerText")
    page.run("Plotly.Fx.hover(document.querySelector('.plot'), {xval: 1})")
    hover = "[...document.querySelectorAll('.hoverlayer text')].map((t) => t.textContent).join(' ')"
    assert "b<b>%{x}" in page.run(hover)


# ---- Looks


def luminance(color):
    """Of WCAG 2; color: `rgb(1, 2, 3)` or `#010203`."""
    if color.startswith("#"):
        parts = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    else:
        parts = [float(part) for part in color.strip("rgba()").split(",")[:3]]
    linear = [
        part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4
        for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_both_schemes_can_be_read(page, tmp_path):
    for number in range(10):
        write_metric_run(tmp_path / f"run{number}", 10)
    grounds = []
    for scheme in ("light", "dark"):
        page.show(scheme=scheme)
        show(page, tmp_path, tmp_path)
        page.run("document.querySelectorAll('#runs button')[0].click()")  # draw all found
        style = "getComputedStyle(document.querySelector('{}')).{}"
        ground = page.run(style.format(".panel", "backgroundColor"))
        grounds.append(luminance(ground))
        assert contrast(page.run(style.format(".panel h2", "color")), ground) > 7
        for muted in (".about", ".number", ".xtick text", "#status"):
            name = "fill" if "tick" in muted else "color"
            assert contrast(page.run(style.format(muted, name)), ground) > 4.5, muted
        colors = {one["color"] for one in traces(page, panel="lr")}
        assert len(colors) == 10
        assert min(contrast(color, ground) for color in colors) > 3
    assert grounds[0] > 0.8 and grounds[1] < 0.05


def test_the_scheme_may_change_while_the_page_is_open(page, tmp_path):
    """Colors follow at once; what people have chosen stays: runs, axis, zoom."""
    for name in "ab":
        write_metric_run(tmp_path / name, 10)
    show(page, tmp_path, tmp_path)
    page.click("input[aria-label='draw b']")
    page.click("input[name=axis][value=step]")
    drag(page, "[data-panel=loss] .nsewdrag", 0.25, 0.5)
    plot = "document.querySelector('[data-panel=loss] .plot')"
    page.wait_for(f"{plot}.layout.xaxis.range")
    zoomed, light = page.run(f"{plot}._fullLayout.xaxis.range"), traces(page, panel="loss")
    page.show(scheme="dark")
    page.wait_for(f"{plot}.data[0].line.color !== {json.dumps(light[0]['color'])}")
    dark = traces(page, panel="loss")
    assert {one["run"] for one in dark} == {"a"}
    assert [one["x"] for one in dark] == [one["x"] for one in light]
    assert page.run(f"{plot}._fullLayout.xaxis.range") == zoomed
    assert page.run("document.querySelector('input[name=axis]:checked').value") == "step"
    style = "getComputedStyle(document.querySelector('[data-panel=loss]{}')).{}"
    ground = page.run(style.format("", "backgroundColor"))
    assert luminance(ground) < 0.05
    assert contrast(page.run(style.format(" h2", "color")), ground) > 7
    assert contrast(page.run(style.format(" .xtick text", "fill")), ground) > 4.5
    assert min(contrast(one["color"], ground) for one in dark) > 3


@pytest.mark.parametrize("width_px", [320, 390, 768, 1920])
def test_no_page_is_wider_than_its_screen(page, tmp_path, width_px):
    name = "a_long_name_of_a_run_without_any_place_to_break_it_" * 3
    write_views(write_metric_run(tmp_path / name, 20))
    write_metric_run(tmp_path / "b", 20, seed=1)
    page.show(width_px, 844, is_mobile=width_px < 600)
    show(page, tmp_path, tmp_path)
    page.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    scrolled, window = page.run(WIDTHS)
    assert scrolled <= window == width_px
    plots = page.run("[...document.querySelectorAll('.plot')].map((one) => "
                     "[one.offsetWidth, one.querySelector('.main-svg').clientWidth])")  # fmt: skip
    assert all(0 < drawn <= room for room, drawn in plots)


def test_what_can_be_clicked_has_a_name_and_takes_keys(page, tmp_path):
    for name in "ab":
        write_metric_run(tmp_path / name, 10)
    show(page, tmp_path, tmp_path)
    selector = "button, input, a, [role=region], [role=group], [role=img]"
    nameless = page.run(f"""[...document.querySelectorAll('{selector}')].filter((one) =>
        !(one.textContent.trim() || one.getAttribute('aria-label') || one.labels?.length))
        .map((one) => one.outerHTML)""")
    assert nameless == []
    page.run("document.querySelector('[data-panel=probes] .chip').focus()")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                  windowsVirtualKeyCode=13)  # fmt: skip
    page.wait_for("document.activeElement.getAttribute('aria-pressed') === 'false'")
    shown = {one["key"]: one["visible"] for one in traces(page, panel="probes", run="a")}
    assert shown["val/backbone/top1"] is False and shown["val/layer1/top1"] is True


# ---- Many runs


def test_many_runs_are_sorted_searched_and_chosen(page, tmp_path):
    for number in range(30):
        lift = number * 7 % 30 / 30
        method = ("simclr", "byol")[number % 2]
        write_metric_run(tmp_path / f"run{number}", 10, lift, method=method)
    show(page, tmp_path, tmp_path)
    rows = "[...document.querySelectorAll('#runs tbody tr')]"
    names = f"{rows}.map((row) => row.children[1].innerText)"
    press = (
        "[...document.querySelectorAll('#runs button')].find(b => b.textContent === '{}').click()"
    )
    cells = f"{rows}.map((row) => row.children[5].innerText)"
    assert len(page.run(names)) == 30
    assert len({one["run"] for one in traces(page)}) == 8
    page.click("th[data-column='best top-1'] button")
    shares = [float(text.split()[0]) for text in page.run(cells)]
    assert shares == sorted(shares, reverse=True)
    page.click("th[data-column='best top-1'] button")
    assert [float(text.split()[0]) for text in page.run(cells)] == sorted(shares)
    page.click("th[data-column=run] button")
    assert page.run(names) == [f"run{number}" for number in range(30)]
    page.run("""const box = document.getElementById('search'); box.value = 'byol run1';
        box.dispatchEvent(new Event('input'))""")
    found = [f"run{number}" for number in (1, 11, 13, 15, 17, 19)]
    assert page.run(names) == found
    page.run(press.format("draw none"))
    assert traces(page) == []
    page.run(press.format("draw all found"))
    assert {one["run"] for one in traces(page)} == set(found)
    page.click("#runs tbody input")
    assert {one["run"] for one in traces(page)} == set(found[1:])


# ---- Live


@pytest.fixture
def live(monkeypatch):
    """Pages ask often."""
    monkeypatch.setattr(serve, "POLL_S", 0.1)
    monkeypatch.setattr(board_module, "_SEARCH_INTERVAL_S", 0)
    monkeypatch.setattr(board_module, "_SEARCH_PATIENCE", 0)


LAST = "document.querySelector('[data-panel=loss] .plot')?.data?.[0]?.x?.at(-1)"


def drag(page, selector, start, end):
    """Drag the mouse over an element; start, end: shares of its width, at half of its height."""
    page.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
    left, top, width, height = page.run(
        f"(() => {{ const box = document.querySelector({json.dumps(selector)})"
        ".getBoundingClientRect(); return [box.left, box.top, box.width, box.height]; })()"
    )
    for kind, share, buttons in (("mouseMoved", start, 0), ("mousePressed", start, 1),
                                 ("mouseMoved", end, 1), ("mouseReleased", end, 0)):  # fmt: skip
        page.call(
            "Input.dispatchMouseEvent", type=kind, x=left + share * width, y=top + height / 2,
            button="left" if kind != "mouseMoved" or buttons else "none", buttons=buttons,
            clickCount=1,
        )  # fmt: skip


def test_news_appear_and_zoom_choice_and_page_stay(page, tmp_path, live):
    for name in "ab":
        write_metric_run(tmp_path / name, 40, is_finished=False)
    with serving(tmp_path) as server:
        page.open(server.url)
        page.wait_for(f"{LAST} === 4")
        page.run("window.mark = 'the same page'")
        page.click("input[aria-label='draw b']")
        page.click("[data-panel=loss] .chip[data-key='train/loss/uniformity']")
        drag(page, "[data-panel=loss] .nsewdrag", 0.25, 0.5)
        ranges = "document.querySelector('[data-panel=loss] .plot').layout.xaxis.range"
        page.wait_for(f"{ranges} && {ranges}[1] < 3")
        zoomed = page.run(ranges)
        for step in range(41, 46):
            write_records(tmp_path / "a", [training_record(step)], "a")
        page.wait_for(f"{LAST} === 4.5")
        assert page.run("window.mark") == "the same page"
        assert page.run(ranges) == zoomed
        assert (
            page.run("document.querySelector('[data-panel=loss] .plot')._fullLayout.xaxis.range")
            == zoomed
        )
        found = traces(page, panel="loss")
        assert {one["run"] for one in found} == {"a"}
        shown = {one["key"]: one["visible"] for one in found}
        assert shown["train/loss/uniformity"] is False and shown["train/loss"] is True
        (loss,) = traces(page, key="train/loss")
        assert loss["y"][-1] == training_record(45)["train/loss"]
        assert "4.5" in page.run("document.querySelector('.card').innerText")
        write_views(tmp_path / "a", step=45)
        page.wait_for("document.querySelectorAll('#views .view').length === 2")
        page.leave()


def test_runs_that_start_again_come_late_or_go_are_followed(page, tmp_path, live):
    folder = write_metric_run(tmp_path / "a", 40, is_finished=False)
    with serving(tmp_path) as server:
        page.open(server.url)
        page.wait_for(f"{LAST} === 4")
        write_records(folder, [*records_of(20), training_record(21, 2.0)])
        page.wait_for(f"{LAST} === 2.1")
        (loss,) = traces(page, key="train/loss")
        assert len(loss["y"]) == 21
        write_metric_run(tmp_path / "later", 10)
        page.wait_for("document.querySelectorAll('#runs tbody tr').length === 2")
        assert {one["run"] for one in traces(page)} == {"a", "later"}
        shutil.rmtree(folder)
        page.wait_for("document.querySelectorAll('.card').length === 1")
        assert {one["run"] for one in traces(page)} == {"later"}
        page.leave()


def test_a_page_whose_monitor_has_ended_says_so(page, tmp_path, live):
    with serving(write_metric_run(tmp_path / "a", 10)) as server:
        page.open(server.url)
        page.wait_for("document.getElementById('status').textContent.startsWith('live')")
    page.wait_for("document.getElementById('status').className === 'lost'")
    assert math.isclose(page.run(LAST), 1.0)
    page.open("about:blank")  # and forget the requests that failed
