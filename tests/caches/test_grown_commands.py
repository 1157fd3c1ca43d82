"""Commands on a cache that has grown: they take it for the one that it is read as."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from evl_cache.errors import CacheDamaged, UsageError
from evl_cache.store import (
    ADDITIONS_NAME,
    GROWN_NAME,
    FeatureCache,
    array_layouts,
    cache_parts,
    verify_cache,
)
from evl_cache_cli.main import cli
from tests.support.example_data import make_data, settle
from tests.support.servers import KEYS, nginx, s3_server
from tests.support.store_helpers import differences, tree

EXTRACT = "extract --dataset list --root videos --frames 3 --stride 2 --device cpu".split()
SIX = "\n".join(f"clip {i}.mp4 {i % 3}" for i in range(6))
NINE = "\n".join(f"clip {i}.mp4 {i % 3}" for i in range(9))
SECOND_COPY = f"{ADDITIONS_NAME}/{GROWN_NAME}"


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, words)))


def done(*words: object) -> Result:
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos; `grown`, which got layer 2 and then three clips; `whole`, the same made at once; `base`, before."""
    folder = tmp_path_factory.mktemp("made")
    make_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        settle(patch, folder)
        (folder / "six.txt").write_text(SIX)
        (folder / "nine.txt").write_text(NINE)
        done(*EXTRACT, "--list", "six.txt", "--layers", "3-4", "--cache", "grown")
        shutil.copytree("grown", "base")
        told = done(*EXTRACT, "--list", "six.txt", "--layers", "2-4", "--cache", "grown").output
        assert "adds layers 2 of 6 clips to grown" in told
        told = done(*EXTRACT, "--list", "nine.txt", "--layers", "2-4", "--cache", "grown").output
        assert "adds 3 clips to grown" in told
        done(*EXTRACT, "--list", "nine.txt", "--layers", "2-4", "--cache", "whole")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The caches, copied: they may be damaged. The command's directory."""
    settle(monkeypatch, tmp_path)
    for name in ("grown", "whole", "base"):
        shutil.copytree(made / name, tmp_path / name)
    for name in ("videos", "nine.txt"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    return tmp_path


def same(one: FeatureCache, other: FeatureCache) -> None:
    rows = range(len(other))
    assert (one.spec, list(one.clips)) == (other.spec, list(other.clips))
    for mine, theirs in zip(one.read(rows), other.read(rows), strict=True):
        assert mine is not None and theirs is not None
        assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


def test_a_grown_cache_is_the_one_made_at_once(made: Path) -> None:
    same(FeatureCache(made / "grown"), FeatureCache(made / "whole"))


def test_the_same_command_again_has_nothing_to_do(folder: Path) -> None:
    before = tree(folder / "grown")
    out = done(*EXTRACT, "--list", "nine.txt", "--layers", "2-4", "--cache", "grown", "--json").stdout
    report = json.loads(out)["caches"][0]
    assert report["was_done"] and (report["clips"], report["clips_here"]) == (9, 0)
    assert report["cache_digest"] == FeatureCache(folder / "grown").fingerprint
    assert differences(tree(folder / "grown"), before) == []


def test_info_tells_what_was_added(folder: Path) -> None:
    out = done("info", "grown").output
    assert "9 clips of 3 classes" in out and "layers    [2, 3, 4]" in out
    assert "added     layers 2\n" in out and "added     clips 7 to 9\n" in out
    found, alone = (json.loads(done("info", name, "--json").output) for name in ("grown", "whole"))
    assert found["is_complete"] and found["clips_done"] == 9
    assert found["cache_digest"] == FeatureCache(folder / "grown").fingerprint
    assert found["spec"] == alone["spec"] and alone["additions"] == []


def shards_of(cache: Path) -> list[Path]:
    """Every shard of the base and of what was added."""
    return [
        layout.shard(part.path, block)
        for part in cache_parts(cache).parts
        for layout in array_layouts(part.spec).values()
        for block in range(part.spec.num_blocks)
    ]


def test_ls_has_one_line_for_it(folder: Path) -> None:
    listed = {Path(c["place"]).name: c for c in json.loads(done("ls", ".", "--json").output)["caches"]}
    assert set(listed) == {"grown", "whole", "base"}
    grown, whole = listed["grown"], listed["whole"]
    assert grown["is_complete"] and grown["layers"] == whole["layers"] == "2-4"
    assert grown["clips"] == 9 and grown["blocks"] == grown["blocks_done"] == 3
    assert grown["cache_digest"] == FeatureCache(folder / "grown").fingerprint
    assert grown["nbytes"] == sum(path.stat().st_size for path in shards_of(folder / "grown"))


def test_its_card_is_of_all_of_it(folder: Path) -> None:
    text = done("card", "grown", "--print").output
    assert "9 of 3 classes" in text and FeatureCache(folder / "grown").fingerprint in text


def test_training_from_it_is_training_from_the_one_made_at_once(folder: Path) -> None:
    losses, heads = [], []
    for name in ("grown", "whole"):
        options = "--head decoder2 --epochs 2 --batch 4 --device cpu --seed 3".split()
        done("train", "--cache", name, "--val-cache", name, *options, "--out", f"run-{name}")
        steps = (folder / f"run-{name}" / "steps.jsonl").read_text().splitlines()
        losses.append([json.loads(step)["loss"] for step in steps])
        heads.append((folder / f"run-{name}" / "head.safetensors").read_bytes())
        done("eval", "--run", f"run-{name}", "--cache", name)
    assert losses[0] == losses[1] != []
    assert heads[0] == heads[1]


def test_a_run_of_fewer_classes_is_told_of_the_new_ones(folder: Path) -> None:
    options = "--head decoder2 --epochs 1 --batch 4 --device cpu".split()
    done("train", "--cache", "base", "--val-cache", "base", *options, "--out", "run")
    (folder / "more.txt").write_text(f"{SIX}\nclip 6.mp4 3")
    done(*EXTRACT, "--list", "more.txt", "--layers", "3-4", "--cache", "base")
    for words in (("eval", "--run", "run", "--cache", "base"), ("show", "--run", "run", "--page", "page")):
        refusal = invoke(*words).exception
        assert isinstance(refusal, UsageError) and "its head has 3 classes, base has 4" in str(refusal)


@pytest.mark.parametrize("place", ["", ADDITIONS_NAME])
def test_damage_is_found_and_repaired_wherever_it_lies(folder: Path, place: str) -> None:
    before = tree(folder / "grown")
    assert verify_cache(folder / "grown").problems == ()
    names = [(path, path.relative_to(folder / "grown").as_posix()) for path in shards_of(folder / "grown")]
    damaged = [path for path, name in names if name.startswith(f"{place}/" if place else "tokens/")]
    assert damaged
    for shard in damaged:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    found = done("verify", "grown").output
    assert f"damaged: {Path('grown') / place}" in found and " 0 problems" not in found
    result = done("repair", "grown", "--device", "cpu")
    assert "blocks redone" in result.output
    assert verify_cache(folder / "grown").problems == ()
    assert differences(tree(folder / "grown"), before) == []


@pytest.mark.parametrize("name", [GROWN_NAME, SECOND_COPY])
@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_damaged_list_of_additions_is_never_believed(folder: Path, name: str, at: float) -> None:
    file, before = folder / "grown" / name, tree(folder / "grown")
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 1
    file.write_bytes(content)
    if name == GROWN_NAME:
        with pytest.raises(CacheDamaged, match="repair the cache"):
            FeatureCache(folder / "grown")
    assert verify_cache(folder / "grown").problems != ()
    done("repair", "grown", "--device", "cpu")
    assert differences(tree(folder / "grown"), before) == []
    assert verify_cache(folder / "grown").problems == ()


def test_a_list_of_additions_that_is_lost_is_told_and_restored(folder: Path) -> None:
    before = tree(folder / "grown")
    (folder / "grown" / GROWN_NAME).unlink()
    assert f"{GROWN_NAME}: is not there" in done("verify", "grown").output
    done("repair", "grown", "--device", "cpu")
    assert differences(tree(folder / "grown"), before) == []
    (folder / "grown" / GROWN_NAME).unlink()
    shutil.rmtree(folder / "grown" / ADDITIONS_NAME)
    assert "0 problems" in done("verify", "grown").output
    assert FeatureCache(folder / "grown").spec == FeatureCache(folder / "base").spec


def test_every_flipped_byte_of_the_list_is_found(folder: Path) -> None:
    file = folder / "grown" / GROWN_NAME
    content = file.read_bytes()
    for at in range(0, len(content), 7):
        file.write_bytes(content[:at] + bytes([content[at] ^ 2]) + content[at + 1 :])
        with pytest.raises(CacheDamaged):
            FeatureCache(folder / "grown")


def test_an_addition_that_is_gone_or_another_one_is_told(folder: Path) -> None:
    first, second = (part.path for part in cache_parts(folder / "grown").parts[1:])
    first.rename(folder / "away")
    with pytest.raises(CacheDamaged, match="bring the directory back"):
        FeatureCache(folder / "grown")
    assert verify_cache(folder / "grown").problems != ()
    shutil.copytree(second, first)
    with pytest.raises(CacheDamaged, match=r"is not the addition that grown\.json names"):
        FeatureCache(folder / "grown")
    assert verify_cache(folder / "grown").problems != ()


def test_what_was_added_is_found_again_where_its_list_is_lost(folder: Path) -> None:
    before = tree(folder / "grown")
    for name in (GROWN_NAME, SECOND_COPY):
        (folder / "grown" / name).unlink()
    (folder / "six.txt").write_text(SIX)
    for name in ("six.txt", "nine.txt"):
        report = done(*EXTRACT, "--list", name, "--layers", "2-4", "--cache", "grown", "--json").stdout
        assert json.loads(report)["caches"][0]["clips_here"] == 0
    assert differences(tree(folder / "grown"), before) == []


def test_a_copy_of_it_has_the_same_bytes(folder: Path) -> None:
    done("pull", "base", "copied")
    report = json.loads(done("push", "grown", "copied", "--json").output)
    assert report["cache_digest"] == FeatureCache(folder / "grown").fingerprint
    assert (report["blocks"], report["blocks_moved"]) == (3, 2)
    assert differences(data_of(folder / "copied"), data_of(folder / "grown")) == []
    assert json.loads(done("push", "grown", "copied", "--json").output)["blocks_moved"] == 0


def data_of(cache: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(cache).items() if "locks/" not in name}


def test_a_copy_that_grew_otherwise_stays_as_it_is(folder: Path) -> None:
    before = tree(folder / "grown")
    assert "grew otherwise" in str(invoke("push", "base", "grown").exception)
    assert differences(tree(folder / "grown"), before) == []


def test_no_part_is_taken_of_it(folder: Path) -> None:
    refusal = invoke("pull", "grown", "some", "--layers", "2").exception
    assert isinstance(refusal, UsageError) and "has grown (layers 2, clips 7 to 9)" in str(refusal)
    assert not (folder / "some").exists()


@pytest.fixture(scope="module")
def remote(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as url, pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        done("push", made / "grown", "s3://lab/grown")
        yield "s3://lab/grown"


def test_it_is_read_from_a_bucket_and_pulled_back(folder: Path, remote: str) -> None:
    opened = FeatureCache(remote)
    same(opened, FeatureCache(folder / "whole"))
    assert opened.fingerprint == FeatureCache(folder / "grown").fingerprint
    assert json.loads(done("info", remote, "--json").output)["clips_done"] == 9
    listed = json.loads(done("ls", "s3://lab", "--json").output)["caches"]
    assert [(one["layers"], one["clips"], one["is_complete"]) for one in listed] == [("2-4", 9, True)]
    done("pull", remote, "pulled")
    assert differences(data_of(folder / "pulled"), data_of(folder / "grown")) == []


def test_it_is_read_from_a_web_server(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")
    (tmp_path / "nginx").mkdir()
    with nginx(tmp_path / "nginx") as server:
        shutil.copytree(folder / "grown", server.www / "grown")
        opened = FeatureCache(f"{server.url}/grown")
        same(opened, FeatureCache(folder / "whole"))
        buffers = opened.buffers(slots=9)
        opened.prefetch(buffers, range(9))
        opened.read_into(buffers, enumerate(range(9)))


def test_it_is_verified_on_a_web_server_as_on_the_disk(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")
    (tmp_path / "nginx").mkdir()
    addition = cache_parts(folder / "grown").parts[2].path.relative_to(folder / "grown").as_posix()
    shard = shards_of(folder / "grown" / addition)[0].relative_to(folder / "grown").as_posix()
    with nginx(tmp_path / "nginx") as server:
        served = server.www / "grown"
        shutil.copytree(folder / "grown", served)
        for name in (
            "",
            GROWN_NAME,
            SECOND_COPY,
            shard,
            f"{addition}/manifest.json",
            f"{addition}/zarr.json",
        ):
            for damage in (lambda content: content[:-9] + b"?" + content[-8:], lambda content: None):
                if name:
                    spoilt = damage((served / name).read_bytes())
                    (served / name).unlink() if spoilt is None else (served / name).write_bytes(spoilt)
                remote, local = verify_cache(f"{server.url}/grown"), verify_cache(served)
                assert [problem.block for problem in remote.problems] == [p.block for p in local.problems]
                assert (remote.problems == ()) == (name == "")
                assert (remote.cache_digest, remote.blocks_done) == (local.cache_digest, local.blocks_done)
                told = " ".join(problem.reason for problem in remote.problems)
                assert "evl-cache-verify" not in told and str(tmp_path) not in told and "repair" not in told
                if name:
                    shutil.copy(folder / "grown" / name, served / name)
