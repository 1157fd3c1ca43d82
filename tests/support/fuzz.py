"""Command lines drawn by seed, and a judge of what they leave: a result, or one line that says what is wrong."""

import contextlib
import csv
import io
import json
import re
import signal
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file

from evl_cache_cli.main import main

COMMANDS = ("train", "train", "train", "sweep", "eval", "report", "predict")
# Of each option: values that are usual, and values that somebody writes all the same. None gives the flag alone.
Values = tuple[Sequence[str | None], Sequence[str | None]]
_WRONG = ("0", "-1", "nan", "inf", "-inf", "1e30", "1e400", "1e-30", "0x10", "1,2", "٣", " ", "x", "")
_COUNT: Values = (("1", "2", "3"), ("0", "-1", "1.5", "x", "", "9" * 30))
_LENGTH = _COUNT[1][:-1]  # so many epochs would end in a result, but nobody waits for it
_SEED: Values = (("0", "1", "7"), ("-1", str(2**31), str(2**40), str(2**64), "x"))
_FLAG: Values = ((None,), (None,))
_PRECISION: Values = (("float32", "bfloat16", "tf32", "float16"), ("int8", "", "FLOAT32"))
_DEVICE: Values = (("cpu", "cpu:0"), ("cuda", "cuda:7", "meta", "cpu:1", "x", "", "mps"))
_GIGABYTES: Values = ((None, "1", "0.0001"), _WRONG)
_CLIPS: Values = (
    ("half.txt", "rest.txt"),
    ("unknown.txt", "empty.txt", "zeros.txt", "absent.txt", "repeated.txt", "."),
)
_CACHE: Values = (
    ("train", "val", "views"),
    ("no-maps", "few", "all-failed", "other-tower", "two-classes", "absent", "good", ""),
)
_RUN: Values = (("good", "linear", "live"), ("unfinished", "absent", "train", "sweep", "."))
_HEADS = (
    "linear",
    "meanpool",
    "attentive",
    "mlap",
    "uniformerv2",
    "ladder",
    "decoder1",
    "decoder2",
    "decoder3",
)

TRAINING: Mapping[str, Values] = {
    "--recipe": (("k400", "ssv2"), ("k700", "")),
    "--head": (_HEADS, ("decoder9", "decoder0", "decoder", "x", "decoder-1", "decoder9999999999")),
    "--head-layers": (("2-4", "4"), ("1", "4-2", "0", "x", "2,2", "99", "4,2", "")),
    "--no-temporal-conv": _FLAG,
    "--no-temporal-pos-embed": _FLAG,
    "--no-temporal-cross-attention": _FLAG,
    "--batch": (("1", "2", "4", "13", "100", "auto"), ("0", "-1", "x", "")),
    "--accumulate": (("1", "2", "4"), ("0", "-3", "7", "x")),
    "--lr": (("1e-3", "4e-4"), (*_WRONG, "1e3", "1e8", "1e12", "1e38")),
    "--warmup-steps": (("0", "1", "100"), ("-1", "x")),
    "--weight-decay": (("0", "0.1"), _WRONG),
    "--decay-norms-and-biases": _FLAG,
    "--no-decay-norms-and-biases": _FLAG,
    "--grad-clip": (("1", "0.1"), (*_WRONG, "1e-30")),
    "--dropout": (("0", "0.5"), (*_WRONG, "1", "1.5")),
    "--label-smoothing": (("0", "0.1"), (*_WRONG, "1")),
    "--ema": (("0.1", "0.9"), (*_WRONG, "1", "0.999999", "1e-30")),
    "--precision": _PRECISION,
    "--seed": _SEED,
    "--order-seed": _SEED,
    "--save-every-steps": _COUNT,
    "--cache-in-ram": _GIGABYTES,
    "--cache-on-device": _GIGABYTES,
    "--shuffle-blocks": (("0", "1", "2"), ("-1", "x")),
    "--read-threads": _COUNT,
    "--trust": _FLAG,
    "--cuda-graph": _FLAG,
    "--no-cuda-graph": _FLAG,
    "--rank-timeout": (("600",), ("0", "-1", "nan", "x")),
    "--device": _DEVICE,
    "--json": _FLAG,
}
SWEEPING: Mapping[str, Values] = {
    "--head": (("linear", "linear,mlap", "decoder1,linear"), ("linear,", "x", "linear,linear", "")),
    "--temporal": (("all,none", "no-conv"), ("x", "all,all")),
    "--lr": (("1e-3,1e-2", "1e-3"), ("0,1e-3", "1e30", "1e30,1e-3", "nan", "inf,1e-3", "x", "1e-3,")),
    "--weight-decay": (("0,0.1",), ("-1", "nan", "inf", "1e30")),
    "--dropout": (("0,0.5",), ("2", "nan", "1", "-1")),
    "--seed": (("0,1",), ("-1", str(2**64), "1,1", "x")),
    "--batch": (("4", "4,8"), ("0", "auto", "-1", "x")),
    "--warmup-steps": (("0,1",), ("-1", "x")),
    "--label-smoothing": (("0.1",), ("1", "nan")),
    "--ema": (("0.9",), ("1", "nan", "0")),
    "--grad-clip": (("1",), ("0", "nan", "inf")),
    "--head-layers": (("3-4", "4"), ("1", "4-3", "x", "")),
    "--memory": (("1", "0.001"), _WRONG),
    **{
        name: TRAINING[name]
        for name in (
            "--precision",
            "--save-every-steps",
            "--cache-in-ram",
            "--read-threads",
            "--device",
            "--json",
        )
    },
    "--trust": _FLAG,
}
EVALUATING: Mapping[str, Values] = {
    "--best": _FLAG,
    "--clips": (("first.txt",), (*_CLIPS[1], "rest.txt")),
    "--batch": (("1", "4", "100"), ("0", "-1", "x", "1" + "0" * 30)),
    "--precision": _PRECISION,
    "--read-threads": _COUNT,
    "--device": _DEVICE,
    "--json": _FLAG,
}
PREDICTING: Mapping[str, Values] = {
    "--topk": (("1", "3", "100"), ("0", "-1", "x")),
    "--best": _FLAG,
    "--model": (("tower.json",), ("absent.json", "x", "zeros.txt")),
    "--pretrained": (("none",), ("absent.pt", "x", "")),
    "--batch": (("1", "8"), ("0", "x")),
    "--decode-workers": (("1", "2"), ("0", "-1")),
    "--decoder": (("auto",), ("x", "torchcodec-cuda")),
    "--clip-timeout": (("60",), ("0", "-1", "nan", "x")),
    "--precision": _PRECISION,
    "--device": _DEVICE,
    "--csv": (("labels.csv", "-"), (".", "absent/labels.csv")),
    "--json": _FLAG,
}
_HALF: Values = (("half.txt",), _CLIPS[1])
_REST: Values = (("rest.txt",), _CLIPS[1])
# What is asked for most often is refused soonest: values of the usual kind are to be the rule.
_ODD = (0, 0, 1, 1, 2)


class _Draw:
    """Words of a command line, of whose options some have odd values."""

    def __init__(self, random: Random) -> None:
        self._random, self._given = random, list[tuple[str | None, Values]]()

    def give(self, name: str | None, values: Values, share: float = 1.0) -> None:
        """Add an option, or a value without a name, in a share of all cases."""
        if self._random.random() < share:
            self._given.append((name, values))

    def words(self) -> list[str]:
        count = min(self._random.choice(_ODD), len(self._given))
        odd = set(self._random.sample(range(len(self._given)), count))
        found = []
        for place, (name, values) in enumerate(self._given):
            value = self._random.choice(values[place in odd])
            found += [word for word in (name, value) if word is not None]
        return found


def arguments(seed: int) -> list[str]:
    """The command line of a seed, for a folder that has caches, runs, clips and videos by the names above."""
    random = Random(seed)
    command, draw = random.choice(COMMANDS), _Draw(random)
    if command in ("train", "sweep"):
        _give_training(draw, random)
        for name, values in (TRAINING if command == "train" else SWEEPING).items():
            draw.give(name, values, 0.7 if name == "--head" else 0.12)
        is_again = command == "train" and random.random() < 0.1
        return [command, *draw.words(), *(["--out", "resumed", "--resume"] if is_again else ["--out", "out"])]
    if command == "eval":
        draw.give("--cache", (("train", "val"), _CACHE[1]))
        draw.give("--run", (("good", "linear"), _RUN[1]))
        options = EVALUATING
    elif command == "report":
        for _ in range(random.randint(1, 3)):
            draw.give(None, (("good", "linear", "sweep"), _RUN[1]))
        options = {"--json": _FLAG}
    else:
        draw.give(
            None, (("videos", "videos/00.mp4"), ("absent.mp4", "half.txt", "train", "videos/broken.mp4"))
        )
        draw.give("--run", (("live",), ("good", *_RUN[1])))
        options = PREDICTING
    for name, values in options.items():
        draw.give(name, values, 0.2)
    return [command, *draw.words(), *(["--out", "out"] if command == "report" else [])]


def _give_training(draw: _Draw, random: Random) -> None:
    """Give caches, clips of each side, and a length."""
    kind = random.random()
    if kind < 0.6:
        draw.give("--cache", (("train",), _CACHE[1]))
        draw.give("--val-cache", (("val",), _CACHE[1]))
    elif kind < 0.8:  # two sides of one cache
        draw.give("--cache", (("train",), ("val",)))
        draw.give("--val-clips", _HALF)
    else:
        draw.give("--cache", (("views",), _CACHE[1]))
        draw.give("--val-cache", (("train", "val"), _CACHE[1]))
        draw.give("--train-clips", _REST, 0.3)
    draw.give(*random.choice([("--epochs", (("1", "2"), _LENGTH)), ("--steps", (("1", "3"), _LENGTH))]))


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended. `status`: None where it raised."""

    status: int | None
    out: str
    err: str


def run(words: Sequence[str]) -> Ended:
    """Run a command in this process, as the console script does."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    status: int | None = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(words))
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            signal.signal(signal.SIGTERM, handler)
    return Ended(status=status, out=out.getvalue(), err=err.getvalue())


def faults(words: Sequence[str], ended: Ended, left: Sequence[Path]) -> list[str]:
    """What is wrong with how a command ended, and with the files and folders that it left."""
    found = []
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    if ended.status is None or "Traceback" in ended.err:
        found.append(f"a traceback: {ended.err.strip().splitlines()[-1:]}")
    elif ended.status not in (0, 2, 3) and not _is_allowed_failure(errors):
        found.append(f"exit {ended.status}: {errors}")
    elif ended.status == 0 and errors:
        found.append(f"exit 0 with {errors}")
    elif ended.status == 2 and len(errors) != 1:
        found.append(f"exit 2 with {len(errors)} lines: {errors}")
    if "--json" in words and ended.status == 0:
        found += [f"stdout: {problem}" for problem in _json_problems(_without_csv(ended.out, words))]
    return found + [
        f"{path.name}: {problem}"
        for place in sorted(left)
        for path in sorted(place.rglob("*") if place.is_dir() else [place])
        if path.is_file()
        for problem in problems(path)
    ]


def _is_allowed_failure(errors: Sequence[str]) -> bool:
    """Whether a command told in one line of a place that is not there, which has exit status 1 (docs/troubleshooting.md)."""
    return len(errors) == 1 and re.search("no cache here", errors[0]) is not None


def _without_csv(text: str, words: Sequence[str]) -> str:
    return text[text.index("{") :] if "-" in words and "{" in text else text


def problems(path: Path) -> list[str]:
    """What is wrong with a file that a command left: JSON that is not strict, and numbers that are none."""
    if path.suffix == ".json":
        return _json_problems(path.read_text(encoding="utf-8"))
    if path.suffix == ".jsonl":
        return [p for line in path.read_text(encoding="utf-8").splitlines() for p in _json_problems(line)]
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        return [
            f"a cell is {cell}" for cell in cells if cell.lower().lstrip("+-") in ("nan", "inf", "infinity")
        ]
    if path.suffix == ".safetensors":
        return [
            f"{n} is not finite" for n, value in load_file(path).items() if not torch.isfinite(value).all()
        ]
    if path.suffix == ".pt":
        return _tensor_problems(torch.load(path, map_location="cpu", weights_only=True))
    if path.suffix == ".html":
        text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", path.read_text(encoding="utf-8"))
        shown = re.findall(r">\s*([+-]?(?:nan|inf))\b\s*[%±<]", text)  # a sentence may say that a loss is NaN
        return [f"shows {number}" for number in shown[:1]]
    return []


def _json_problems(text: str) -> list[str]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        if len({name for name, _ in items}) < len(items):
            raise ValueError("a name twice")
        return dict(items)

    try:
        json.loads(text, parse_constant=refuse, object_pairs_hook=pairs)
    except ValueError as error:
        return [f"{error}"]
    return []


def _tensor_problems(value: object, name: str = "") -> list[str]:
    if isinstance(value, torch.Tensor):
        return (
            [] if not value.is_floating_point() or torch.isfinite(value).all() else [f"{name} is not finite"]
        )
    if isinstance(value, float):
        return [] if abs(value) < float("inf") else [f"{name} is {value}"]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    return [problem for key, inner in items for problem in _tensor_problems(inner, f"{name}.{key}")]
