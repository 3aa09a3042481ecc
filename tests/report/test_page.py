"""index.html in Debian's chromium: works without a network, on a phone, on paper, and whatever names people give."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffscale.records.store import write_record
from diffscale.report import write_report
from diffscale.report.page.page import to_json
from tests.support.chromium_page import CHROMIUM, Page

from .records import make_record, write_runs

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")

HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror='window.hacked=1'>",
    "\"'><svg/onload=window.hacked=1>",
    "<!--<script>",
    "${window.hacked=1}",
    "日本語 🙂",
    "&lt;b&gt;",
    "</textarea><iframe src='javascript:parent.hacked=1'>",
    "<a href='javascript:window.hacked=1'>x</a>",
    "]]>",
    "\u2028window.hacked=1",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with Page() as page:
        yield page


@pytest.fixture(scope="module")
def page_file(report: Path) -> Path:
    return report / "index.html"


@pytest.fixture
def page(browser: Page, page_file: Path) -> Page:
    browser.messages.clear()
    browser.requests.clear()
    browser.resize(1280, 900)
    browser.open(page_file)
    return browser


def choose(page: Page, name: str, value: str) -> None:
    page.evaluate(f"$('{name}').value = {value}; $('{name}').dispatchEvent(new Event('change'))")


def rows(page: Page) -> list[list[str]]:
    return page.evaluate(
        "[...document.querySelectorAll('#table tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )


@needs_chromium
def test_draws_without_errors_and_without_any_request(page: Page, page_file: Path) -> None:
    assert page.messages == []
    assert [url for url in page.requests if not url.startswith("data:")] == [page_file.resolve().as_uri()]
    assert page.evaluate("document.title") == "A & B <report>"
    assert page.evaluate("document.querySelectorAll('#plot-compute .scatterlayer .trace').length") >= 8
    assert "uvit" in page.evaluate("$('findings').textContent")


@needs_chromium
def test_pointing_at_an_evaluation_shows_its_samples_and_numbers(page: Page) -> None:
    page.evaluate("$('plot-compute').scrollIntoView()")
    place = page.evaluate("""(() => {
      const plot = $('plot-compute'), axes = plot._fullLayout, curve = DATA.curves.find((c) => c.name === 'rin');
      const point = DATA.points[curve.points[2]], box = plot.getBoundingClientRect();
      return [box.left + axes.xaxis._offset + axes.xaxis.d2p(point.train_flops),
              box.top + axes.yaxis._offset + axes.yaxis.d2p(point.value), point.value];
    })()""")
    page.point_at(place[0], place[1])
    page.wait("$('card').textContent.includes('rin')")
    card = page.evaluate("$('card').textContent")
    assert f"{place[2]:.3g}" in card
    assert page.evaluate("$('card').querySelector('img').src").startswith("data:image/webp")
    page.wait("$('card').querySelector('img').naturalWidth === 128")


@needs_chromium
def test_other_axes_and_groups_can_be_chosen(page: Page) -> None:
    choose(page, "axis", "'wall_hours'")
    page.wait("$('plot-compute').layout.xaxis.title.text.includes('wall-clock')")
    page.evaluate("$('show-fits').click()")
    choose(page, "facet", "DATA.facets[1].facet")
    page.wait("!$('sweep-section').hidden")
    assert "emoji" in page.evaluate("$('caption-compute').textContent")
    assert page.evaluate("document.querySelectorAll('#table-sweep td').length") == 9
    assert page.messages == []


@needs_chromium
def test_table_sorts_and_filters(page: Page) -> None:
    columns = page.evaluate("DATA.table.columns")
    value, model = columns.index("value"), columns.index("model")
    page.evaluate("document.querySelector('th[data-column=value] button').click()")
    values = [float(row[value].replace(",", "")) for row in rows(page)]
    assert values == sorted(values)
    page.evaluate("document.querySelector('th[data-column=value] button').click()")
    values = [float(row[value].replace(",", "")) for row in rows(page)]
    assert values == sorted(values, reverse=True)

    def fill(column: str, text: str) -> None:
        page.evaluate(
            f"(() => {{ const i = document.querySelector('input[aria-label=\"filter {column}\"]'); i.value = '{text}';"
            "i.dispatchEvent(new Event('input')); })()"
        )

    fill("value", "< 50")
    fill("model", "= UNET")
    kept = rows(page)
    assert kept
    assert all(row[model] == "unet" and float(row[value]) < 50 for row in kept)
    fill("model", "no such")
    assert rows(page) == []
    assert page.evaluate("$('table-count').textContent").startswith("0 of")


@needs_chromium
def test_settings_diff_shows_only_what_differs(page: Page) -> None:
    choose(
        page,
        "diff-a",
        "Object.keys(DATA.runs).find((id) => DATA.runs[id].name.startsWith('rin') && DATA.runs[id].seed === 0)",
    )
    choose(
        page,
        "diff-b",
        "Object.keys(DATA.runs).find((id) => DATA.runs[id].name.startsWith('rin') && DATA.runs[id].seed === 1)",
    )
    shown = page.evaluate(
        "[...document.querySelectorAll('#diff tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert shown == [["train.seed", "0", "1"]]


@needs_chromium
def test_samples_stand_side_by_side_at_the_same_size(page: Page) -> None:
    choose(page, "sample-a", "Object.keys(DATA.grids)[0]")
    choose(page, "sample-b", "Object.keys(DATA.grids)[1]")
    boxes = page.evaluate(
        "['a', 'b'].map(s => { const b = $('view-' + s).querySelector('img').getBoundingClientRect();"
        "return [b.top, b.width]; })"
    )
    assert boxes[0] == boxes[1]
    assert boxes[0][1] > 300


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 768])
def test_phone_width_needs_no_sideways_scrolling(browser: Page, page_file: Path, width: int) -> None:
    browser.resize(width, 800, phone=True)
    browser.open(page_file)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    sizes = browser.evaluate(
        "[...document.querySelectorAll('p, li, figcaption, dd, td')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12
    browser.resize(1280, 900)


@needs_chromium
def test_prints_on_a_few_pages(page: Page) -> None:
    pdf = page.pdf()
    pages = len(re.findall(rb"/Type\s*/Page[^s]", pdf))
    assert 2 <= pages <= 8
    assert page.messages == []


@needs_chromium
def test_nothing_a_user_wrote_is_read_as_markup_or_script(browser: Page, tmp_path: Path) -> None:
    records = [
        make_record(
            model=text,
            dataset=HOSTILE[0],
            schedule=text,
            images_seen=4096 * 2**step,
            device=text,
            solver=HOSTILE[1],
            warning=text,
            nfe=10 * (1 + step % 2),
            run_name=text,
            ema=text,
            settings={text: text, "optim.lr": text, "eval.seed": text},
        )
        for text in HOSTILE
        for step in range(3)
    ]
    for i, record in enumerate(records):
        write_record(str(tmp_path / "runs" / f"r{i}-{record.run_id}"), record)
    write_report([str(tmp_path)], tmp_path / "out", title=HOSTILE[0])
    browser.messages.clear()
    browser.resize(1280, 900)
    browser.open(tmp_path / "out" / "index.html")
    for facet in range(browser.evaluate("DATA.facets.length")):
        choose(browser, "facet", f"DATA.facets[{facet}].facet")
        browser.evaluate("card(DATA.points.find((p) => p.facet === state.facet))")
    assert browser.evaluate("window.hacked") is None
    assert browser.evaluate("document.querySelectorAll('iframe, #findings img, #table img, a[href]').length") == 0
    assert browser.evaluate("document.querySelectorAll('script').length") == 3
    assert HOSTILE[1] in browser.evaluate("document.body.textContent")
    assert browser.messages == []


@needs_chromium
def test_a_script_that_got_into_the_page_would_not_run(browser: Page, page_file: Path, tmp_path: Path) -> None:
    """The second line of defence: the content security policy names the scripts by their hashes."""
    text = page_file.read_text().replace(
        "</main>", "<script>window.hacked = 1</script><img src='x' onerror='window.hacked = 1'></main>"
    )
    broken = tmp_path / "index.html"
    broken.write_text(text)
    browser.messages.clear()
    browser.open(broken)
    assert browser.evaluate("window.hacked") is None
    assert any("Content Security Policy" in message for message in browser.messages)


def test_json_cannot_end_its_element() -> None:
    text = to_json({"a": "</script><!-- <script>"})
    assert "<" not in text


def test_page_names_no_address_to_load_from(page_file: Path) -> None:
    head = page_file.read_text().split('<script type="application/json"')[0]
    assert not re.search(r"(src|href)\s*=", head)
    assert "default-src 'none'" in head


@needs_chromium
def test_long_names_are_whole_on_a_phone(browser: Page, tmp_path: Path) -> None:
    """The table's cells wrap; of the plot no label ends outside of it."""
    records = [
        make_record(
            schedule=schedule,
            resolution=side,
            dataset="emoji",
            eval_resolution=64,
            images_seen=int(65536 * 2**step * (32 / side) ** 2),
            settings={"model.model_channels": width, "optim.weight_decay": width / 6400, "model.dropout": width / 640},
        )
        for width in (64, 128)
        for schedule in ("simple_cosine", "sigmoid")
        for side in (16, 32, 64)
        for step in range(4)
    ]
    write_report([write_runs(tmp_path, records)], tmp_path / "out")
    browser.messages.clear()
    browser.resize(400, 800, phone=True)
    browser.open(tmp_path / "out" / "index.html")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 400
    names = browser.evaluate("[...document.querySelectorAll('#table-sweep .family th')].map(e => e.textContent)")
    assert any("model_channels 128, weight_decay 0.02" in name for name in names)
    cut = browser.evaluate("""[...document.querySelectorAll('#table-sweep th, #table-sweep td')].filter(e => {
      const box = e.getBoundingClientRect();
      return e.scrollWidth > e.clientWidth || box.left < 0 || box.right > 400;
    }).map(e => e.textContent)""")
    assert cut == []
    outside = browser.evaluate("""[...$('plot-compute').querySelectorAll('text')].filter(e => {
      const text = e.getBoundingClientRect(), plot = $('plot-compute').getBoundingClientRect();
      return text.width && (text.left < plot.left || text.right > plot.right + 0.5 || text.top < plot.top || text.bottom > plot.bottom);
    }).map(e => e.textContent)""")  # noqa: E501
    assert outside == []
    assert browser.messages == []
    browser.resize(1280, 900)


@pytest.fixture
def with_pictures(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page of `storage` without room for any sample grid."""
    monkeypatch.setattr("diffscale.report.page.page.PAGE_BYTES", 0)
    write_report([storage], tmp_path)
    return tmp_path / "index.html"


def test_grids_beyond_the_page_are_files_next_to_it(page_file: Path, with_pictures: Path) -> None:
    files = {path.name for path in (with_pictures.parent / "pictures").iterdir()}
    text = with_pictures.read_text()
    assert f"{len(files)} sample grids are fetched from the folder pictures/" in text
    assert set(re.findall(r'"pictures/([^"]*)"', text)) == files
    embedded, of_all = (t.count("data:image/webp;base64,") for t in (text, page_file.read_text()))
    assert embedded + len(files) == of_all
    assert len(text) < len(page_file.read_text())
    assert not (page_file.parent / "pictures").exists()


@needs_chromium
def test_a_picture_is_fetched_when_it_is_looked_at(browser: Page, with_pictures: Path) -> None:
    browser.messages.clear()
    browser.requests.clear()
    browser.open(with_pictures)
    choose(browser, "sample-b", "Object.keys(DATA.grids).find((key) => DATA.grids[key].startsWith('pictures/'))")
    browser.evaluate("$('view-b').scrollIntoView()")
    browser.wait("$('view-b').querySelector('img').naturalWidth === 128")
    assert browser.messages == []
    assert len([url for url in browser.requests if "/pictures/" in url]) < len(list(with_pictures.parent.glob("p*/*")))


@pytest.mark.slow
def test_the_page_of_100_runs_with_large_grids_stays_below_15_megabytes(tmp_path: Path) -> None:
    """Pictures of noise hardly compress: more of them than a page can hold."""
    rng = np.random.default_rng(0)
    for seed in range(100):
        for step in range(2):
            record = make_record(seed=seed, images_seen=16384 * 2**step)
            folder = tmp_path / "runs" / f"{record.run_name}-{record.run_id}"
            write_record(str(folder), record)
            (folder / "samples").mkdir(exist_ok=True)
            noise = Image.fromarray(rng.integers(0, 255, (384, 384, 3)).astype(np.uint8))
            noise.save(folder / "samples" / f"images-{record.images_seen:09d}.png")
    write_report([str(tmp_path / "runs")], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_bytes()
    assert 12e6 < len(page) < 15e6
    pictures = list((tmp_path / "out" / "pictures").iterdir())
    assert len(pictures) + page.count(b"data:image/webp;base64,") == 200
