"""Makes caches and runs of a stranger who means harm: every digest is right, what is said is not."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import torch

from evl_cache.canonical_json import canonical_json
from evl_cache.store.disk.checksum import crc32c

JSON = dict[str, Any]
DEEP = b"[" * 200_000
HUGE = 10**12
Attack = Callable[["Forge"], None]


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


class Forge:
    """A copy of a good cache that is changed and signed again. `outside`: what an attack must not reach.

    Args:
        has_index: keep the good cache's index, by which readers go as long as its manifest lies there.
    """

    def __init__(self, good: Path, folder: Path, *, has_index: bool = False) -> None:
        self.outside = folder / "outside"
        self.outside.mkdir()
        (self.outside / "secret").write_text("secret\n")
        self.marker = self.outside / "code-ran"
        self.cache = Path(shutil.copytree(good, folder / "cache"))
        if not has_index:  # with it, readers need no marks
            (self.cache / "index.bin").unlink(missing_ok=True)

    def group(self, change: Callable[[JSON], None]) -> None:
        """Change the attribute `evl_cache` and everything that follows from it."""
        document = json.loads((self.cache / "zarr.json").read_bytes())
        own = document["attributes"]["evl_cache"]
        change(own)
        own["spec"]["feature_id"] = _feature_id(own["spec"])
        own.pop("digest")
        own["digest"] = _digest(own)
        self.write("zarr.json", json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        spec = own["spec"]
        same = {name: spec.get(name) for name in ("feature_id", "content_id", "layers")}
        for path in (self.cache / "done").iterdir():
            self.mark(int(path.stem), lambda mark: mark.update(same))

    def spec(self, name: str, value: Any) -> None:
        """Change a field `a` or `a.b` of the spec."""

        def change(own: JSON) -> None:
            *parents, last = name.split(".")
            place = own["spec"]
            for parent in parents:
                place = place[parent]
            place[last] = value

        self.group(change)

    def clips(self, content: bytes) -> None:
        self.write("clips.jsonl", content)
        self.group(lambda own: own.update(clips_sha256=hashlib.sha256(content).hexdigest()))

    def clip(self, **fields: Any) -> None:
        """Change the first clip."""
        first, *rest = (self.cache / "clips.jsonl").read_bytes().splitlines(keepends=True)
        self.clips(canonical_json(json.loads(first) | fields) + b"".join(rest))

    def mark(self, block: int, change: Callable[[JSON], None]) -> None:
        path = self.cache / "done" / f"{block:06d}.json"
        mark = json.loads(path.read_bytes())
        change(mark)
        mark.pop("digest")
        mark["digest"] = _digest(mark)
        path.write_bytes(json.dumps(mark, sort_keys=True, separators=(",", ":")).encode() + b"\n")

    def shard(self, name: str, block: int, change: Callable[[bytes], bytes]) -> None:
        """Change a shard's bytes; its mark gets their size and digest."""
        (path,) = (self.cache / name).glob(f"c.{block}.*")
        content = change(path.read_bytes())
        path.write_bytes(content)

        def sign(mark: JSON) -> None:
            mark["files"][name] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

        self.mark(block, sign)

    def first_chunk(self, name: str, block: int, stored: bytes) -> None:
        """Other bytes for the first chunk of a shard, with index, checksums and digests that fit."""
        mark = json.loads((self.cache / "done" / f"{block:06d}.json").read_bytes())
        record = mark["files"][name]
        sizes = np.frombuffer(bytes.fromhex(record["chunk_nbytes"]), "<u4").copy()
        sums = np.frombuffer(bytes.fromhex(record["chunk_checksums"]), "<u4").copy()
        before = int(sizes[0])
        sizes[0], sums[0] = len(stored), crc32c(stored)

        def change(content: bytes) -> bytes:
            data = stored + content[before : before + int(sizes[1:].sum())]
            starts = np.concatenate([[0], np.cumsum(sizes.astype(np.int64))[:-1]])
            return data + _index(starts, sizes)

        self.shard(name, block, change)

        def sign(mark: JSON) -> None:
            mark["files"][name] |= {
                "chunk_nbytes": sizes.tobytes().hex(),
                "chunk_checksums": sums.tobytes().hex(),
            }

        self.mark(block, sign)

    def record(self, name: str, **fields: Any) -> None:
        """Change what the first mark says of a shard."""
        self.mark(0, lambda mark: mark["files"][name].update(fields))

    def write(self, name: str, content: bytes) -> None:
        (self.cache / name).write_bytes(content)

    def link(self, name: str, to: Path) -> None:
        """Put a link in the place of a file or directory."""
        path = self.cache / name
        if path.is_dir():
            shutil.copytree(path, to, dirs_exist_ok=True)
            shutil.rmtree(path)
        else:
            if to.parent == self.outside:
                shutil.copy(path, to)
            path.unlink()
        path.symlink_to(to)

    def pipe(self, name: str) -> None:
        """Put a pipe in the place of a file: who opens it waits for ever."""
        (self.cache / name).unlink()
        os.mkfifo(self.cache / name)

    def large(self, name: str) -> None:
        """A file of 3 GB that takes no disk."""
        with (self.cache / name).open("r+b") as file:
            file.truncate(3 << 30)


def _digest(content: Any) -> str:
    """As `canonical_json.digest`, but of NaN too, which that refuses to write."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _feature_id(spec: JSON) -> str:
    tower = spec.get("tower")
    if isinstance(tower, dict):
        tower = {k: v for k, v in tower.items() if k not in ("model", "pretrained")}
    names = ("views", "preprocessing", "tokens", "maps", "compute_dtype")
    rule = {} if spec.get("frame_rule", 1) == 1 else {"frame_rule": spec["frame_rule"]}
    return _digest({"tower": tower, **{name: spec.get(name) for name in names}, **rule})


def _index(starts: np.ndarray, sizes: np.ndarray) -> bytes:
    index = np.stack([starts.astype("<u8"), sizes.astype("<u8")], axis=1)
    index[sizes == 0] = 2**64 - 1
    written = index.tobytes()
    return written + crc32c(written).to_bytes(4, "little")


def _outside_index(content: bytes, forge: Forge) -> bytes:
    chunks = 5 * 3
    data = content[: -(16 * chunks + 4)]
    return data + _index(np.full(chunks, 2**40), np.full(chunks, 100))


def zstd_frame(content: bytes, *, claims: int | None = None) -> bytes:
    """A zstd frame with checksum; `claims` a content size in its header instead of its own."""
    frame = bytearray(numcodecs.zstd.Zstd(level=1, checksum=True).encode(content))
    if claims is not None:
        # Frame header with an eight-byte content size and no dictionary (RFC 8878, 3.1.1.1).
        frame = bytearray(frame[:4] + bytes([0xE4]) + struct.pack("<Q", claims) + frame[9:])
    return bytes(frame)


def _large_chunks(forge: Forge) -> None:
    """Chunks of 200 MB, of a file of some kilobytes."""
    forge.spec("tower.width", 2_000_000 // 100)
    forge.spec("tower.image_size", 8 * 58)


CACHES: dict[str, Attack] = {
    **{
        f"spec {name} {value!r:.30}": (lambda forge, name=name, value=value: forge.spec(name, value))
        for name, value in (
            ("num_clips", HUGE), ("num_clips", 10**8), ("num_clips", -1), ("num_clips", "13"), ("num_clips", 13.0),
            ("num_clips", True),
            ("block_clips", 0), ("block_clips", HUGE), ("views.frames", 10**9), ("views.frames", 0),
            ("tower.width", 10**9), ("tower.patch_size", 0), ("tower.image_size", 10**7), ("tower.image_size", 16000),
            ("views.temporal_views", 10**6), ("views.spatial_views", 2), ("views.train_views", HUGE),
            ("layers", []), ("layers", [-1, 0, 1]), ("layers", [4, 3, 2]), ("layers", [2, 2, 3]),
            ("layers", list(range(1, 100_000))), ("layers", "2-4"), ("codec", "blosc"), ("codec", "../../codec"),
            ("tokens", "pickle"), ("maps", 7), ("compute_dtype", "object"), ("dataset", "../../etc"),
            ("split", "/etc"), ("dataset", "a\nb"), ("split", "\x1b]0;owned\x07"), ("classes", 5),
            ("classes", [{}, {}, {}]), ("classes", []), ("tower.mean", [float("nan")] * 3), ("tower.std", ["x"] * 3),
            ("tower", [1, 2]), ("views", None), ("preprocessing", {"a": 1}), ("tower.heads", 0),
            ("tower.model", ["x"] * 10), ("content_id", 5), ("frame_rule", 0),
            ("frame_rule", HUGE), ("frame_rule", "2"),
            ("chunk_keys", "folders"), ("chunk_keys", "../c"), ("chunk_keys", 1), ("chunk_keys", ["flat"]),
            ("chunk_keys", "x" * 10**5),
        )
    },
    "format version of the other chunk keys": lambda forge: forge.group(lambda own: own.update(format_version=1)),
    "format version of text": lambda forge: forge.group(lambda own: own.update(format_version="../1")),
    "spec a list": lambda forge: forge.write("zarr.json", b'{"attributes":{"evl_cache":[]}}'),
    "deep zarr.json": lambda forge: forge.write("zarr.json", DEEP),
    "huge zarr.json": lambda forge: forge.large("zarr.json"),
    "zarr.json a link": lambda forge: forge.link("zarr.json", forge.outside / "zarr.json"),
    "zarr.json a device": lambda forge: forge.link("zarr.json", Path("/dev/zero")),
    "zarr.json a pipe": lambda forge: forge.pipe("zarr.json"),
    "deep clips": lambda forge: forge.clips(DEEP),
    "pickled clips": lambda forge: forge.clips(pickle.dumps(Code(forge.marker))),
    "clips that are lists": lambda forge: forge.clips(b"[]\n" * 13),
    "too few clips": lambda forge: forge.clips(
        b"".join((forge.cache / "clips.jsonl").read_bytes().splitlines(keepends=True)[:5])
    ),
    "huge label": lambda forge: forge.clip(label=10**30),
    "label of no class": lambda forge: forge.clip(label=99),
    "negative label": lambda forge: forge.clip(label=-1),
    "clips a link": lambda forge: forge.link("clips.jsonl", forge.outside / "clips.jsonl"),
    "huge clips": lambda forge: forge.large("clips.jsonl"),
    "clips a pipe": lambda forge: forge.pipe("clips.jsonl"),
    "deep mark": lambda forge: forge.write("done/000000.json", DEEP),
    "huge mark": lambda forge: forge.large("done/000000.json"),
    "mark a link": lambda forge: forge.link("done/000000.json", forge.outside / "mark"),
    "mark a pipe": lambda forge: forge.pipe("done/000000.json"),
    "marks elsewhere": lambda forge: forge.link("done", forge.outside / "done"),
    "mark of another block": lambda forge: forge.write(
        "done/000000.json", (forge.cache / "done/000001.json").read_bytes()
    ),
    "mark with a batch of text": lambda forge: forge.mark(0, lambda mark: mark["environment"].update(batch="x")),
    "mark with a huge batch": lambda forge: forge.mark(0, lambda mark: mark["environment"].update(batch=HUGE)),
    "mark without environment": lambda forge: forge.mark(0, lambda mark: mark.update(environment=[])),
    "mark with a frame size of text": lambda forge: forge.mark(
        0, lambda mark: mark["clips"][0].update(frame_size="ab", decoder="x")
    ),
    "mark with an error that is no text": lambda forge: forge.mark(0, lambda mark: mark["clips"][0].update(error={})),
    "mark with unknown fields of a clip": lambda forge: forge.mark(0, lambda mark: mark["clips"][0].update(x=1)),
    "mark with rules of frames that are none": lambda forge: forge.mark(
        0, lambda mark: mark.update(frame_rules=["2"] * 5)
    ),
    "mark of files that are a list": lambda forge: forge.mark(0, lambda mark: mark.update(files=[])),
    "chunks of 4 GB in the mark": lambda forge: forge.record("tokens", chunk_nbytes="ff" * 4 * 15),
    "chunk sizes that are no numbers": lambda forge: forge.record("tokens", chunk_nbytes="zz" * 4 * 15),
    "checksums for fewer chunks": lambda forge: forge.record("tokens", chunk_checksums=""),
    "a size of text": lambda forge: forge.record("tokens", size="x"),
    "chunks that explode": _large_chunks,
    "frame that claims 10 GB": lambda forge: forge.first_chunk(
        "tokens", 0, zstd_frame(bytes(240), claims=10 << 30)
    ),
    "frame that becomes 200 MB": lambda forge: forge.first_chunk("tokens", 0, zstd_frame(bytes(200 << 20))),
    "frame that is a pickle": lambda forge: forge.first_chunk("tokens", 0, pickle.dumps(Code(forge.marker))),
    "index outside the file": lambda forge: forge.shard("tokens", 0, lambda c: _outside_index(c, forge)),
    "shard cut off": lambda forge: forge.shard("maps", 0, lambda content: content[:100]),
    "shard a link": lambda forge: forge.link("tokens/c.0.0.0.0.0", forge.outside / "shard"),
    "shard a pipe": lambda forge: forge.pipe("tokens/c.0.0.0.0.0"),
    "shard a device": lambda forge: forge.link("maps/c.0.0.0.0.0.0", Path("/dev/zero")),
    "array elsewhere": lambda forge: forge.link("tokens", forge.outside / "tokens"),
    "shards elsewhere": lambda forge: forge.link("token_scale", forge.outside / "scales"),
    "deep manifest": lambda forge: forge.write("manifest.json", DEEP),
    "manifest a link": lambda forge: forge.link("manifest.json", forge.outside / "manifest"),
    "huge manifest": lambda forge: forge.large("manifest.json"),
    "manifest with sizes of text": lambda forge: forge.write(
        "manifest.json", canonical_json(_signed({"files": {"zarr.json": {"size": "x", "sha256": 1}}}, forge))
    ),
}  # fmt: skip


def _signed(content: JSON, forge: Forge) -> JSON:
    spec = json.loads((forge.cache / "zarr.json").read_bytes())["attributes"]["evl_cache"]["spec"]
    content |= {"version": 1, "feature_id": spec["feature_id"], "content_id": spec["content_id"]}
    return {**content, "digest": _digest(content)}


class RunForge:
    """A copy of a good run that is changed."""

    def __init__(self, good: Path, folder: Path) -> None:
        self.outside = folder / "outside"
        self.outside.mkdir()
        self.marker = self.outside / "code-ran"
        self.run = Path(shutil.copytree(good, folder / "run"))

    def config(self, name: str, value: Any) -> None:
        content = json.loads((self.run / "config.json").read_text())
        *parents, last = name.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
        (self.run / "config.json").write_text(json.dumps(content))

    def write(self, name: str, content: bytes) -> None:
        (self.run / name).write_bytes(content)

    def pickled(self, name: str) -> None:
        torch.save({"model": Code(self.marker)}, self.run / name)

    def pipe(self, name: str) -> None:
        (self.run / name).unlink()
        os.mkfifo(self.run / name)

    def header(self, header: JSON) -> None:
        """A safetensors file of this header and no data."""
        text = json.dumps(header).encode()
        self.write("head.safetensors", struct.pack("<Q", len(text)) + text)

    def bomb(self, name: str) -> None:
        """An archive of torch's kind that unpacks to more than a gigabyte."""
        torch.save({"model": {"x": torch.zeros(4)}}, self.run / "plain")
        with (
            zipfile.ZipFile(self.run / "plain") as plain,
            zipfile.ZipFile(self.run / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out,
        ):
            for entry in plain.infolist():
                with out.open(entry.filename, "w", force_zip64=True) as file:
                    if entry.filename.endswith("data/0"):
                        for _ in range(22):  # 1.1 GB
                            file.write(bytes(50 << 20))
                    else:
                        file.write(plain.read(entry))

    def official(self, **tensors: torch.Tensor) -> None:
        """A checkpoint of the official code with these tensors in the place of good ones."""
        good = {
            "decoder.cls_token": torch.zeros(16),
            "decoder.decoder_layers.0.attn.q_proj.weight": torch.zeros(16, 16),
            "decoder.decoder_layers.0.mlp.fc1.weight": torch.zeros(64, 16),
            "decoder.temporal_pos_embed.0": torch.zeros(3, 16),
            "decoder.cross_attention.0.w1": torch.zeros(9, 16),
            "proj.2.weight": torch.zeros(3, 16),
        }
        torch.save(
            {"model": good | {k.replace("__", "."): v for k, v in tensors.items()}}, self.run / "official.pth"
        )


RunAttack = Callable[[RunForge], None]
RUNS: dict[str, RunAttack] = {
    **{
        f"config {name} {value!r:.30}": (lambda forge, name=name, value=value: forge.config(name, value))
        for name, value in (
            ("head_config.width", HUGE), ("head_config.num_classes", 10**9), ("head_config.num_frames", 10**9),
            ("head_config.grid", [10**6, 10**6]), ("head_config.grid", ["a"]), ("head_config.grid", 5),
            ("head_config.width", 60_000), ("head_config.dropout", "x"), ("head_config.mlp_width", HUGE),
            ("head", "decoder999999999"), ("head", "os.system"), ("head", ["decoder2"]), ("layers", 7),
            ("classes", 5), ("head_config", [1]), ("features", [1]), ("features.num_clips", HUGE),
            ("format", "../1"), ("unknown", 1),
        )
    },
    "deep config": lambda forge: forge.write("config.json", b'{"a":' * 100_000),
    "config a pipe": lambda forge: forge.pipe("config.json"),
    "config a list": lambda forge: forge.write("config.json", b"[]"),
    "pickled head": lambda forge: forge.pickled("head.safetensors"),
    "head a pipe": lambda forge: forge.pipe("head.safetensors"),
    "head of huge shapes": lambda forge: forge.header(
        {"class_query": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 0]}}
    ),
    "head of offsets beyond the file": lambda forge: forge.header(
        {"class_query": {"dtype": "F32", "shape": [2], "data_offsets": [HUGE, HUGE + 8]}}
    ),
    "head with a header of 2^60 bytes": lambda forge: forge.write("head.safetensors", struct.pack("<Q", 1 << 60)),
    "head of other tensors": lambda forge: forge.header({"__metadata__": {"a": "b"}}),
}  # fmt: skip
STATES: dict[str, RunAttack] = {
    "pickled state": lambda forge: forge.pickled("last.pt"),
    "state that unpacks to a gigabyte": lambda forge: forge.bomb("last.pt"),
    "state of noise": lambda forge: forge.write("last.pt", b"noise"),
}
CHECKPOINTS: dict[str, RunAttack] = {
    "pickled checkpoint": lambda forge: forge.pickled("official.pth"),
    "checkpoint that unpacks to a gigabyte": lambda forge: forge.bomb("official.pth"),
    "expanded tensor": lambda forge: forge.official(
        proj__2__weight=torch.zeros(1).as_strided((10**6, 10**6), (0, 0))
    ),
    "tensor of no values and many rows": lambda forge: forge.official(
        decoder__temporal_pos_embed__0=torch.zeros(10**9, 0)
    ),
    "classes of no values": lambda forge: forge.official(proj__2__weight=torch.zeros(900_000, 0)),
    "sparse tensor": lambda forge: forge.official(
        proj__2__weight=torch.sparse_coo_tensor(
            torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), (10**6, 10**6), check_invariants=True
        )
    ),
    "layers with a gap": lambda forge: forge.official(
        **{f"decoder__decoder_layers__{10**9}__mlp__fc1__weight": torch.zeros(1)}
    ),
}
