"""The store keeps features in a Zarr v3 group that loses nothing and proves every byte. Only it knows zarr's format.

It gives out `FeatureCache` to read a cache, `create_cache`, `BlockWriter` and `finish_cache` to write one, `verify_cache`
to prove it, and `copy_to_directory`, `copy_to_bucket` and `copy_part` to copy it. What it is built of, from below:

- `disk`: files published whole, locks between jobs, permissions, digests.
- `objects`: a cache's files by name, from a directory, a server or a bucket.
- `shards`: chunks encoded into shard files, and read from them.
- `format`: what a cache holds and where: arrays, marks, the manifest, the description and its second copy.
- `reading`, `writing`, `copying`, `proving`: what is done with a cache.
"""

from evl_cache.store.copying.card_file import CARD_NAME, write_card
from evl_cache.store.copying.grown import copy_to_bucket, copy_to_directory
from evl_cache.store.copying.part import copy_part, part_spec
from evl_cache.store.copying.source import OnBlock, TransferResult
from evl_cache.store.disk.checksum import file_digest
from evl_cache.store.disk.file_system import file_identity
from evl_cache.store.disk.locks import (
    EXPIRY_S,
    BlockLock,
    LockHolder,
    LockWatcher,
    lock_holder,
    lock_holders,
)
from evl_cache.store.disk.permissions import set_file_mode
from evl_cache.store.disk.publish import is_staging_name, replacing
from evl_cache.store.disk.runtime import REAL, Runtime
from evl_cache.store.format.description import CacheDescription, OtherZarr, read_clips, read_description
from evl_cache.store.format.grown import (
    ADDITIONS_NAME,
    GROWN_NAME,
    Addition,
    Box,
    addition_name,
    addition_spec,
    find_grown,
    grown_digest,
    grown_spec,
)
from evl_cache.store.format.index import IndexedBlock
from evl_cache.store.format.index_head import INDEX_NAME
from evl_cache.store.format.known_blocks import KnownBlocks, clip_records
from evl_cache.store.format.layout import (
    LOCKS_NAME,
    MANIFEST_NAME,
    PROJECTIONS_NAME,
    array_layouts,
    blocks_in_redo,
    finished_blocks,
    is_in_redo,
    mark_path,
    marked_blocks,
)
from evl_cache.store.format.limits import projections_nbytes
from evl_cache.store.format.manifest import BlockNotDone, Manifest, manifest_at, manifest_digest
from evl_cache.store.format.marks import UNKNOWN_DECODER, ClipRecord, Mark, mark_file_digest
from evl_cache.store.format.parts import CachePart, CacheParts, cache_parts, place_of, size_together
from evl_cache.store.format.recomputed import (
    projections_content,
    read_projections,
    write_projections,
)
from evl_cache.store.format.recovery import restore_description
from evl_cache.store.format.row_making import FeaturesOverflow, make_row, make_rows
from evl_cache.store.format.rows import Row, StoredBatch, StoredMaps, StoredTokens
from evl_cache.store.format.size import (
    CacheSize,
    cache_size,
    check_free_space,
    num_files,
    sample_nbytes,
)
from evl_cache.store.objects.address import (
    SCHEMES,
    as_url,
    directory_of,
    is_url,
    public_text,
    public_url,
    split_url,
)
from evl_cache.store.objects.objects import open_objects
from evl_cache.store.objects.waits import waits_end_when
from evl_cache.store.proving.files import OnProgress, Sample
from evl_cache.store.reading.buffers import BatchBuffers, Reads, TokensRead, stored_batch
from evl_cache.store.reading.indices import Indices, rows_of
from evl_cache.store.reading.reader import FeatureCache
from evl_cache.store.reading.totals import totals_at, totals_together
from evl_cache.store.verify import Problem, Verification
from evl_cache.store.verify import verify_cache as verify_alone
from evl_cache.store.verify_url import verify_cache
from evl_cache.store.writing.block_writer import BlockWriter
from evl_cache.store.writing.completion import settled_digest, withdraw_index
from evl_cache.store.writing.create import create_cache
from evl_cache.store.writing.finish import finish_cache, index_cache
from evl_cache.store.writing.growth import GrownRecords, add_to_cache, renew_grown, restore_grown
from evl_cache.store.writing.mark_records import replace_records
from evl_cache.store.writing.publication import BlockLost, RowsAtStake, valid_mark, valid_marks
from evl_cache.store.writing.segments import write_segment_of
from evl_cache.store.writing.stored_rows import StoredRow, StoredRows
