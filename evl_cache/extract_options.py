"""The options of `extract` in one table: flag, field, default, help, and how a value stands on a command line.

The commands extract and estimate, `train --online`, `ExtractRequest`, a cache's origin and the command that makes a cache
like another one all read it.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from enum import Flag, auto
from pathlib import Path

from evl_cache.notation import AUTO_STRIDE
from evl_cache.spec import CODECS, DECODERS, MAP_STORAGE, SAMPLING, TOKEN_STORAGE, ViewSpec
from evl_cache.untrusted.spec_limits import COMPUTE_DTYPES

DEFAULT_MODEL = "ViT-B-16-quickgelu"
DEFAULT_MODEL_LAYERS = 12  # that it has
DEFAULT_LAYERS = 4  # that are kept, the last ones
# Where nobody says: on a CPU. On a GPU, `extract.defaults` goes by the machine.
CPU_DECODE_WORKERS, CPU_BATCH = 2, 8
MOST_DECODE_WORKERS = 64
MOST_DEFAULT_BATCH = 64  # samples of a usual block
MOST_BATCH = 1 << 16  # a mark names the batch, and `repair` of a stranger's cache runs it
# Views of the published test recipes (section 4 of arXiv 2208.03550 and its supplement), by data set and frames.
VIEW_RECIPES: Mapping[str, Mapping[str, object]] = {
    "k400-8": {"frames": 8, "sampling": "strided", "stride": 16, "views": "3x1"},
    "k400-16": {"frames": 16, "sampling": "strided", "stride": 16, "views": "1x3"},
    "k400-32": {"frames": 32, "sampling": "strided", "stride": 8, "views": "1x3"},
    "ssv2-8": {"frames": 8, "sampling": "tsn", "views": "3x1"},
    "ssv2-16": {"frames": 16, "sampling": "tsn", "views": "1x3"},
    "ssv2-32": {"frames": 32, "sampling": "tsn", "views": "1x3"},
}
_MOST = 2**63  # of a number in a stranger's cache


class Role(Flag):
    """Who reads an option, beside extract.

    Attributes:
        REQUEST: it says what is extracted, and fills a field of `ExtractRequest`; others say how.
        ESTIMATE: `estimate` takes it.
        KEPT: a cache's origin keeps it, because its spec does not tell.
        ONLINE: `train --online` takes it.
        DECODING: it says how videos are decoded; so does every command take it that decodes some.
    """

    NONE = 0
    REQUEST = auto()
    ESTIMATE = auto()
    KEPT = auto()
    ONLINE = auto()
    DECODING = auto()


@dataclass(frozen=True)
class ExtractOption:
    """One option.

    Attributes:
        flag: as a command line has it.
        role: who reads it.
        help: for people.
        kind: type of its value; a `bool` is a switch.
        choices: the only values there are; any where empty.
        least, most: smallest and largest number that the command line takes; the package checks others.
        default: value where none is given; None where it depends on other things.
        shows_default: whether the help says it.
        is_required: whether there must be a value.
        word: a word that may stand in the place of a number.
        metavar: what stands for its value in the help.
        parameter: its name in the command, and in the environment; from the flag where not given.
        field: the field it fills; the parameter where not given.
        alias: another flag that does the same.
    """

    flag: str
    role: Role
    help: str | None = None
    _: KW_ONLY
    kind: type[str | Path | int | float | bool] = str
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: int | None = None
    default: str | int | float | None = None
    shows_default: bool = False
    is_required: bool = False
    word: str = ""
    metavar: str | None = None
    parameter: str = ""
    field: str = ""
    alias: str = ""

    def __post_init__(self) -> None:
        name = self.parameter or self.flag.removeprefix("--").replace("-", "_")
        object.__setattr__(self, "parameter", name)
        object.__setattr__(self, "field", self.field or name)

    @property
    def variable(self) -> str:
        """The variable of the environment that sets it for `extract`."""
        return self.variables[0]

    @property
    def variables(self) -> tuple[str, ...]:
        """All that set it: one bears the parameter's name, and one the flag's, where that is another."""
        names = (self.parameter, self.flag.removeprefix("--").replace("-", "_"))
        return tuple(dict.fromkeys(f"EVL_CACHE_EXTRACT_{name.upper()}" for name in names))

    def accepts(self, value: object) -> bool:
        """Whether a value, of a cache that a stranger may have written, is one that the option takes."""
        if self.choices:
            return value in self.choices
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        if isinstance(value, int) or (isinstance(value, float) and self.kind is float):
            return self.kind in (int, float) and (self.least or 0) <= value <= (self.most or _MOST)
        return isinstance(value, str) and value != "" and self.kind in (str, Path)

    def words(self, value: object) -> tuple[str, ...]:
        """The words, unquoted, that give a value on a command line; none where there is no value to give."""
        if value is None or value is False:
            return ()
        return (self.flag,) if value is True else (self.flag, str(value))


_ALL = Role.REQUEST | Role.ESTIMATE | Role.KEPT | Role.ONLINE
_SPEC = Role.REQUEST | Role.ESTIMATE | Role.ONLINE  # the cache's spec tells it
_STORED = Role.REQUEST | Role.ESTIMATE  # nor is it of videos that are not stored
_RUN = Role.NONE
_HOW = Role.ESTIMATE | Role.ONLINE | Role.DECODING
_V = ViewSpec()
_DATASETS = "k400, ssv2, ucf101, hmdb51, folder, list, scenes, motions, …"
_BATCH = f"Samples at once [{CPU_BATCH}; GPU: ≤ {MOST_DEFAULT_BATCH}]."
_WORKERS = f"Processes [CPU {CPU_DECODE_WORKERS}; GPU: all cores]."
_LAYERS = f"Counted from 1, also 9,11,12 [the last {DEFAULT_LAYERS}]."
_PRETRAINED = "Tag, file, or none (seeded random) [openai; evl-tiny's own]."
_DECODER = f"{', '.join(DECODERS)} (GPU too) [auto]"


def _storage(flag: str, choices: tuple[str, ...], text: str, metavar: str | None = None) -> ExtractOption:
    return ExtractOption(flag, _STORED, text, choices=choices, default=choices[0], metavar=metavar)


# fmt: off
EXTRACT_OPTIONS = (
    ExtractOption("--dataset", _STORED, _DATASETS, metavar="NAME", is_required=True),
    ExtractOption("--root", _ALL, "Folder of the videos [$EVL_DATA_ROOT/NAME, or the list's].", kind=Path),
    ExtractOption("--split", _ALL, "Only this split [both train and val]."),
    ExtractOption("--annotations", _ALL, "File or folder [under --root].", kind=Path),
    ExtractOption("--list", _ALL, "Lines 'path label', for --dataset list.", kind=Path, parameter="list_path"),
    ExtractOption("--classes", _ALL, "Names of classes in order, for --dataset list.", kind=Path, parameter="classes_path"),
    ExtractOption("--model", _ALL, "open_clip or timm/NAME, evl-tiny, JSON.", default=DEFAULT_MODEL, shows_default=True),
    ExtractOption("--pretrained", _ALL, _PRETRAINED),
    ExtractOption("--layers", _SPEC, _LAYERS, metavar="8-12"),
    ExtractOption("--recipe", _STORED | Role.KEPT, "The EVL paper's views: k400-8, ssv2-16, …",
                  choices=tuple(VIEW_RECIPES), metavar="NAME"),
    ExtractOption("--frames", _SPEC, f"Frames of a view [{_V.frames}].", kind=int),
    ExtractOption("--sampling", _SPEC, f"tsn: frames spread over a clip [{_V.sampling}].", choices=SAMPLING),
    ExtractOption("--stride", _SPEC, f"Every Nth frame; auto: spread [{_V.stride}].", kind=int,
                  word=AUTO_STRIDE, metavar="N|auto"),
    ExtractOption("--views", _ALL, f"Samples of a clip: over time x crops [{_V.crops}].", metavar="TxS"),
    ExtractOption("--train-views", _ALL, "Of train clips: V random crops each.", kind=int, least=1, metavar="V"),
    ExtractOption("--augment-seed", _ALL, f"Other random crops by another N [{_V.augment_seed}].", kind=int, least=0,
                  metavar="N"),
    ExtractOption("--flip", _ALL, "Mirror half of these (published: none).", kind=bool),
    _storage("--tokens", TOKEN_STORAGE, "Features: fp16 is exact, twice as big [int8]."),
    _storage("--maps", MAP_STORAGE, "Attention maps: uint8, fp16, recompute, none [uint8] (docs/choosing.md).", "HOW"),
    _storage("--codec", CODECS, "raw: fast, large; archive: slow, small."),
    ExtractOption("--compute-dtype", _SPEC, "float32, float16, bfloat16 [float16 on a GPU]", choices=COMPUTE_DTYPES,
                  metavar="DTYPE"),
    ExtractOption("--cache", _STORED, "To write [named under $EVL_CACHE_ROOT].", kind=Path),
    ExtractOption("--limit", _ALL, "Only the first N clips.", kind=int, least=1),
    ExtractOption("--allow-missing", _ALL, "Of files that are not there [0].", kind=float, default=0.0,
                  metavar="PERCENT", field="allow_missing_percent"),
    ExtractOption("--device", Role.ESTIMATE, "cpu, cuda, cuda:N [a GPU if any]."),
    ExtractOption("--batch", Role.ESTIMATE, _BATCH, kind=int, least=1, most=MOST_BATCH),
    ExtractOption("--decode-workers", _HOW, _WORKERS, kind=int, least=1, metavar="N"),
    ExtractOption("--decoder", _HOW, _DECODER, choices=DECODERS, default=DECODERS[0], metavar="NAME"),
    ExtractOption("--tolerate-bad-frames", _HOW, "Keep clips with damaged frames.", kind=bool),
    ExtractOption("--clip-timeout", _HOW, "For decoding a clip [120].", kind=float, metavar="SECONDS"),
    ExtractOption("--max-failures", _RUN, "Stop beyond 20, 5%, … [5%; 50 in a row].", metavar="N%"),
    ExtractOption("--outage-patience", _RUN, "For a disk that is away [600].", kind=float, metavar="SECONDS"),
    ExtractOption("--retry-failed", _RUN, "Try the clips that failed again.", kind=bool),
    ExtractOption("--check-sources", _RUN, "Redo clips whose video was replaced.", kind=bool, alias="--sources"),
    ExtractOption("--retry-doubtful", _RUN, "Redo old clips of doubtful frames.", kind=bool),
    ExtractOption("--reuse", _RUN, "A cache: copy what it has already.", kind=Path),
)
# fmt: on


def options_with(role: Role) -> tuple[ExtractOption, ...]:
    """Return the options that have a role, in their order."""
    return tuple(option for option in EXTRACT_OPTIONS if role in option.role)


def kept_values(origin: Mapping[str, object]) -> dict[str, object]:
    """Return what a cache's origin says of the options, by field.

    It may be a stranger's: what an option would not take is left out.
    """
    return {
        option.field: origin[option.field]
        for option in options_with(Role.KEPT)
        if option.field in origin and option.accepts(origin[option.field])
    }
