"""Files that are no videos by their names: folders pass them over and say so, and whoever names one gets it."""

import av
import numpy as np
import pytest
from click.testing import CliRunner

from evl_cache.datasets import check_missing, describe_passed_over
from evl_cache.datasets.folder import read_folder
from evl_cache.datasets.list_file import read_lists
from evl_cache.errors import UsageError
from evl_cache.live.predict import count_passed_over, find_videos, links_passed_over
from evl_cache.video import DecodeOptions, decode_clip
from evl_cache_cli.main import cli


def make_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_files_of_other_endings_are_counted_by_split(tmp_path):
    make_files(
        tmp_path, "train/a/1.mp4", "train/a/2.GIF", "train/a/deep/3.gif", "train/a/notes", "train/a/.DS_Store"
    )
    make_files(tmp_path, "train/only_gifs/4.gif", "val/a/5.mp4", "val/a/6.jpg")
    lists = read_folder(tmp_path)
    assert lists["train"].classes == ("a",)
    assert lists["train"].passed_over == {".gif": 3, "": 1}
    assert lists["val"].passed_over == {".jpg": 1}


def test_nothing_is_said_of_a_folder_of_videos_alone(tmp_path):
    make_files(tmp_path, "a/1.mp4", "b/2.webm", "b/.hidden")
    assert not read_folder(tmp_path)["all"].passed_over


def test_numbers_are_described_with_the_commonest_endings_first():
    assert describe_passed_over({".txt": 1, ".gif": 2}) == "3 files (2 .gif, 1 .txt)"
    assert describe_passed_over({"": 1}) == "1 file (1 without an ending)"
    assert describe_passed_over(dict.fromkeys("abcdefg", 1)) == "7 files (1 a, 1 b, 1 c, 1 d, 1 e, …)"


def test_a_folder_without_a_video_is_refused_with_what_there_is(tmp_path):
    make_files(tmp_path, "a/1.gif", "a/2.gif")
    with pytest.raises(UsageError, match=r"no video in any folder, but 2 files \(2 \.gif\)"):
        read_folder(tmp_path)


def test_extract_says_in_one_line_what_it_passes_over(tmp_path):
    make_files(tmp_path, "clips/a/1.mp4", "clips/a/2.gif")
    what = f"extract --dataset folder --root {tmp_path}/clips --layers 1-2 --model evl-tiny --device cpu"
    answer = CliRunner().invoke(cli, [*what.split(), "--cache", str(tmp_path / "cache")])
    said = [line for line in answer.stderr.splitlines() if "passed over" in line]
    assert len(said) == 1 and "passed over 1 file (1 .gif), no videos by their endings" in said[0]


def test_predict_passes_over_the_same_and_takes_what_is_named(tmp_path):
    make_files(tmp_path, "x/1.mp4", "x/2.gif", "x/deep/3.gif", "x/.hidden", "4.gif")
    given = [tmp_path / "x", tmp_path / "4.gif"]
    assert find_videos(given) == [tmp_path / "x" / "1.mp4", tmp_path / "4.gif"]
    assert count_passed_over(given) == {".gif": 2}


def test_predict_names_the_links_to_folders_that_it_does_not_follow(tmp_path):
    make_files(tmp_path, "x/1.mp4", "y/2.mp4")
    (tmp_path / "x" / "deep").mkdir()
    (tmp_path / "x" / "deep" / "y").symlink_to(tmp_path / "y")
    (tmp_path / "link").symlink_to(tmp_path / "y")
    given = [tmp_path / "x", tmp_path / "link"]
    assert find_videos(given) == [tmp_path / "x" / "1.mp4", tmp_path / "link" / "2.mp4"]
    assert links_passed_over(given) == [tmp_path / "x" / "deep" / "y"]
    answer = CliRunner().invoke(cli, ["predict", str(tmp_path / "x"), "--run", str(tmp_path / "none")])
    assert "links to folders are not followed (1, such as " in answer.stderr


def every(count):
    return np.arange(count)[None]


def test_a_gif_that_is_named_is_decoded_picture_by_picture(tmp_path):
    path = tmp_path / "clip.gif"
    shades = np.arange(0, 250, 36, dtype=np.uint8)  # of FFmpeg's palette
    with av.open(str(path), "w") as container:
        stream = container.add_stream("gif", rate=10, width=32, height=24, pix_fmt="rgb8")
        for shade in shades:
            picture = np.full((24, 32, 3), shade, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture).reformat(format="rgb8")))
        container.mux(stream.encode())
    found = decode_clip(path, every, options=DecodeOptions(decoder="auto"))
    assert found.header.num_frames_in_file == len(shades)
    levels = found.frames[:, 12, 16].astype(int).sum(axis=1)
    assert (np.diff(levels) > 0).all()


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_picture_that_is_named_is_a_clip_of_one_frame(tmp_path, suffix):
    path = tmp_path / f"100%.{suffix}"
    codec, pix_fmt = {"jpg": ("mjpeg", "yuvj444p"), "png": ("png", "rgb24")}[suffix]
    with av.open(str(tmp_path / f"1.{suffix}"), "w", options={"update": "1"}) as container:
        stream = container.add_stream(codec, rate=1, width=32, height=24, pix_fmt=pix_fmt)
        frame = av.VideoFrame.from_ndarray(np.full((24, 32, 3), 200, np.uint8)).reformat(format=pix_fmt)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / f"1.{suffix}").rename(path)
    found = decode_clip(path, every)
    assert found.header.num_frames_in_file == 1
    assert abs(found.frames[0].astype(int) - 200).max() <= 2


def test_a_picture_whose_name_is_a_pattern_is_not_those_beside_it(tmp_path):
    for name, shade in (("1.png", 10), ("2.png", 20), ("%d.png", 200)):
        with av.open(str(tmp_path / "one.png"), "w", options={"update": "1"}) as container:
            stream = container.add_stream("png", rate=1, width=32, height=24, pix_fmt="rgb24")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((24, 32, 3), shade, np.uint8))))
            container.mux(stream.encode())
        (tmp_path / "one.png").rename(tmp_path / name)
    found = decode_clip(tmp_path / "%d.png", every)
    assert found.header.num_frames_in_file == 1 and (found.frames == 200).all()


@pytest.mark.parametrize("name", ["frames/%05d.jpg", "frames", "frames/%d.png"])
def test_frames_in_files_of_their_own_are_refused_with_the_command_that_makes_a_video(tmp_path, name):
    make_files(tmp_path, "1.mp4", "frames/00001.jpg")
    (tmp_path / "list.txt").write_text(f"1.mp4 0\n{name} 1\n")
    clips = read_lists(tmp_path / "list.txt", split=None)["all"]
    with pytest.raises(UsageError, match=r"line 2.*ffmpeg -framerate 25 -i '.*' -c copy CLIP\.mkv"):
        check_missing(clips, tmp_path, allow_percent=0)


def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path):
    make_files(tmp_path, "a%05d.mp4", "100%.jpg")
    (tmp_path / "list.txt").write_text("a%05d.mp4 0\n100%.jpg 1\n")
    assert (
        check_missing(read_lists(tmp_path / "list.txt", split=None)["all"], tmp_path, allow_percent=0) == []
    )
