"""Every file of the corpus, by every decoder and view: the frames that a decode from the start shows, or a true reason."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from evl_cache.video import DecodeOptions, collect, decode_clip
from evl_cache.video.pool import DecodePool
from evl_cache.video.which_decord import has_decord
from tests.support.decoding_survey import RIGHT, VIEWS, Linear, is_served, linear_decodes
from tests.support.video_corpus import NumberedFile

# As extraction decodes, in processes that hear what decoders say; and in this process, which does not.
DECODERS = ("auto", "pyav", "decord") if has_decord() else ("auto", "pyav")
IN_PROCESS_EVERY = 4  # files of which one is decoded in this process too


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One decoding of one file.

    Attributes:
        file: of the corpus.
        decoder: as `DecodeOptions` takes it.
        view: a key of `VIEWS`.
        way: "pool" or "process".
        verdict: of `Linear.verdict`.
        is_equal: whether its pictures are to the bit those of the first decoder that served.
    """

    file: NumberedFile
    decoder: str
    view: str
    way: str
    verdict: str
    is_equal: bool

    @property
    def name(self) -> str:
        """What a failing test shows."""
        return f"{self.file.path.name} by {self.decoder}, {self.view}, {self.way}"


@pytest.fixture(scope="module")
def findings(corpus: list[NumberedFile]) -> list[Finding]:
    """Every file by every decoder; `auto` by every view, the others by two that change from file to file."""
    pools = {decoder: DecodePool(1, options=DecodeOptions(decoder=decoder)) for decoder in DECODERS}
    try:
        return [
            finding
            for at, linear in enumerate(linear_decodes(corpus))
            for finding in _decodings(linear, at, pools)
        ]
    finally:
        for pool in pools.values():
            pool.close()


def _decodings(linear: Linear, at: int, pools: dict[str, DecodePool]) -> Iterator[Finding]:
    path = linear.file.path
    for number, (view, choose) in enumerate(VIEWS.items()):
        first: np.ndarray | None = None
        for decoder in DECODERS:
            if decoder != "auto" and (number - at) % len(VIEWS) > 1:
                continue
            options = DecodeOptions(decoder=decoder)
            ways = {"pool": lambda p=pools[decoder], c=choose: collect(p.frames(path, c))}
            if at % IN_PROCESS_EVERY == 0 and number == at // IN_PROCESS_EVERY % len(VIEWS):
                ways["process"] = lambda o=options, c=choose: decode_clip(path, c, options=o)
            for way, decode in ways.items():
                verdict, frames = linear.verdict(decode, choose)
                first = frames if first is None else first
                yield Finding(
                    file=linear.file,
                    decoder=decoder,
                    view=view,
                    way=way,
                    verdict=verdict,
                    is_equal=frames is None or np.array_equal(frames, first),
                )


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_is_served_is_what_a_decode_from_the_start_shows(findings: list[Finding], decoder: str) -> None:
    served = [f for f in findings if f.decoder == decoder and is_served(f.verdict)]
    assert {f.name: f.verdict for f in served if f.verdict != RIGHT} == {}


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_no_healthy_file_is_refused(findings: list[Finding], decoder: str) -> None:
    healthy = [f for f in findings if f.decoder == decoder and not f.file.may_be_refused]
    assert {f.name: f.verdict for f in healthy if not is_served(f.verdict)} == {}


def test_the_verdict_does_not_depend_on_the_view(findings: list[Finding]) -> None:
    served: dict[tuple[str, str], dict[bool, str]] = {}
    for f in findings:
        served.setdefault((f.file.path.name, f.decoder), {})[is_served(f.verdict)] = f"{f.view}: {f.verdict}"
    assert {key: both for key, both in served.items() if len(both) > 1} == {}


def test_decoders_give_equal_pictures(findings: list[Finding]) -> None:
    assert {f.name for f in findings if not f.is_equal} == set()


def test_a_refusal_of_a_healthy_file_does_not_speak_of_damage(findings: list[Finding]) -> None:
    """Only an explicit decoder refuses them, as it cannot be trusted with them: nothing of theirs is damaged or lost."""
    refusals = {f.name: f.verdict for f in findings if not is_served(f.verdict) and not f.file.may_be_refused}
    assert {name: told for name, told in refusals.items() if "damage" in told or "lost" in told} == {}


def test_a_refusal_names_its_file_once(findings: list[Finding]) -> None:
    refusals = {f.name: f.verdict for f in findings if not is_served(f.verdict)}
    twice = {f.name for f in findings if f.verdict.count(str(f.file.path)) > 1}
    assert {name: refusals[name] for name in twice & refusals.keys()} == {}


@pytest.mark.skipif(not has_decord(), reason="decord is not installed")
def test_decord_serves_plain_files(findings: list[Finding]) -> None:
    """It is the fast one, so what it is proved to serve right must not be turned away with the rest."""
    plain = {"h264-closed-b0.mp4", "h264-closed-b2.mp4", "h264-closed-b2.mkv", "h264-closed-pyramid.mp4", "vp9.webm",
             "vp8.webm", "mp4-header-first.mp4", "sound-after.mp4", "h264-long-b2.mkv"}  # fmt: skip
    by_decord = {
        f.name for f in findings if f.decoder == "decord" and f.file.path.name in plain and f.verdict == RIGHT
    }
    expected = {f.name for f in findings if f.decoder == "decord" and f.file.path.name in plain}
    assert by_decord == expected
