"""User and password of an address are nowhere afterwards: not on the screen, in no file, by whatever command."""

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from evl_cache.caches.card import cache_card
from evl_cache.caches.pairing import find_training_caches
from evl_cache.caches.places import FoundCache
from evl_cache.errors import UsageError
from evl_cache.notation import without_logins
from evl_cache.store import FeatureCache, public_text
from evl_cache.train.needs import HeadNeeds
from evl_cache_cli.main import main
from tests.support.feature_caches import write_cache
from tests.support.patience import patience_of_attempts
from tests.support.servers import PASSWORD, USER, Nginx, nginx

SECRET = "wJalr/K7MDENG+bPxRfiCY"  # as Amazon's keys are: with a slash
FORMS = {
    PASSWORD,
    base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode(),
    SECRET,
    SECRET.partition("/")[2],
    quote(SECRET, safe=""),
}
TRAIN = ("--head", "linear", "--steps", "2", "--batch", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with nginx(tmp_path_factory.mktemp("nginx")) as server:
        write_cache(server.www / "a", layers=(2, 3), failed=(1,))
        write_cache(server.www / "v", layers=(2, 3), split="val", prefix="v")
        yield server


@pytest.fixture
def home(web: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("AWS_", "EVL_CACHE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SSL_CERT_FILE", str(web.certificate))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    patience_of_attempts(monkeypatch)
    monkeypatch.setenv("EVL_CACHE_DEBUG", "")  # and what --debug leaves there goes again
    monkeypatch.chdir(tmp_path)
    shutil.copytree(web.www / "a", "mine")
    return tmp_path


def with_login(web: Nginx, user: str = USER, password: str = PASSWORD) -> str:
    return web.tls_url.replace("https://", f"https://{user}:{password}@")


def run(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[object, str]:
    """Exit status, and all that was printed, by whatever wrote it."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code, "".join(capfd.readouterr())


def check_silent(home: Path, told: str, words: tuple[str, ...]) -> None:
    assert not [form for form in FORMS if form in told], (words, told)
    for path in home.rglob("*"):
        assert not [form for form in FORMS if form in str(path.relative_to(home))], (words, path)
        if path.is_file():
            content = path.read_bytes()
            assert not [form for form in FORMS if form.encode() in content], (words, path)


def test_what_commands_print_and_write_of_an_address_with_a_password(
    web: Nginx, home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = with_login(web)
    caches = ("--cache", f"{url}/a", "--val-cache", f"{url}/v")
    monkeypatch.setenv("EVL_CACHE_ROOT", f"new:{url}/a:{url}/v:{url}/none")
    for status, words in (
        (1, ("ls",)),
        (0, ("ls", f"{url}/a", "--json")),
        (1, ("ls", url)),  # it does not list
        (0, ("info", f"{url}/a")),
        (0, ("info", f"{url}/a", "--json")),
        (0, ("info", f"{url}/a", "--failures")),
        (0, ("card", f"{url}/a", "--print")),
        (0, ("card", f"{url}/a", "--print", "--address", f"{url}/a")),
        (0, ("card", "mine", "--address", f"{url}/a")),
        (0, ("card", "mine", "--replace", f"--address={url}/a?X-Amz-Signature={SECRET}")),
        (0, ("card", "mine", "--replace", "--address", f"s3://key:{quote(SECRET, safe='')}@lab/a")),
        (0, ("train", "--dataset", "test", *TRAIN)),
        (0, ("pull", f"{url}/a")),
        (0, ("pull", f"{url}/a", "part", "--layers", "3", "--json")),
        (2, ("push", "mine", f"{url}/x")),
        (None, ("push", f"{url}/a", "pushed/")),
        (None, ("push", url, "pushed/")),
        (2, ("train", "--cache", f"{url}/a", *TRAIN)),
        (0, ("train", *caches, "--out", "run", *TRAIN)),
        (0, ("train", f"--cache={url}/a", f"--val-cache={url}/v", "--out", "run", *TRAIN, "--resume")),
        (2, ("train", "--dataset", "other", *TRAIN)),
        (0, ("sweep", *caches, "--head", "linear", "--out", "sweep", "--steps", "2", "--device", "cpu")),
        (0, ("eval", "--run", "run", "--cache", f"{url}/v", "--device", "cpu", "--json")),
        (0, ("report", "run", "sweep", "--out", "report.html")),
        (0, ("show", "c0", "--cache", f"{url}/a", "--run", "run", "--out", "clip.png")),
        (None, ("verify", f"{url}/a")),
        (None, ("repair", f"{url}/a")),
        (None, ("index", f"{url}/a")),
        (2, ("extract", "--dataset", "list", "--list", "none", "--layers", "2", "--cache", f"{url}/a")),
        (2, ("predict", f"{url}/clip.mp4", "--run", f"{url}/run")),
    ):  # fmt: skip
        found, told = run(capfd, *words)
        assert status in (None, found), (words, found, told)
        check_silent(home, told, words)
    assert web.tls_url.encode() in (home / "run" / "config.json").read_bytes(), "the address itself is kept"


@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_what_commands_say_of_an_address_that_is_refused(
    web: Nginx,
    home: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    debug: tuple[str, ...],
) -> None:
    urls = (
        with_login(web, password=PASSWORD + "x") + "/a",
        with_login(web).replace("https", "http") + "/a",  # it speaks TLS
        with_login(web).rpartition(":")[0] + ":1/a",  # nobody listens
        with_login(web) + ":x/a",
        with_login(web) + "/a?b",
        f"http://{USER}:{PASSWORD}@[::1/a",
        f"ftp://{USER}:{PASSWORD}@localhost/a",
        f"s3://key:{quote(SECRET, safe='')}@lab/a",
        f"s3://key:{SECRET}@lab/a",
    )
    for url in urls:
        monkeypatch.setenv("EVL_CACHE_ROOT", url)
        for words in (
            ("ls",),
            ("ls", url),
            ("info", url),
            ("pull", url, "pulled"),
            ("push", "mine", url),
            ("card", url, "--print"),
            ("train", "--cache", url, "--val-cache", url, *TRAIN),
            ("train", "--dataset", "test", *TRAIN),
            ("verify", url),
        ):  # fmt: skip
            status, told = run(capfd, *words, *debug)
            assert status in (1, 2), (words, told)
            check_silent(home, told, words)
            lines = [line for line in told.splitlines() if not line.startswith("waiting")]
            assert debug or len(lines) == 1 or all(line.startswith("not seen: ") for line in lines), told


def test_every_address_in_a_word_of_a_command_loses_its_login() -> None:
    word = "--caches=http://u:p1@h/a,https://u:p2@h:1/b?k=p3 s3://u:p4@lab/c:http://[::1]/x"
    assert not [secret for secret in ("p1", "p2", "p3", "p4", "u:") if secret in public_text(word)]
    assert public_text("--cache=http://u:p1@h/a").endswith("--cache=http://h/a")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("error: https:/lab:p@host:1/a: no", "error: https:/host:1/a: no"),
        ("a http://u:p@h and s3://k:a/b/c@lab/x, ftp://u@h", "a http://h and s3://lab/x, ftp://h"),
        ("https://h/caches@v1 https://h:8443/caches@v1/x", "https://h/caches@v1 https://h:8443/caches@v1/x"),
        ("http://h u:p@x /data:/a@b", "http://h u:p@x /data:/a@b"),
    ],
)
def test_a_line_on_the_screen_has_no_login_in_an_address(text: str, shown: str) -> None:
    assert without_logins(text) == shown


def test_names_and_messages_in_python_have_no_login(home: Path) -> None:
    spec = FeatureCache("mine").spec
    assert FoundCache(address="https://lab:pw@example.org/", spec=spec).name == "example.org"
    with pytest.raises(UsageError, match=r"^--cache https://example\.org/a without --val-cache"):
        find_training_caches(
            None, "https://lab:pw@example.org/a", None, needs=HeadNeeds(()), same_cache_for_val=False
        )


def test_the_card_names_the_address_without_its_login(home: Path) -> None:
    text = cache_card(FeatureCache("mine"), address="https://lab:pw@example.org:8443/caches/a/")
    assert "evl-cache pull https://example.org:8443/caches/a\n" in text
    assert 'FeatureCache("https://example.org:8443/caches/a")' in text
