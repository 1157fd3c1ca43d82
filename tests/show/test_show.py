"""Pictures of what a tower and a head see: the numbers drawn are right, and every way to ask for one works."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from evl_cache.errors import UsageError
from evl_cache.extract.prepare import prepare_clip
from evl_cache.heads import EVLHead
from evl_cache.heads.decoder.plain import PlainHead
from evl_cache.runs.head_files import load_head
from evl_cache.runs.intervals import wilson_interval
from evl_cache.runs.scoring import Scores
from evl_cache.show import page, view
from evl_cache.show.displacement import displacements
from evl_cache.show.picture import draw_view
from evl_cache.spec import ViewSpec
from evl_cache.store import FeatureCache
from evl_cache.train.stage import TrainOptions, train
from evl_cache.video import decode_frames
from evl_cache_cli.main import main
from tests.live.test_predict import extracted
from tests.support.servers import faulty_server
from tests.support.store_helpers import make_clips

matplotlib = pytest.importorskip("matplotlib")
VIEWS = ViewSpec(frames=3, sampling="tsn", stride=None, temporal_views=2, spatial_views=1)
PNG = b"\x89PNG\r\n\x1a\n"
GRID = (4, 5)


def shifted(down: int, right: int) -> torch.Tensor:
    """(P, P): every patch looks at the one that far away, where there is one; else at itself."""
    height, width = GRID
    out = torch.zeros(height * width, height * width)
    for i in range(height):
        for j in range(width):
            to = (i + down, j + right)
            inside = 0 <= to[0] < height and 0 <= to[1] < width
            out[i * width + j, (to[0] * width + to[1]) if inside else i * width + j] = 1
    return out


def test_a_shift_is_found_exactly_away_from_the_edge():
    there, back = shifted(1, -2), shifted(-1, 2)  # [0] is the later frame against the earlier
    found = displacements(torch.stack([back, there])[:, None], GRID).view(*GRID, 2)
    np.testing.assert_allclose(found[1:3, 2:3], np.broadcast_to([1, -2], (2, 1, 2)))


@pytest.mark.parametrize("blur", [0.0, 0.5, 1.0])
def test_attention_that_is_spread_out_draws_no_arrow_to_the_middle(blur):
    flat = torch.full((20, 20), 1 / 20)
    still = (1 - blur) * torch.eye(20) + blur * flat
    assert displacements(still.expand(2, 3, 20, 20), GRID).abs().max() < 1e-5
    mixed = torch.stack([(1 - blur) * m + blur * flat for m in (shifted(0, -1), shifted(0, 1))])
    found = displacements(mixed[:, None], GRID).view(*GRID, 2)
    np.testing.assert_allclose(found[2, 2], [0, 1 - blur], atol=1e-5)  # shorter, and in the right direction


def test_the_decoders_attention_is_what_its_output_is_made_of():
    generator = torch.Generator().manual_seed(3)
    head = EVLHead(
        num_layers=2, width=16, num_frames=3, grid=(2, 2), num_classes=3, num_heads=2, qkv_width=8
    ).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    tokens = [torch.randn(2, 3, 5, 16, generator=generator) for _ in range(2)]
    maps = [torch.softmax(torch.randn(2, 2, 2, 4, 4, generator=generator), -1) for _ in range(2)]
    plain = PlainHead(head)
    first, second = plain.attention(tokens, maps)
    assert first.shape == second.shape == (2, 2, 3, 5)
    torch.testing.assert_close(first.sum((2, 3)), torch.ones(2, 2))
    layer = plain.layers[0]
    with torch.no_grad():
        x = plain.class_query.expand(2, -1)
        y = layer.with_position(tokens[0], maps[0], plain.enabled)
        values = layer.v_proj(layer.norm3(y)).unflatten(3, (2, 4))  # (B,T,N,H,D)
        attended = torch.einsum("bhtn,btnhd->bhd", first, values).flatten(1)
        after = x + layer.out_proj(attended)
        hidden = layer.fc1(layer.norm2(after))
        after = after + layer.fc2(hidden * torch.sigmoid(1.702 * hidden))
        torch.testing.assert_close(after, layer(x, y), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Clips, their cache, and a run on it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("show")
    clips = make_clips(folder / "videos", 5, broken=False)
    names = [f"{clip.path} {clips.classes[clip.label]}" for clip in clips.clips]
    (folder / "videos" / "list.txt").write_text("\n".join(names) + "\n")
    cache = extracted(folder / "videos", folder / "cache", views=VIEWS)
    options = TrainOptions(head="decoder2", epochs=1, batch=4, lr=2e-3)
    train(cache, cache, options=options, out=folder / "run", val_clips=[0, 1])
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """What would be drawn, instead of drawing it."""
    pictures = []
    monkeypatch.setattr(view, "draw_view", lambda picture, path: pictures.append(picture))
    return pictures


def test_frames_names_motion_and_attention_are_those_of_the_view(work, drawn, tmp_path):
    cache = FeatureCache(work / "cache")
    view.show_cached(cache, "03.mp4", tmp_path / "x.png", run=view.ShowRun.read(work / "run"), view=1)
    (picture,) = drawn
    tokens, maps = cache.read([3 * 2 + 1])
    prepared = prepare_clip(
        cache.clips[3], work / "videos", tower=cache.spec.tower, views=VIEWS, decode=decode_frames
    )
    assert picture.frame_names == [f"frame {i}" for i in prepared.record.indices[1]]
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (cache.spec.tower.mean, cache.spec.tower.std))
    expected = ((prepared.samples[1].numpy() * std + mean) * 255).transpose(0, 2, 3, 1)
    assert picture.frames.dtype == np.uint8 and np.abs(picture.frames - expected).max() <= 0.51
    by_layer = [displacements(layer[0], cache.spec.tower.grid).numpy() for layer in maps]
    np.testing.assert_allclose(picture.motion, np.mean(by_layer, axis=0), atol=1e-6)
    weights = PlainHead(load_head(work / "run")).attention(tokens, maps)
    np.testing.assert_allclose(
        picture.attention, np.mean([w[0].mean(0).numpy() for w in weights], axis=0), atol=1e-7
    )
    assert picture.attention.sum() == pytest.approx(1, abs=1e-5)
    label = cache.spec.classes[cache.clips[3].label]
    assert picture.notes[0].endswith("layers 2-3, head decoder2 of run run.")
    assert picture.subtitle.startswith(f"label: {label}") and re.search(r"said: .* \d+ %, ", picture.subtitle)


def test_a_clip_is_named_by_its_cache_s_class_whatever_classes_the_head_has(work, drawn, tmp_path):
    cache, run = FeatureCache(work / "cache"), view.ShowRun.read(work / "run")
    names = tuple(f"other {number}" for number in range(len(run.config.classes)))
    others = replace(run, config=replace(run.config, classes=names))
    view.show_cached(cache, "03.mp4", tmp_path / "x.png", run=others)
    label = cache.spec.classes[cache.clips[3].label]
    assert re.match(rf"label: {label}   said: other \d", drawn[0].subtitle)


def test_every_crop_is_drawn_with_the_frames_it_was_cut_from(work):
    cache = FeatureCache(work / "cache")
    views = replace(VIEWS, spatial_views=3)
    centre, all_crops = (
        prepare_clip(cache.clips[3], work / "videos", tower=cache.spec.tower, views=v, decode=decode_frames)
        for v in (VIEWS, views)
    )
    indices = [[f"frame {i}" for i in row] for row in centre.record.indices]
    assert indices[0] != indices[1]
    spec = replace(cache.spec, views=views)
    named = [view._frame_names(all_crops, number, spec) for number in range(views.per_clip)]
    for temporal in range(2):
        middle = 1 * 2 + temporal  # crops first, choices of frames within
        assert torch.equal(all_crops.samples[middle], centre.samples[temporal])
        assert named[middle] == indices[temporal]
    assert named == [indices[0], indices[1]] * 3


def test_one_layer_gives_its_own_arrows(work, drawn, tmp_path):
    cache = FeatureCache(work / "cache")
    view.show_cached(cache, "00.mp4", tmp_path / "x.png", run=None, layer=3)
    expected = displacements(cache.read([0], layers=(3,))[1][0][0], cache.spec.tower.grid)
    np.testing.assert_allclose(drawn[0].motion, expected.numpy(), atol=1e-6)
    assert drawn[0].attention is None
    assert drawn[0].notes == [f"Tower {cache.spec.tower.model} (random weights), layers 2-3."]
    with pytest.raises(UsageError, match=r"--layer 9; expected one of \[2, 3\]"):
        view.show_cached(cache, "00.mp4", tmp_path / "x.png", run=None, layer=9)


def test_a_video_gives_the_picture_that_its_cache_gives(work, drawn, tmp_path):
    run = view.ShowRun.read(work / "run")
    view.show_cached(FeatureCache(work / "cache"), "02.mp4", tmp_path / "x.png", run=run)
    view.show_video(work / "videos" / "02.mp4", tmp_path / "y.png", run=run)
    cached, live = drawn
    np.testing.assert_array_equal(cached.frames, live.frames)
    np.testing.assert_allclose(cached.motion, live.motion, atol=2e-3)  # the cache's are float16
    np.testing.assert_allclose(cached.attention, live.attention, atol=1e-4)
    assert live.title == "02.mp4" and live.subtitle == cached.subtitle.partition("   ")[2]


def test_without_its_video_a_clip_is_drawn_and_says_so(work, drawn, tmp_path):
    cache = FeatureCache(work / "cache")
    (work / "videos" / "04.mp4").rename(work / "videos" / "away.mp4")
    try:
        view.show_cached(cache, "04.mp4", tmp_path / "x.png", run=None)
    finally:
        (work / "videos" / "away.mp4").rename(work / "videos" / "04.mp4")
    assert drawn[0].frames is None and drawn[0].motion is not None
    assert "No frames: " in drawn[0].notes[1] and drawn[0].frame_names == ["t = 0", "t = 1", "t = 2"]


def test_a_picture_is_written_for_many_frames_for_one_and_for_none(work, drawn, tmp_path):
    cache = FeatureCache(work / "cache")
    view.show_cached(cache, "01.mp4", tmp_path / "x.png", run=view.ShowRun.read(work / "run"))
    (three,) = drawn
    many = replace(
        three,
        frames=np.repeat(three.frames[:1], 17, axis=0),
        frame_names=[f"frame {i}" for i in range(17)],
        motion=np.repeat(three.motion[:1], 16, axis=0),
        attention=np.full((17, three.attention.shape[1]), 1 / (17 * three.attention.shape[1])),
    )
    still = replace(three, frames=three.frames[:1], frame_names=["frame 0"], motion=None, attention=None)
    unmoved = replace(three, frames=None, motion=np.zeros_like(three.motion))
    sizes = []
    for number, picture in enumerate((three, many, still, unmoved)):
        draw_view(picture, tmp_path / f"{number}.png")
        content = (tmp_path / f"{number}.png").read_bytes()
        assert content.startswith(PNG)
        sizes.append([int.from_bytes(content[i : i + 4], "big") for i in (16, 20)])
    assert sizes[1][1] > 2.5 * sizes[0][1]  # three strips
    assert sizes[2][1] < sizes[0][1]


def test_wrongest_and_surest_are_in_order():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.55, 0.45], [0.99, 0.01]])
    labels = np.array([0, 0, 0, 1, 1, 1])
    scores = Scores(clips=np.arange(6), labels=labels, probabilities=probabilities, loss=0.0)
    assert page.wrongest_and_surest(scores, 2) == ([5, 1], [0, 3])
    assert page.wrongest_and_surest(scores, 9) == ([5, 1, 4], [0, 3, 2])


@pytest.fixture
def run_command(capsys):
    """The command line: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_the_page_has_a_picture_of_every_clip(work, tmp_path, run_command):
    status, out, err = run_command(
        "show", "--page", tmp_path / "page", "--run", work / "run", "--clips-each", 2
    )
    assert (status, out.strip()) == (0, str(tmp_path / "page" / "index.html")), err
    written = (tmp_path / "page" / "index.html").read_text()
    images = re.findall(r'<img src="([^"]+)"', written)
    assert images and all((tmp_path / "page" / name).read_bytes().startswith(PNG) for name in images)
    assert len(images) == written.count("<h3>") and "5 clips" in written
    assert (
        "5 clips of <code>cache</code> (not the clips that the run was validated on, 5 of which the run was trained on)"
        in written
    )
    (tmp_path / "clips.txt").write_text("00.mp4\n01.mp4\n")
    given = ("--run", work / "run", "--clips", tmp_path / "clips.txt", "--clips-each", 1)
    assert run_command("show", "--page", tmp_path / "two", *given)[0] == 0
    written = (tmp_path / "two" / "index.html").read_text()
    assert "2 clips of <code>cache</code> that the run was validated on" in written
    top1 = float(re.search(r"top-1 ([\d.]+) % \(", written)[1])
    low, high = wilson_interval(top1, 2)
    assert f"top-1 {top1:.1f} % ({low:.1f} to {high:.1f})" in written


@pytest.fixture
def served(work, tmp_path, monkeypatch):
    """A run trained from a cache behind a URL, and the server."""
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    with faulty_server(work) as server:
        cache = FeatureCache(f"{server.url}/cache")
        options = TrainOptions(head="decoder2", epochs=1, batch=4, lr=2e-3)
        train(cache, cache, options=options, out=tmp_path / "run", val_clips=[0, 1])
        yield server


def test_the_page_of_a_run_from_a_url_is_that_of_its_cache(served, tmp_path, run_command):
    given = ("show", "--page", tmp_path / "page", "--run", tmp_path / "run", "--clips-each", 1)
    status, _, err = run_command(*given)
    assert status == 0, err
    written = (tmp_path / "page" / "index.html").read_text()
    assert "<code>cache</code>" in written and written.count("<h3>") >= 1


def test_a_cache_of_a_run_that_cannot_be_opened_is_told_with_its_place(served, work, tmp_path, run_command):
    given = ("show", "--page", tmp_path / "page", "--run")
    served.root = tmp_path / "away"
    status, _, err = run_command(*given, tmp_path / "run")
    assert status == 1 and f"{served.url}/cache" in err and "give --cache" in err and err.count("\n") == 1
    for change, told in (({"fingerprint": "online-12"}, "--online"), (None, "was imported")):
        content = json.loads((work / "run" / "config.json").read_text())
        content["caches"] = {} if change is None else {"val": {**content["caches"]["val"], **change}}
        other = tmp_path / told.strip("-")
        other.mkdir()
        (other / "head.safetensors").write_bytes((work / "run" / "head.safetensors").read_bytes())
        (other / "config.json").write_text(json.dumps(content))
        status, _, err = run_command(*given, other)
        assert status == 2 and told in err and err.count("\n") == 1


def test_the_command_draws_from_a_cache_and_from_a_video(work, tmp_path, run_command):
    given = ("--run", work / "run", "--out", tmp_path / "a.png")
    assert run_command("show", "00.mp4", "--cache", work / "cache", *given)[0] == 0
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    status, out, _ = run_command("show", work / "videos" / "00.mp4", *given, "--json")
    assert status == 0 and '"written"' in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "takes a CLIP, or --page FOLDER"),
        (("x.mp4",), "a video needs --run"),
        (("x.mp4", "--run", "RUN"), "x.mp4"),
        (("x.mp4", "--cache", "CACHE"), "'x.mp4' is no clip of the cache"),
        (("00.mp4", "--cache", "CACHE", "--view", "5"), "expected 0 to 1"),
    ],
)
def test_mistakes_are_one_line(work, run_command, arguments, message):
    named = {"RUN": work / "run", "CACHE": work / "cache"}
    status, _, err = run_command("show", *(named.get(a, a) for a in arguments))
    assert status in (1, 2) and message in err and err.count("\n") == 1


def test_without_matplotlib_the_extra_is_named(work, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'evl-cache\[show\]'"):
        view.show_cached(FeatureCache(work / "cache"), "00.mp4", tmp_path / "x.png", run=None)
