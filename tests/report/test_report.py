"""The report: what it says is what the runs hold, and a browser shows it whole without fetching anything."""

import base64
import io
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from evl_cache.errors import UsageError
from evl_cache.report.data import gather
from evl_cache.report.page import write_report_page
from evl_cache.report.plots import COLOURS
from evl_cache.sweep import sweep
from evl_cache.sweep.grid import expand
from evl_cache.train.stage import TrainOptions, train
from evl_cache_cli.main import cli
from tests.support.browser import Browser, find_chromium
from tests.support.feature_caches import write_cache, write_pair

HOSTILE = 'clips/<img src="http://example.com/x.png"> & a name that is rather long for a phone, '

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of four groups, one of them diverged, on clips with a hostile name."""
    folder = tmp_path_factory.mktemp("report")
    torch.set_num_threads(1)
    caches = write_pair(folder, val_prefix=HOSTILE)
    grids = [{"head": ["decoder1", "linear", "meanpool"], "seed": [0, 1]}, {"head": "linear", "lr": 1e30}]
    runs = expand(grids, {"epochs": 2, "batch": 8, "lr": 3e-3})
    sweep(*caches, runs=runs, out=folder / "sweep")
    return folder


@pytest.fixture(scope="module")
def page(swept):
    return write_report_page(gather([swept / "sweep"]), swept / "out")


def test_a_sweep_is_gathered_as_it_says_itself(swept):
    data = gather([swept / "sweep"])
    content = json.loads((swept / "sweep" / "sweep.json").read_text())
    assert [(g.name, g.top1, g.deviation, len(g.runs)) for g in data.groups] == [
        (g["group"], g["top1"], g["deviation"], g["runs"]) for g in content["groups"]
    ]
    assert [name for name, _ in data.unfinished] == ["linear_lr=1e+30_seed=0"]
    for run in data.runs:
        assert run.confusion.sum() == 5 and len(run.scored) == 5
        right = sum(clip.label == clip.said for clip in run.scored)
        assert 100 * right / 5 == pytest.approx(
            run.top1
        ) and 100 * run.confusion.trace() / 5 == pytest.approx(run.top1)
        wrong = run.wrongest(10)
        assert len(wrong) == 5 - right and [c.p_said for c in wrong] == sorted(
            (c.p_said for c in wrong), reverse=True
        )
    linear = next(run for run in data.runs if run.config.head == "linear")
    assert linear.bytes_read == 2 * (13 + 5) * 3 * 16 * 2  # epochs, clips, frames, channels, float16
    assert data.groups[0].curve("val_loss").shape == (2, 2)


def test_single_runs_are_grouped_by_all_but_their_seed(swept, tmp_path):
    caches = write_cache(tmp_path / "a"), write_cache(tmp_path / "b", prefix="v", split="val")
    options = TrainOptions(head="linear", epochs=1, batch=8)
    for name, changes in (("one", {}), ("two", {"seed": 1}), ("other", {"lr": 1e-2})):
        train(*caches, options=replace(options, **changes), out=tmp_path / name)
    data = gather([tmp_path / name for name in ("one", "two", "other")])
    assert sorted((g.name, len(g.runs)) for g in data.groups) == [("one", 2), ("other", 1)]
    alone = write_report_page(gather([tmp_path / "other"]), tmp_path / "out")
    assert "Ablation" not in alone.page.read_text() and "ablation.png" not in {p.name for p in alone.pictures}


def test_the_page_holds_what_it_shows_and_no_address(page):
    text = page.page.read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "<img src=" not in text.replace("data:", "") and HOSTILE not in text  # names are escaped
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text
    for source in sources:
        if source.startswith("data:image/svg+xml;base64,"):
            assert b"<svg" in base64.b64decode(source.partition(",")[2])
    assert "training diverged" in text


def test_pictures_are_drawn_in_several_colours(page):
    names = {path.stem for path in page.pictures}
    assert names == {"curve-train_loss", "curve-val_loss", "curve-top1", "ablation", "confusion"}
    for path in page.pictures:
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert min(picture.shape[:2]) > 300 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_colours_differ_for_the_colour_blind():
    """Distances under simulated red- and green-blindness (Viénot, Brettel and Mollon 1999), linear RGB."""
    rgb = np.asarray([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLOURS]) ** 2.2
    red_blind = np.asarray([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    green_blind = np.asarray([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    for matrix in (np.eye(3), red_blind, green_blind):
        seen = np.clip(rgb @ matrix.T, 0, 1) ** (1 / 2.2)
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(len(COLOURS), 1)]
        assert apart.min() > 0.12  # and each line has a marker of its own


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium (chromium, google-chrome) on this machine to open the page in")
    with Browser(program, tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_whole_and_fetches_nothing(browser, page, width):
    browser.open(page.page, width=width)
    requests = [p["request"]["url"] for method, p in browser.events if method == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [page.page.resolve().as_uri()]
    bad = ("Network.loadingFailed", "Runtime.exceptionThrown", "Log.entryAdded")
    assert [event for event in browser.events if event[0] in bad] == []
    images = browser.evaluate(
        "[...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width, i.alt])"
    )
    assert len(images) == 4
    for complete, natural, shown, text in images:
        assert complete and natural > 200 and shown > 280 and text
    # Nothing is wider than the screen, no letter is too small to read, nothing is cut off.
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    smallest = browser.evaluate(
        "Math.min(...[...document.body.querySelectorAll('*')].filter(e => e.innerText)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12
    cut = "[...document.querySelectorAll('.row span')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert browser.evaluate(cut) == 0
    bars = browser.evaluate(
        "[...document.querySelectorAll('.bar i')].map(e => e.getBoundingClientRect().width)"
    )
    assert len(bars) == 3 and bars == sorted(bars, reverse=True) and bars[0] > 0


def test_the_plots_are_seen_in_the_browser(browser, page):
    browser.open(page.page, width=390)
    shot = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))
    assert shot.shape[1] == 390 and shot.shape[0] > 2000
    boxes = browser.evaluate(
        "[...document.images].map(i => i.getBoundingClientRect()).map(r => [r.top + scrollY, r.left, r.height, r.width])"
    )
    for top, left, height, width in boxes:
        plot = shot[int(top) : int(top + height), int(left) : int(left + width)]
        assert (plot < 250).any(axis=-1).mean() > 0.02  # not white
        assert len(np.unique(plot.reshape(-1, 3), axis=0)) > 20


# The command, and refusals


def test_the_command_writes_the_page_beside_the_run(swept):
    run = swept / "sweep" / "runs" / "decoder1_lr=0.003_seed=0"
    done = CliRunner().invoke(cli, ["report", str(run), "--json"], standalone_mode=False)
    assert done.exception is None and done.return_value == 0
    found = json.loads(done.stdout)
    assert found["page"] == str(run / "report" / "report.html") and len(found["pictures"]) == 4


def test_what_is_no_finished_run_is_refused(swept, tmp_path):
    with pytest.raises(UsageError, match="no run there"):
        gather([tmp_path])
    cut = tmp_path / "cut"
    cut.mkdir()
    run = swept / "sweep" / "runs" / "decoder1_lr=0.003_seed=0"
    (cut / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(UsageError, match=r"result\.json cannot be read .*train it to its end first"):
        gather([cut])
    (cut / "result.json").write_text("{")
    with pytest.raises(UsageError, match="not what train writes"):
        gather([cut])


def test_without_matplotlib_the_extra_is_named(swept, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'evl-cache\[report\]'"):
        write_report_page(gather([swept / "sweep"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
