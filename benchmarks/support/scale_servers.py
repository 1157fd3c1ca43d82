"""Opening a large cache behind a web server and in an S3 bucket, with the requests counted."""

import os
import shutil
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.support.stepped_processes import run_together
from evl_cache.store.format.layout import DONE_NAME
from tests.support.servers import KEYS, faulty_server, nginx, s3_server

_MODULE = "benchmarks.support.scale_parts"
_MOST_IN_S3 = 5_000  # files: each is put into moto by a request, and stays in its memory


def opened_behind_url(path: Path) -> dict[str, Any]:
    """Open a cache behind nginx, or Python's server where nginx is not installed.

    Returns: requests, seconds and processor seconds.
    """
    with TemporaryDirectory(prefix="evl-cache-scale-") as folder:
        root = Path(folder)
        if shutil.which("nginx") or Path("/usr/sbin/nginx").is_file():
            with nginx(root / "nginx") as server:
                (server.www / "cache").symlink_to(path.resolve())
                opened = _opened(f"{server.url}/cache", root / "copy")
                requests = sum(" /cache" in line for line in server.requests())
        else:
            with faulty_server(path) as slow:
                opened = _opened(slow.url, root / "copy")
                requests = len(slow.served)
    return _told("open_url", requests, opened)


def opened_in_s3(path: Path) -> dict[str, Any]:
    """Open a cache in moto's S3, where moto is installed. What is put there: all that opening may need, and no shards."""
    try:
        import moto  # noqa: F401
    except ImportError:
        return {}
    names = [entry.name for entry in os.scandir(path) if entry.is_file()]
    names += [
        f"{entry.name}/zarr.json" for entry in os.scandir(path) if (path / entry.name / "zarr.json").is_file()
    ]
    if "index.bin" not in names:
        names += [f"{DONE_NAME}/{entry.name}" for entry in os.scandir(path / DONE_NAME)]
    if len(names) > _MOST_IN_S3:
        return {}
    with TemporaryDirectory(prefix="evl-cache-scale-") as folder:
        log = Path(folder) / "log"
        with s3_server(log) as url:
            for name in names:
                _put(f"{url}/lab/cache/{name}", path / name)
            before = log.read_bytes().count(b" /lab/cache")
            keys = {**KEYS, "AWS_ENDPOINT_URL": url}
            opened = _opened("s3://lab/cache", Path(folder) / "copy", **keys)
            requests = log.read_bytes().count(b" /lab/cache") - before
    return _told("open_s3", requests, opened)


def _put(url: str, path: Path) -> None:
    with path.open("rb") as content:
        headers = {"Content-Length": str(path.stat().st_size), "Content-Type": "application/octet-stream"}
        request = urllib.request.Request(url, data=content, method="PUT", headers=headers)
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200


def _opened(url: str, copies: Path, **env: str) -> dict[str, Any]:
    env = {"EVL_CACHE_COPY_ROOT": str(copies), **env}
    (opened,) = run_together(_MODULE, "opened_url", [{"url": url}], env=env)
    return opened


def _told(name: str, requests: int, opened: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{name}_requests": requests,
        f"{name}_s": opened["seconds"],
        f"{name}_cpu_s": opened["cpu_s"],
        f"{name}_mb": opened["mb"],
    }
