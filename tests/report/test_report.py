"""The report: what it says is what the runs hold, and a browser shows it whole without fetching anything."""

import base64
import io
import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from evl_cache.batches import FeatureLoader
from evl_cache.errors import UsageError
from evl_cache.report.data import gather
from evl_cache.report.page import write_report_page
from evl_cache.report.plots import COLOURS
from evl_cache.runs import wilson_interval
from evl_cache.spec import ViewSpec
from evl_cache.store import FeatureCache
from evl_cache.sweep import sweep
from evl_cache.sweep.grid import expand
from evl_cache.train.stage import TrainOptions, train
from evl_cache_cli.main import cli
from tests.support.browser import Browser, find_chromium
from tests.support.feature_caches import TOWER, write_cache, write_pair

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


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Runs of one head and equal options, each on other data than the first, whose other seed is `seed`."""
    folder = tmp_path_factory.mktemp("apart")
    torch.set_num_threads(1)
    options = TrainOptions(head="linear", epochs=1, batch=8)
    caches = {
        "usual": write_pair(folder / "usual"),
        "weights": write_pair(folder / "w", tower=replace(TOWER, weights_sha256="34" * 32)),
        "storage": write_pair(folder / "s", tokens="fp16"),
        "content": (write_cache(folder / "content", seed=7), write_pair(folder / "c")[1]),
        "classes": write_pair(folder / "k", classes=4),
    }
    for name, pair in caches.items():
        train(*pair, options=options, out=folder / name)
    for seed, name in ((0, "again"), (1, "seed")):
        train(*caches["usual"], options=replace(options, seed=seed), out=folder / name)
    train(*caches["usual"], options=options, out=folder / "fold", val_clips=[0, 1, 3])
    return folder


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("weights", "weights tiny 34343434"),
        ("storage", "tokens fp16"),
        ("content", "train cache content ("),
        ("classes", "classes 4 ("),
        ("fold", "val clips 3 samples ("),
    ],
)
def test_runs_on_other_data_are_rows_of_their_own_and_say_what_differs(apart, name, told, tmp_path):
    data = gather([apart / "usual", apart / name, apart / "seed"])
    rows = {group.name: group for group in data.groups}
    assert {name: len(group.runs) for name, group in rows.items()} == {"usual": 2, name: 1}
    assert told in rows[name].told and told not in rows["usual"].told
    written = write_report_page(data, tmp_path / "out").page.read_text()
    assert told in written
    assert ("their accuracies do not compare" in written) is (name == "fold")


def test_a_run_is_counted_once_and_the_same_again_is_no_further_seed(apart):
    (alone,) = gather([apart / "usual", apart / "usual", apart / "fold" / ".." / "usual"]).groups
    assert len(alone.runs) == 1 and alone.deviation is None
    data = gather([apart / "usual", apart / "again", apart / "seed"])
    assert {tuple(run.name for run in group.runs) for group in data.groups} == {("usual", "seed"), ("again",)}
    assert {group.name: group.told for group in data.groups} == {
        "usual": "",
        "again": "done again with the same seed",
    }


def test_sweeps_of_other_caches_are_not_averaged_where_their_groups_have_one_name(apart, tmp_path):
    runs = expand([{"head": "linear", "seed": [0, 1]}], {"epochs": 1, "batch": 8})
    for name in ("usual", "w"):
        pair = [FeatureCache(apart / name / side) for side in ("train", "val")]
        sweep(*pair, runs=runs, out=tmp_path / name)
    data = gather([tmp_path / "usual", tmp_path / "w"])
    assert sorted(group.name for group in data.groups) == [
        "linear (weights tiny 12121212)",
        "linear (weights tiny 34343434)",
    ]
    assert [len(group.runs) for group in data.groups] == [2, 2]
    # Names that differ say nothing of the caches.
    sweep(*pair, runs=expand([{"head": "meanpool"}], {"epochs": 1, "batch": 8}), out=tmp_path / "other")
    for group in gather([tmp_path / "usual", tmp_path / "other"]).groups:
        assert "weights tiny" in group.told
    # A sweep's run beside a run of its own, with another seed: one row.
    options = replace(runs[0].options, seed=5)
    pair = [FeatureCache(apart / "usual" / side) for side in ("train", "val")]
    train(*pair, options=options, out=tmp_path / "five")
    (one,) = gather([tmp_path / "usual", tmp_path / "five"]).groups
    assert (one.name, len(one.runs)) == ("linear", 3)


def test_one_run_has_an_interval_over_clips_and_several_a_deviation_over_seeds(apart, tmp_path):
    data = gather([apart / "usual", apart / "seed", apart / "fold"])
    two, one = sorted(data.groups, key=lambda group: len(group.runs), reverse=True)
    assert two.interval is None and two.deviation is not None
    assert one.interval == wilson_interval(one.top1, 3) and one.deviation is None
    written = write_report_page(data, tmp_path / "out").page.read_text()
    assert f"{one.top1:.1f} ({one.interval[0]:.1f} to {one.interval[1]:.1f}) %" in written
    done = CliRunner().invoke(
        cli,
        [
            "report",
            *(str(apart / n) for n in ("usual", "seed", "fold")),
            "--out",
            str(tmp_path / "b"),
            "--json",
        ],
    )
    found = {row["name"]: row for row in json.loads(done.stdout)["groups"]}
    assert found["fold"]["top1_interval"] == list(one.interval) and found["fold"]["val_clips"] == 3
    assert found["usual"]["top1_deviation"] == two.deviation and found["usual"]["top1_interval"] is None


def test_bytes_are_those_of_the_samples_that_the_steps_read(tmp_path):
    """Of four augmented views of a clip an epoch reads one; a run may end within one; the sides' storage may differ."""
    views = ViewSpec(frames=3, stride=2, train_views=4)
    caches = (
        write_cache(tmp_path / "train", views=views),
        write_cache(tmp_path / "val", labels=(0, 1, 2), prefix="v", split="val", tokens="fp16", maps="fp16"),
    )
    train_nbytes, val_nbytes = (
        FeatureLoader(cache, [0], batch=1, layers=(3, 4)).sample_nbytes for cache in caches
    )
    assert train_nbytes < val_nbytes
    for length, samples, epochs in (({"epochs": 2}, 26, 2), ({"steps": 5}, 13 + 4, 2)):
        options = TrainOptions(head="decoder2", batch=4, **length)
        name = f"{next(iter(length))}"
        train(*caches, options=options, out=tmp_path / name)
        expected = samples * train_nbytes + 3 * epochs * val_nbytes
        assert gather([tmp_path / name]).best.bytes_read == expected
        runs = expand([{"head": "decoder2"}], {"batch": 4, **length})
        sweep(*caches, runs=runs, out=tmp_path / f"{name}-sweep")
        assert gather([tmp_path / f"{name}-sweep"]).best.bytes_read == expected


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


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1], "holds '\\[1\\]', expected an object"),
        ({"top1": "good"}, "top1 of result.json is 'good'"),
        ({}, "'top1'"),
    ],
)
def test_a_run_whose_figures_are_none_is_refused_and_one_of_a_sweep_is_left_out(
    swept, tmp_path, result, message
):
    shutil.copytree(swept / "sweep", tmp_path / "sweep")
    run = next((tmp_path / "sweep" / "runs").iterdir())
    (run / "result.json").write_text(json.dumps(result))
    with pytest.raises(UsageError, match=message):
        gather([run])
    data = gather([tmp_path / "sweep"])
    assert run.name in dict(data.unfinished) and run.name not in {one.name for one in data.runs}


def test_without_matplotlib_the_extra_is_named(swept, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'evl-cache\[report\]'"):
        write_report_page(gather([swept / "sweep"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
