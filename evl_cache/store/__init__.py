"""The store: a Zarr v3 group that loses nothing and proves every byte. Only it knows zarr's format."""

from evl_cache.store.block_writer import BlockLost, BlockWriter, clear_mark, valid_mark
from evl_cache.store.buffers import BatchBuffers, TokensRead
from evl_cache.store.card_file import CARD_NAME, write_card
from evl_cache.store.directory import (
    CacheDescription,
    create_cache,
    read_clips,
    read_clips_from,
    read_description,
    read_description_from,
)
from evl_cache.store.layout import (
    LOCKS_NAME,
    MANIFEST_NAME,
    PROJECTIONS_NAME,
    array_layouts,
    mark_path,
    marked_blocks,
)
from evl_cache.store.leftovers import finish_cache
from evl_cache.store.locks import BlockLock, LockWatcher
from evl_cache.store.manifest import BlockNotDone, Manifest, manifest_at, write_manifest
from evl_cache.store.marks import ClipRecord, Mark
from evl_cache.store.objects import SCHEMES, Objects, is_url, open_objects, public_url
from evl_cache.store.partial import copy_part, part_spec
from evl_cache.store.permissions import set_file_mode
from evl_cache.store.reader import FeatureCache
from evl_cache.store.recomputed import projections_content, read_projections, write_projections
from evl_cache.store.recovery import restore_description
from evl_cache.store.rows import Row, StoredBatch, make_row
from evl_cache.store.transfer import OnBlock, TransferResult, copy_to_directory
from evl_cache.store.upload import copy_to_bucket
from evl_cache.store.verify import Problem, Verification, verify_cache

__all__ = [
    "CARD_NAME",
    "LOCKS_NAME",
    "MANIFEST_NAME",
    "PROJECTIONS_NAME",
    "SCHEMES",
    "BatchBuffers",
    "BlockLock",
    "BlockLost",
    "BlockNotDone",
    "BlockWriter",
    "CacheDescription",
    "ClipRecord",
    "FeatureCache",
    "LockWatcher",
    "Manifest",
    "Mark",
    "Objects",
    "OnBlock",
    "Problem",
    "Row",
    "StoredBatch",
    "TokensRead",
    "TransferResult",
    "Verification",
    "array_layouts",
    "clear_mark",
    "copy_part",
    "copy_to_bucket",
    "copy_to_directory",
    "create_cache",
    "finish_cache",
    "is_url",
    "make_row",
    "manifest_at",
    "mark_path",
    "marked_blocks",
    "open_objects",
    "part_spec",
    "projections_content",
    "public_url",
    "read_clips",
    "read_clips_from",
    "read_description",
    "read_description_from",
    "read_projections",
    "restore_description",
    "set_file_mode",
    "valid_mark",
    "verify_cache",
    "write_card",
    "write_manifest",
    "write_projections",
]
