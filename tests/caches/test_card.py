"""`evl-cache card`: front matter that data hubs read, figures that are the cache's own, examples that run."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from evl_cache.caches.card import cache_card, make_card
from evl_cache.caches.share import pull, push
from evl_cache.errors import CacheError, UsageError
from evl_cache.store import FeatureCache, verify_cache
from evl_cache_cli.main import cli
from tests.support.feature_caches import TOWER, write_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("card") / "cache", dataset="k400", failed=(7,)).path


def front_matter(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def test_the_front_matter_is_what_data_hubs_read(cache: Path) -> None:
    found = front_matter(cache_card(FeatureCache(cache), license_name="cc-by-4.0"))
    assert found == {
        "pretty_name": "k400 train, tiny, layers 2-4, 3 frames",
        "license": "cc-by-4.0",
        "task_categories": ["video-classification"],
        "size_categories": ["n<1K"],
        "tags": ["evl-cache", "features", "video", "zarr", "k400"],
        "viewer": False,
    }
    assert front_matter(cache_card(FeatureCache(cache)))["license"] == "unknown"


def test_the_card_states_what_info_and_the_manifest_state(cache: Path) -> None:
    opened = FeatureCache(cache)
    text = cache_card(opened)
    files = [
        p
        for p in cache.rglob("*")
        if p.is_file() and p.name not in ("manifest.json", "index.bin") and p.suffix != ".lock"
    ]
    for stated in (
        opened.fingerprint, opened.spec.feature_id, opened.spec.content_id, TOWER.weights_sha256,
        f"{sum(p.stat().st_size for p in files):,} bytes in {len(files)} files",
        "13 of 3 classes; 1 failed", "2-4 of 4", "tokens int8, maps uint8, codec default", "lin2022frozen", "kay2017kinetics",
    ):  # fmt: skip
        assert stated in text, stated
    command = re.search(r"^evl-cache extract .*", text, re.MULTILINE)
    assert command is not None and "--layers 2-4 --frames 3 --sampling strided --stride 2" in command[0]


def test_its_python_example_runs(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = FeatureCache(cache)
    shutil.copytree(cache, tmp_path / opened.spec.name)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", cache_card(opened), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert [tuple(value.shape) for value in names["tokens"]] == [(2, 3, 5, 16)] * 3
    assert names["labels"].tolist() == opened.labels.tolist()


def test_its_commands_are_ones_there_are(cache: Path) -> None:
    text = cache_card(FeatureCache(cache), address="https://example.org/caches/a b")
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    ours = [shlex.split(line)[1:] for line in lines if line.startswith("evl-cache")]
    assert [words[0] for words in ours] == ["extract", "pull", "train"]
    assert ours[1][1] == "https://example.org/caches/a b"
    for words in ours:
        command = cli.get_command(None, words[0])  # type: ignore[arg-type]
        assert command is not None
        command.make_context(
            words[0], words[1:], parent=cli.make_context("evl-cache", [], resilient_parsing=True)
        )


def test_names_that_hold_anything_neither_break_the_card_nor_reach_the_terminal(tmp_path: Path) -> None:
    tower = replace(TOWER, model='a|b\n---\n# <script>"\x1b[31m', pretrained="```\nx")
    opened = write_cache(tmp_path / "cache", tower=tower, dataset='q": [')
    text = cache_card(opened)
    assert front_matter(text)["tags"][-1] == 'q": ['
    body = re.sub(r"```.*?```", "", text.split("---\n", 2)[2], flags=re.DOTALL)
    assert "\\<script\\>" in body and "<script" not in body.replace("\\<", "")
    assert len(re.findall("^```", text, re.MULTILINE)) % 2 == 0 and text.count("\n# ") == 1
    printed = CliRunner().invoke(cli, ["card", str(opened.path), "--print"])
    assert printed.exit_code == 0 and "\x1b" not in printed.output


def test_it_is_written_once_and_replaced_only_where_that_is_said(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    make = {"address": None, "replace_card": False}
    file = make_card(tmp_path / "cache", license_name="unknown", **make)  # type: ignore[arg-type]
    assert file.read_text() == cache_card(FeatureCache(cache))
    assert make_card(tmp_path / "cache", license_name="unknown", **make) == file  # type: ignore[arg-type]
    file.write_text("mine")
    with pytest.raises(UsageError, match="--replace"):
        make_card(tmp_path / "cache", license_name="mit", **make)  # type: ignore[arg-type]
    assert file.read_text() == "mine"
    make_card(tmp_path / "cache", license_name="mit", address=None, replace_card=True)
    assert front_matter(file.read_text())["license"] == "mit"
    found = verify_cache(tmp_path / "cache")
    assert found.problems == () and found.strays == ()


def test_push_and_pull_take_it_along_but_not_with_a_part(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "a")
    push(tmp_path / "a", str(tmp_path / "b"))
    assert not (tmp_path / "b" / "README.md").exists()
    make_card(tmp_path / "a", license_name="mit", address=None, replace_card=False)
    assert push(tmp_path / "a", str(tmp_path / "b")).blocks_moved == 0
    pull(str(tmp_path / "b"), str(tmp_path / "c"))
    assert (tmp_path / "c" / "README.md").read_text() == (tmp_path / "a" / "README.md").read_text()
    pull(str(tmp_path / "b"), str(tmp_path / "d"), layers=(3, 4))
    assert not (tmp_path / "d" / "README.md").exists()  # it tells of another cache


def test_what_cannot_have_a_card_is_told(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(CacheError, match="no intact manifest"):
        cache_card(FeatureCache(tmp_path / "cache"))
    with pytest.raises(UsageError, match="identifier in small letters"):
        cache_card(FeatureCache(cache), license_name="My own\nlicence")
    with pytest.raises(UsageError, match="--print"):
        make_card("s3://lab/a", license_name="mit", address=None, replace_card=False)
