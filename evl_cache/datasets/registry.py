"""The data sets that have a name, and how each is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from evl_cache.clips import ClipList, normal_split
from evl_cache.datasets.folder import read_class_folders
from evl_cache.datasets.hmdb51 import read_hmdb51
from evl_cache.datasets.kinetics import read_kinetics
from evl_cache.datasets.list_file import read_lists
from evl_cache.datasets.rendered_clips import RENDERED_VIEWS, read_rendered
from evl_cache.datasets.something import read_something
from evl_cache.datasets.ucf101 import read_ucf101
from evl_cache.errors import UsageError
from evl_cache.rendered import BENCHMARKS


@dataclass(frozen=True, kw_only=True)
class DatasetReader:
    """One data set.

    Attributes:
        name: as `--dataset` takes it.
        description: what is expected on the disk, as `--explain` prints it; several lines.
        splits: splits that are read where none is named.
        views: frames, sampling, stride or views that suit its clips, where the usual ones do not.
        reader: returns clip lists by split, given `root`, `annotations` and `split`; None for a list file.
    """

    name: str
    description: str
    splits: tuple[str, ...] = ("train", "val")
    views: Mapping[str, Any] = field(default_factory=dict)
    reader: Callable[..., dict[str, ClipList]] | None

    def read(
        self,
        root: Path,
        *,
        annotations: Path | None,
        split: str | None,
        list_path: Path | None,
        classes_path: Path | None = None,
    ) -> dict[str, ClipList]:
        """Return clip lists by split, or that of the one split named.

        A clip whose file is missing stays in its list: `missing.check_missing` counts them.

        Args:
            root: folder of the data set; paths of clips are relative to it.
            annotations: where annotation files are; None looks in the usual places.
            split: the split wanted; None for all usual ones.
            list_path: a list file, whose paths stay as written; None for every other data set.
            classes_path: names the classes of a list, in their order; None for every other data set.

        Raises: UsageError for what the data set does not take, or files that are missing or malformed.
        """
        if self.reader is None:
            return _read_list(annotations, split, list_path, classes_path)
        if classes_path is not None:
            raise UsageError(
                f"--classes {classes_path} with --dataset {self.name}; expected --dataset list with it, or no --classes"
            )
        if list_path is not None:
            raise UsageError(
                f"--list {list_path} with --dataset {self.name}; expected --dataset list with it, or no --list"
            )
        return self.reader(root, annotations=annotations, split=split)


def _read_list(
    annotations: Path | None, split: str | None, list_path: Path | None, classes_path: Path | None
) -> dict[str, ClipList]:
    if list_path is None or annotations is not None:
        got = "no --list" if list_path is None else f"--annotations {annotations}"
        raise UsageError(
            f"--dataset list with {got}; expected --list FILE (lines 'path label') and no --annotations"
        )
    wanted = None if split is None else normal_split(split)
    return read_lists(list_path, split=wanted, classes_path=classes_path)


_RENDERED = """\
{name}, rendered H.264 clips under --root (default $EVL_DATA_ROOT/{name}):
  videos       train/<class>/<index>.mp4 and val/<class>/<index>.mp4; where they are not there yet they are drawn
               by seed, {clips} (evl-cache render {name} draws others: harder, easier, more)
  annotations  none
  labels       names of the {classes} in alphabetical order, numbered from 0
  splits       train and val, of other colours and grounds; --split names one
  views        8 frames, every second one
  more         docs/rendered-benchmarks.md"""

_RENDERED_CLASSES = {
    "scenes": "12 pairs of shapes (chance 8.3 %; order says nothing)",
    "motions": "14 motions (chance 7.1 %; without order at most 50 %)",
}

_KINETICS = """\
Kinetics-{n} under --root (default $EVL_DATA_ROOT/k{n}):
  videos       <youtube id>_<start, 6 digits>_<end, 6 digits>.mp4 (or another video ending)
               in train/ and val/ (also validate/, validation/), flat or by class:
               train/<file>, train/<class name>/<file>; or without train/ and val/
               class folders may have spaces or underscores; also <youtube id>_<start>_<end>.mp4 without the
               zeros, and <youtube id>.mp4 where the annotations have one clip of the id (extract says how many)
  annotations  train.csv and val.csv (also validate.csv, kinetics{n}_train.csv, kinetics{n}_val.csv, ...)
               in annotations/, kinetics{n}/ or the root, or where --annotations says (a folder or one file);
               columns label,youtube_id,time_start,time_end,split; is_cc may follow
  labels       class names of the train annotation in alphabetical order, numbered from 0, for all splits
  splits       train and val; --split names one (test needs a test.csv with labels)"""

_SSV2 = """\
Something-Something v2 under --root (default $EVL_DATA_ROOT/ssv2):
  videos       <id>.webm (or another video ending) in 20bn-something-something-v2/, videos/ or the root
  annotations  something-something-v2-labels.json, -train.json, -validation.json
               (also labels.json, train.json, validation.json)
               in annotations/, labels/ or the root, or in the folder --annotations names
  labels       numbers of the labels file; brackets of templates, and of the labels, do not count
  splits       train and val; --split names one (the test file has no labels)"""

_UCF101 = """\
UCF101 under --root (default $EVL_DATA_ROOT/ucf101):
  videos       <class>/<file>.avi (or another video ending) in UCF-101/, UCF101/, videos/ or the root;
               other capitals too (the lists have HandstandPushups, the archive HandStandPushups)
  annotations  classInd.txt, trainlist01.txt to trainlist03.txt, testlist01.txt to testlist03.txt
               in annotations/, ucfTrainTestlist/ or the root, or in the folder --annotations names
  labels       numbers of classInd.txt less one
  splits       train and val (the test list) of fold 1; --split 2 means both of fold 2, --split train2 one"""

_HMDB51 = """\
HMDB51 under --root (default $EVL_DATA_ROOT/hmdb51):
  videos       <class>/<file>.avi (or another video ending) in hmdb51_org/, hmdb51/, videos/ or the root;
               other capitals too
  annotations  <class>_test_split1.txt to <class>_test_split3.txt, lines '<file>.avi code'
               (1 train, 2 test, 0 neither) in annotations/, testTrainMulti_7030_splits/, test_train_splits/,
               splits/ or the root, or in the folder --annotations names
  labels       classes in alphabetical order, numbered from 0
  splits       train and val (code 2) of fold 1; --split 2 means both of fold 2, --split train2 one"""

_FOLDER = """\
A folder of classes, --root (default $EVL_DATA_ROOT/folder):
  videos       train/<class>/<video> and val/<class>/<video>; or <class>/<video>, one split called all;
               in capitals too, and val/ as validation/, validate/, valid/, dev/ or eval/; folders beside them
               are no splits; what would be misread (splits inside classes, a root a level too high) is refused
               files of other endings (.gif, .m2ts, .vob, .asf, pictures), links to folders inside a class and
               folders without a video are passed over, and extract says which before it begins
  annotations  none
  labels       names of the class folders in alphabetical order, numbered from 0
  splits       train and val as there are (test where there is no val); --split names one"""

_LIST = """\
A list of videos, --list FILE, with --root for what its paths are relative to:
  list         lines 'path label', whose paths may hold spaces; 'path<TAB>label' or 'path,label' (quoted
               where they hold commas); mmaction2's lists of videos have the first form
               (its lists of frame folders, 'folder total_frames label', are not read);
               files of any ending that FFmpeg decodes, GIFs too
  table        CSV, TSV or ';' with a first line that names the columns, in any order and quoted where need be:
               path,label[,split][,start,end][,start_frame,end_frame][,id]; or a JSON object of these a line
               (start and end in seconds or 00:01:30.5, frames from 0, the end not included: a clip is that part)
  labels       one a clip: numbers from 0 as they stand, or names, then numbered in alphabetical order;
               a name of several words behind a TAB, a comma or a video's ending;
               --classes FILE gives names and order (a name a line, or a table id,name)
  splits       the one --split names; all where it names none; of a table with a column split train and val
               (test where there is no val), which number their classes alike"""

_READERS = (
    *(
        DatasetReader(
            name=f"k{n}", description=_KINETICS.format(n=n), reader=partial(read_kinetics, release=n)
        )
        for n in (400, 600, 700)
    ),
    DatasetReader(name="ssv2", description=_SSV2, reader=read_something),
    DatasetReader(name="ucf101", description=_UCF101, reader=read_ucf101),
    DatasetReader(name="hmdb51", description=_HMDB51, reader=read_hmdb51),
    *(
        DatasetReader(
            name=name,
            description=_RENDERED.format(
                name=name, clips="100 and 30 clips of a class", classes=_RENDERED_CLASSES[name]
            ),
            views=RENDERED_VIEWS,
            reader=partial(read_rendered, name=name),
        )
        for name in BENCHMARKS
    ),
    DatasetReader(name="folder", description=_FOLDER, reader=partial(read_class_folders, dataset="folder")),
    DatasetReader(name="list", description=_LIST, splits=("all",), reader=None),
)

DATASETS: Mapping[str, DatasetReader] = {reader.name: reader for reader in _READERS}
