"""The store: a Zarr v3 group that loses nothing and proves every byte. Only it knows zarr's format."""

from evl_cache.store.copying.card_file import CARD_NAME, write_card
from evl_cache.store.copying.part import copy_part, part_spec
from evl_cache.store.copying.to_bucket import copy_to_bucket
from evl_cache.store.copying.to_directory import OnBlock, TransferResult, copy_to_directory
from evl_cache.store.disk.file_system import file_identity
from evl_cache.store.disk.locks import BlockLock, LockWatcher, lock_holders
from evl_cache.store.disk.permissions import set_file_mode
from evl_cache.store.disk.runtime import REAL, Runtime
from evl_cache.store.format.description import (
    CacheDescription,
    read_clips,
    read_clips_from,
    read_description,
    read_description_from,
)
from evl_cache.store.format.layout import (
    LOCKS_NAME,
    MANIFEST_NAME,
    PROJECTIONS_NAME,
    array_layouts,
    mark_path,
    marked_blocks,
)
from evl_cache.store.format.manifest import BlockNotDone, Manifest, manifest_at, write_manifest
from evl_cache.store.format.marks import ClipRecord, Mark
from evl_cache.store.format.recomputed import (
    projections_content,
    projections_nbytes,
    read_projections,
    write_projections,
)
from evl_cache.store.format.recovery import restore_description
from evl_cache.store.format.rows import Row, StoredBatch, StoredMaps, StoredTokens, make_row
from evl_cache.store.format.size import check_free_space, num_files, sample_nbytes
from evl_cache.store.objects.address import SCHEMES, is_url, public_url
from evl_cache.store.objects.objects import Objects, open_objects
from evl_cache.store.reading.buffers import BatchBuffers, TokensRead, stored_batch
from evl_cache.store.reading.reader import FeatureCache
from evl_cache.store.verify import Problem, Verification, verify_cache
from evl_cache.store.writing.block_writer import BlockLost, BlockWriter, clear_mark, valid_mark
from evl_cache.store.writing.create import create_cache
from evl_cache.store.writing.finish import finish_cache

__all__ = [
    "CARD_NAME",
    "LOCKS_NAME",
    "MANIFEST_NAME",
    "PROJECTIONS_NAME",
    "REAL",
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
    "Runtime",
    "StoredBatch",
    "StoredMaps",
    "StoredTokens",
    "TokensRead",
    "TransferResult",
    "Verification",
    "array_layouts",
    "check_free_space",
    "clear_mark",
    "copy_part",
    "copy_to_bucket",
    "copy_to_directory",
    "create_cache",
    "file_identity",
    "finish_cache",
    "is_url",
    "lock_holders",
    "make_row",
    "manifest_at",
    "mark_path",
    "marked_blocks",
    "num_files",
    "open_objects",
    "part_spec",
    "projections_content",
    "projections_nbytes",
    "public_url",
    "read_clips",
    "read_clips_from",
    "read_description",
    "read_description_from",
    "read_projections",
    "restore_description",
    "sample_nbytes",
    "set_file_mode",
    "stored_batch",
    "valid_mark",
    "verify_cache",
    "write_card",
    "write_manifest",
    "write_projections",
]
