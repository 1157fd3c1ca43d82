"""push, pull and training from an S3 server and from nginx, killed in mid-transfer and run again."""

import json
import os
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.credentials import PASSWORD, USER, write_secret
from tests.support.feature_caches import write_cache
from tests.support.forked_commands import Commands, Ended
from tests.support.patience import patience_of_attempts
from tests.support.servers import KEYS, Nginx, nginx, s3_server
from tests.support.store_helpers import (
    BROKEN,
    clear_mark,
    differences,
    extract_small,
    load_clips,
    small_spec,
    small_tower,
    tree,
    wait_until,
)

pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")

from evl_cache.caches.share import pull, push
from evl_cache.errors import CacheDamaged, CacheError, UsageError
from evl_cache.store import FeatureCache, open_objects, verify_cache
from evl_cache.store.copying import to_directory as transfer_module
from evl_cache.store.disk.permissions import set_file_mode
from evl_cache.store.objects.objects import open_writable

CLIPS = 60


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    forked = Commands(tmp_path_factory.mktemp("commands"))
    yield forked
    forked.close()


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of twelve blocks and one to validate on."""
    root = tmp_path_factory.mktemp("caches")
    write_cache(root / "a", labels=[i % 3 for i in range(CLIPS)], failed=(7,))
    write_cache(root / "v", labels=[i % 3 for i in range(9)], split="val", prefix="v", seed=1)
    for name in ("a", "v"):
        shutil.rmtree(root / name / "locks")
    return root


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment for a bucket `lab` of a server on loopback."""
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as url:
        yield {**KEYS, "AWS_ENDPOINT_URL": url}


@pytest.fixture
def bucket(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    return "s3://lab"


@pytest.fixture(scope="module")
def web(caches: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with nginx(tmp_path_factory.mktemp("nginx"), rate="limit_rate 120k;") as server:
        shutil.copytree(caches, server.www / "caches")
        yield server


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def files_of(cache: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(cache).items() if not name.startswith("locks/")}


def objects_of(url: str, like: Path) -> dict[str, bytes]:
    objects = open_objects(url)
    return {name: objects.get(name, most_nbytes=1 << 30) for name in files_of(like)}


def _stopped_with(pid: int, objects, name: str) -> bool:  # type: ignore[no-untyped-def]
    """Whether an object is there; the process stands still meanwhile, and goes on only where it is not."""
    os.kill(pid, signal.SIGSTOP)
    if _has(objects, name):
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def test_push_to_a_bucket_killed_on_the_way_goes_on_and_pull_brings_back_the_same_bytes(
    commands: Commands, caches: Path, bucket: str, s3: dict[str, str], tmp_path: Path
) -> None:
    url, source = f"{bucket}/pushed/a", caches / "a"
    pid = commands.start("push", source, url, "--threads", 1, **s3)
    third = open_objects(f"{url}/done")
    wait_until(lambda: _stopped_with(pid, third, "000002.json"), what="the third mark in the bucket")
    commands.kill(pid)
    assert not _has(open_objects(url), "manifest.json")
    with pytest.raises(CacheError, match="not complete; finish extract or push"):
        pull(url, str(tmp_path / "half"))
    assert not (tmp_path / "half").exists()
    again = commands.run("push", source, url, "--json", **s3).json
    assert again["blocks"] == 12 and 1 <= again["blocks_moved"] <= 9
    assert differences(objects_of(url, source), files_of(source)) == []
    assert commands.run("push", source, f"{bucket}/pushed/", "--json", **s3).json["blocks_moved"] == 0

    pull_once = ("pull", url, tmp_path / "pulled", "--threads", 1)
    commands.kill_stopped(commands.start(*pull_once, stops_with="pulled/done/000003.json", **s3))
    assert not (tmp_path / "pulled/manifest.json").exists()
    half = FeatureCache(tmp_path / "pulled")
    assert 4 <= half.num_blocks_done < 12
    half.read([sample for sample in range(20) if sample != 7])
    pulled = commands.run("pull", url, tmp_path / "pulled", "--json", **s3).json
    assert pulled["blocks_moved"] == 12 - half.num_blocks_done
    assert pulled["cache_digest"] == FeatureCache(source).fingerprint
    assert differences(files_of(tmp_path / "pulled"), files_of(source)) == []
    assert verify_cache(tmp_path / "pulled").strays == ()


def test_a_push_that_would_take_something_away_is_refused_and_changes_nothing(
    bucket: str, tmp_path: Path
) -> None:
    url = f"{bucket}/kept/a"
    whole, worse, begun = (
        write_cache(tmp_path / n, failed=f).path for n, f in (("whole", ()), ("worse", (0,)), ("begun", ()))
    )
    clear_mark(begun, FeatureCache(begun).spec, 2)
    push(whole, url)
    before = objects_of(url, whole)
    with pytest.raises(CacheError, match=r"holds a complete cache, .* has 2 of 3 blocks done"):
        push(begun, url)
    with pytest.raises(CacheError, match="block 0 stays as it is: 1 of its clips would lose"):
        push(worse, url)
    assert differences(objects_of(url, whole), before) == []
    push(worse, f"{bucket}/kept/b")
    before, path = objects_of(f"{bucket}/kept/b", whole), whole / "maps/c.0.0.0.0.0.0"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CacheDamaged, match="not those its mark promises"):
        push(whole, f"{bucket}/kept/b")
    assert differences(objects_of(f"{bucket}/kept/b", whole), before) == []
    path.write_bytes(content)
    push(whole, f"{bucket}/kept/b")  # the other way round it is welcome
    assert differences(objects_of(f"{bucket}/kept/b", whole), files_of(whole)) == []


def _has(objects, name: str) -> bool:  # type: ignore[no-untyped-def]
    try:
        objects.get_range(name, 0, 1)
    except FileNotFoundError:
        return False
    return True


def test_pull_from_nginx_killed_in_a_file_fetches_no_finished_file_again(
    commands: Commands, web: Nginx, caches: Path, tmp_path: Path
) -> None:
    target = tmp_path / "a"
    pull_once = ("pull", f"{web.url}/caches/a", target, "--threads", 2)
    commands.kill_stopped(commands.start(*pull_once, stops_with="done/000002.json"))
    finished = {p.relative_to(target).as_posix() for p in target.glob("*/c.*")}
    before = len(web.requests())
    again = commands.run("pull", f"{web.url}/caches/a", target, "--threads", 8, "--json").json
    assert again["cache_digest"] == FeatureCache(caches / "a").fingerprint
    asked = {line.split()[1].removeprefix("/caches/a/") for line in web.requests()[before:]}
    assert finished and not finished & asked
    assert differences(files_of(target), files_of(caches / "a")) == []


def test_push_to_a_directory_over_tls_and_back(
    web: Nginx, caches: Path, tmp_path: Path, commands: Commands
) -> None:
    assert push(caches / "a", f"{tmp_path}/shared/").blocks_moved == 12
    assert push(caches / "a", f"{tmp_path}/shared/").blocks_moved == 0
    assert differences(files_of(tmp_path / "shared" / "a"), files_of(caches / "a")) == []
    write_secret(tmp_path / "netrc", f"machine localhost login {USER} password {PASSWORD}\n")
    environment = {"SSL_CERT_FILE": str(web.certificate), "NETRC": str(tmp_path / "netrc")}
    ended = commands.run("pull", f"{web.tls_url}/caches/v", tmp_path / "v", **environment)
    assert ended.status == 0 and PASSWORD not in ended.stdout + ended.stderr
    assert differences(files_of(tmp_path / "v"), files_of(caches / "v")) == []


TRAIN = "--head decoder2 --steps 12 --batch 8 --save-every-steps 1 --shuffle-blocks 0 --device cpu".split()


@pytest.fixture(scope="module")
def local_head(commands: Commands, caches: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of an undisturbed run on the disk."""
    out = tmp_path_factory.mktemp("local") / "run"
    places = ["--cache", caches / "a", "--val-cache", caches / "v"]
    assert commands.run("train", *places, "--out", out, *TRAIN).status == 0
    return (out / "head.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["s3", "nginx"])
def test_training_from_a_url_killed_on_the_way_gives_the_head_of_a_local_run(
    commands: Commands, caches: Path, bucket: str, s3: dict[str, str], web: Nginx, tmp_path: Path,
    local_head: bytes, kind: str,
) -> None:  # fmt: skip
    if kind == "s3":
        for name in ("a", "v"):
            push(caches / name, f"{bucket}/train/")
    base = f"{bucket}/train" if kind == "s3" else f"{web.url}/caches"
    places = ["--cache", f"{base}/a", "--val-cache", f"{base}/v"]
    out = tmp_path / "run"
    commands.kill_stopped(commands.start("train", *places, "--out", out, *TRAIN, stops_with="last.pt", **s3))
    assert not (out / "head.safetensors").exists()
    resumed = commands.run("train", *places, "--out", out, *TRAIN, "--resume", **s3)
    assert resumed.status == 0, resumed
    assert (out / "head.safetensors").read_bytes() == local_head
    config = json.loads((out / "config.json").read_text())
    assert config["caches"]["train"]["path"] == f"{base}/a"
    found = commands.run("ls", f"{base}/", "--json", **s3).json["caches"]
    assert [(c["place"], c["is_complete"]) for c in found] == [(f"{base}/a", True), (f"{base}/v", True)]
    few = ["--head", "decoder2", "--steps", 1, "--batch", 8, "--device", "cpu"]
    by_name = commands.run(
        "train", "--dataset", "test", "--out", tmp_path / "named", *few, EVL_CACHE_ROOT=base, **s3
    )
    assert by_name.status == 0 and f"train cache: {base}/a" in by_name.stderr
    told = [by_name.stderr, resumed.stderr, *(f.read_text(errors="replace") for f in out.glob("*.json*"))]
    assert not any(KEYS["AWS_SECRET_ACCESS_KEY"] in text for text in told)


def test_only_blocks_that_differ_are_moved_and_another_cache_is_never_mixed_in(
    caches: Path, tmp_path: Path, bucket: str
) -> None:
    source, target = shutil.copytree(caches / "a", tmp_path / "a"), tmp_path / "b"
    push(source, str(target))
    push(source, f"{bucket}/differ/a")
    (target / "done" / "000004.json").unlink()
    (target / "manifest.json").unlink()
    shard = target / "maps" / "c.5.0.0.0.0.0"
    shard.unlink()
    open_writable(f"{bucket}/differ/a").delete("done/000003.json")
    open_writable(f"{bucket}/differ/a").delete("manifest.json")
    assert push(source, str(target)).blocks_moved == 2
    assert push(source, f"{bucket}/differ/a").blocks_moved == 1
    assert differences(files_of(target), files_of(source)) == []
    other = write_cache(tmp_path / "other", labels=(0, 1, 2), layers=(2, 3)).path
    for place in (str(target), f"{bucket}/differ/a"):
        with pytest.raises(UsageError, match=r"holds another cache .*layers"):
            push(other, place)
    with pytest.raises(UsageError, match="same directory"):
        push(source, str(source))
    with pytest.raises(UsageError, match="cannot be written to"):
        push(source, "https://lab.example.org/a")


def test_an_unfinished_cache_can_be_shared_and_completed(caches: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(caches / "a", tmp_path / "half"))
    for name in ("manifest.json", "done/000001.json"):
        (half / name).unlink()
    result = push(half, str(tmp_path / "b"))
    assert (result.blocks, result.cache_digest) == (11, None)
    assert FeatureCache(tmp_path / "b").num_blocks_done == 11
    assert push(caches / "a", str(tmp_path / "b")).blocks_moved == 1
    assert differences(files_of(tmp_path / "b"), files_of(caches / "a")) == []


def test_a_part_or_another_codec_is_what_extraction_would_have_written(motions: Path, tmp_path: Path) -> None:
    clips, tower = load_clips(motions), small_tower(motions)
    whole = small_spec(clips, tower, layers=(1, 2, 3))
    extract_small(clips, tmp_path / "whole", spec=whole)
    for name, layers, codec in (("part", (2, 3), None), ("raw", None, "raw"), ("both", (3,), "archive")):
        spec = small_spec(clips, tower, layers=layers or (1, 2, 3), codec=codec or "default")
        extract_small(clips, tmp_path / f"{name}-extracted", spec=spec)
        result = pull(str(tmp_path / "whole"), str(tmp_path / name), layers=layers, codec=codec)
        assert differences(files_of(tmp_path / name), files_of(tmp_path / f"{name}-extracted")) == []
        assert FeatureCache(tmp_path / name).spec.feature_id == whole.feature_id
        assert [clip for clip, _ in FeatureCache(tmp_path / name).failures] == [BROKEN]
        assert result.blocks_moved == 3
        again = pull(str(tmp_path / "whole"), str(tmp_path / name), layers=layers, codec=codec)
        assert again.blocks_moved == 0
    assert push(tmp_path / "whole", str(tmp_path / "pushed"), layers=(2, 3)).blocks_moved == 3
    assert differences(files_of(tmp_path / "pushed"), files_of(tmp_path / "part")) == []
    with pytest.raises(UsageError, match="a part is made in a directory"):
        push(tmp_path / "whole", "s3://lab/part", layers=(2, 3))
    with pytest.raises(UsageError, match=r"\[9\] are not stored"):
        pull(str(tmp_path / "whole"), str(tmp_path / "x"), layers=(2, 9))


def test_a_part_comes_from_a_bucket_too_and_goes_on_where_it_was(
    caches: Path, tmp_path: Path, bucket: str, commands: Commands, s3: dict[str, str]
) -> None:
    push(caches / "a", f"{bucket}/part/a")
    pull_once = ("pull", f"{bucket}/part/a", tmp_path / "p", "--layers", "3-4")
    commands.kill_stopped(commands.start(*pull_once, stops_with="p/done/000002.json", **s3))
    done = commands.run("pull", f"{bucket}/part/a", tmp_path / "p", "--layers", "3-4", "--json", **s3).json
    assert done["blocks"] == 12 and 0 < done["blocks_moved"] < 10
    pull(str(caches / "a"), str(tmp_path / "q"), layers=(3, 4))
    assert differences(files_of(tmp_path / "p"), files_of(tmp_path / "q")) == []


def test_a_cache_that_recomputes_maps_is_shared_whole_and_in_part(motions: Path, tmp_path: Path) -> None:
    clips, tower = load_clips(motions), small_tower(motions)
    for name, layers in (("whole", (2, 3)), ("part-extracted", (3,))):
        extract_small(clips, tmp_path / name, spec=small_spec(clips, tower, layers=layers, maps="recompute"))
    pull(str(tmp_path / "whole"), str(tmp_path / "copy"))
    pull(str(tmp_path / "whole"), str(tmp_path / "part"), layers=(3,))
    for one, other in (("copy", "whole"), ("part", "part-extracted")):
        assert differences(files_of(tmp_path / one), files_of(tmp_path / other)) == []


@pytest.mark.parametrize(
    "where", ["tokens/c.3.0.0.0.0", "done/000003.json", "clips.jsonl", "class_tokens/c.0.0.0.0"]
)
def test_a_damaged_source_is_refused_and_leaves_nothing_half_visible(
    caches: Path, tmp_path: Path, bucket: str, where: str
) -> None:
    source = Path(shutil.copytree(caches / "a", tmp_path / "a"))
    content = bytearray((source / where).read_bytes())
    content[len(content) // 2] ^= 1
    (source / where).write_bytes(content)
    for target in (str(tmp_path / "b"), f"{bucket}/damaged/{where.replace('/', '-')}"):
        with pytest.raises(CacheError, match=r"verify it there|repair the cache"):
            push(source, target)
    assert not (tmp_path / "b" / "manifest.json").exists()
    if (tmp_path / "b" / "zarr.json").exists():
        half = FeatureCache(tmp_path / "b")
        assert not half.is_complete and not verify_cache(tmp_path / "b").problems
        half.read([s for s in range(len(half)) if half.is_valid[s]])


def test_a_source_that_changes_meanwhile_is_told(
    caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(caches / "a", tmp_path / "a"))
    real = transfer_module.read_source_mark

    def changing(opened, block):  # type: ignore[no-untyped-def]
        if block == 6:
            (source / "done" / "000006.json").unlink()
        return real(opened, block)

    monkeypatch.setattr(transfer_module, "read_source_mark", changing)
    with pytest.raises(CacheError, match="the source changed; run the same command again"):
        push(source, str(tmp_path / "b"), threads=1)
    assert not (tmp_path / "b" / "manifest.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_one_line(caches: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir(mode=0o555)
    with pytest.raises(CacheError, match="check the permissions"):
        push(caches / "a", str(tmp_path / "b" / "a"))


def test_a_file_in_the_way_and_a_full_disk_are_one_line_each(
    caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot create .*file"):
        push(caches / "a", str(tmp_path / "file" / "a"))
    real = os.writev

    def full(descriptor: int, data: list[bytes]) -> int:
        if "/tokens/.tmp-b000004." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(CacheError, match="No space left on device; free space"):
        push(caches / "a", str(tmp_path / "b"), threads=1)
    monkeypatch.undo()
    found = FeatureCache(tmp_path / "b")
    assert found.num_blocks_done < 12 and not list(tmp_path.glob("b/**/.tmp-*"))
    assert not (tmp_path / "b/done/000004.json").exists() and not verify_cache(tmp_path / "b").problems
    assert push(caches / "a", str(tmp_path / "b")).blocks_moved == 12 - found.num_blocks_done


def test_errors_of_a_bucket_are_one_line_without_keys(
    caches: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience_of_attempts(monkeypatch)
    with pytest.raises(CacheError, match="no such bucket") as raised:
        push(caches / "a", "s3://no-such-bucket/a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CacheError, match="nothing listens there") as other:
        FeatureCache("s3://lab/a")
    told = f"{raised.value} {other.value}"
    assert "\n" not in told and not any(KEYS[name] in told for name in KEYS if "KEY" in name)


def test_keys_come_from_the_profile_where_the_environment_has_none(
    caches: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(caches / "v", f"{bucket}/profile/v")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {KEYS['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = x%y\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert FeatureCache(f"{bucket}/profile/v").is_complete


def test_files_are_readable_by_the_group_unless_a_mode_is_given(
    caches: Path, tmp_path: Path, commands: Commands
) -> None:
    before = os.umask(0o077)
    try:
        push(caches / "v", str(tmp_path / "shared"))
        set_file_mode(0o600)
        push(caches / "v", str(tmp_path / "private"))
    finally:
        set_file_mode(None)
        os.umask(before)
    for name, file_mode, directory_mode in (("shared", 0o640, 0o750), ("private", 0o600, 0o700)):
        cache = tmp_path / name
        assert {stat.S_IMODE(p.stat().st_mode) for p in cache.rglob("*") if p.is_file()} == {file_mode}
        directories = [cache, *(p for p in cache.rglob("*") if p.is_dir())]
        assert {stat.S_IMODE(p.stat().st_mode) for p in directories} == {directory_mode}
    wrong: Ended = commands.run("push", caches / "v", tmp_path / "x", "--mode", "9")
    assert wrong.status == 2 and "expected octal permissions" in wrong.stderr
    assert commands.run("push", caches / "v", tmp_path / "y", "--mode", "664").status == 0
    assert stat.S_IMODE((tmp_path / "y" / "zarr.json").stat().st_mode) == 0o664
