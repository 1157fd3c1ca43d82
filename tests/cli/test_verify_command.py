"""`evl-cache verify` as a command: its report, its exit status, its progress line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from evl_cache import progress_lines
from evl_cache.store import FeatureCache, array_layouts
from evl_cache_cli.main import cli
from tests.support.feature_caches import write_cache


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "cache"
    write_cache(path, labels=[0] * 20, block_clips=1, layers=(2,), maps="none")
    return path


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    """A cache with a shard of which nothing is left."""
    path = Path(shutil.copytree(finished, tmp_path / "cache"))
    array_layouts(FeatureCache(path).spec)["tokens"].shard(path, 3).write_bytes(b"")
    return path


def verify(*words: object) -> Result:
    return CliRunner().invoke(cli, ["verify", *map(str, words)])


def status(*words: object) -> int:
    """The exit status, which the console script ends with."""
    return int(CliRunner().invoke(cli, ["verify", *map(str, words)], standalone_mode=False).return_value)


def test_the_whole_cache_is_told_in_a_line(finished: Path) -> None:
    done = verify(finished)
    digest = FeatureCache(finished).fingerprint
    assert done.exit_code == 0
    assert done.stdout == f"{finished}: 20 of 20 blocks done and intact, 0 problems; digest {digest}\n"


@pytest.mark.parametrize("share", ["25%", "25", " 25.0 %"])
def test_a_sample_is_told_with_its_share_and_what_the_digest_is_of(finished: Path, share: str) -> None:
    done = verify(finished, "--sample", share)
    assert done.exit_code == 0
    assert "of 20 blocks 5 were read, 0 problems; digest " in done.stdout
    assert done.stdout.endswith("by the manifest: not all files were read\n")


def test_a_sample_of_all_is_told_without_a_caution(finished: Path) -> None:
    assert "not all files were read" not in verify(finished, "--sample", "100%").stdout


@pytest.mark.parametrize("share", ["0", "-5%", "101%", "nan", "some", "", "5%%"])
def test_a_share_that_is_none_is_an_error_that_says_what_is_expected(finished: Path, share: str) -> None:
    done = verify(finished, f"--sample={share}")
    assert done.exit_code == 2
    assert "expected more than 0 and at most 100, such as 5%" in done.output


def test_a_seed_without_a_sample_is_an_error(finished: Path) -> None:
    done = verify(finished, "--seed", 1)
    assert done.exception is not None and "give both, or neither" in str(done.exception)


def test_the_status_tells_only_of_what_was_read(damaged: Path) -> None:
    found = set()
    for seed in range(8):
        words = (damaged, "--sample", "50%", "--seed", seed)
        is_read = "damaged: " in verify(*words).stderr
        assert status(*words) == is_read
        found.add(is_read)
    assert found == {False, True} and status(damaged) == 1


def test_the_json_says_how_many_blocks_were_read(finished: Path) -> None:
    assert json.loads(verify(finished, "--json").stdout)["sampled_blocks"] is None
    found = json.loads(verify(finished, "--json", "--sample", "5%").stdout)
    assert (found["sampled_blocks"], found["blocks_done"], found["problems"]) == (1, 20, [])


def test_of_an_unfinished_cache_the_blocks_done_are_told_too(damaged: Path) -> None:
    for name in ("manifest.json", "done/000003.json"):
        (damaged / name).unlink()
    assert "19 blocks done; of 20 blocks 10 were read" in verify(damaged, "--sample", "50%").stdout


def test_no_line_is_shown_where_stderr_is_no_terminal(finished: Path) -> None:
    assert verify(finished).stderr == ""


def test_a_line_is_asked_for_and_none_with_json(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], progress_lines._line

    def line(*, shown: bool = True, **options: object) -> object:
        asked.append(shown)
        return real(shown=shown, **options)

    monkeypatch.setattr(progress_lines, "_line", line)
    verify(finished)
    verify(finished, "--json")
    assert asked == [True, True, False, False]  # of marks and of bytes


def test_the_line_counts_marks_and_then_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tqdm import tqdm

    monkeypatch.setattr(
        progress_lines, "_line", lambda *, shown, **options: tqdm(**options, disable=not shown)
    )
    with progress_lines.verify_progress("verify") as on_progress:
        for done in range(1, 4):
            on_progress("marks", done, 3)
        for done in (1_000_000, 2_000_000):
            on_progress("bytes", done, 2_000_000)
    shown = capsys.readouterr().err
    assert re.search(r"verify: marks: .* 0/3 ", shown)
    assert re.search(r"verify: 100%.* 2.00M/2.00M .*B/s", shown)
