"""A cache's description: what makes features the same, and what does not."""

from dataclasses import fields, replace

import pytest

from evl_cache.errors import CacheError, UsageError
from evl_cache.notation import parse_layers, parse_views
from evl_cache.spec import FRAME_RULE, CacheSpec, TowerSpec, ViewSpec

TOWER = TowerSpec(
    model="ViT-B-16",
    pretrained="openai",
    weights_sha256="ab" * 32,
    image_size=224,
    patch_size=16,
    width=768,
    blocks=12,
    heads=12,
    quick_gelu=True,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.2, 0.3),
)
SPEC = CacheSpec(
    dataset="list",
    split="all",
    classes=("a", "b"),
    tower=TOWER,
    views=ViewSpec(),
    layers=(9, 10, 11, 12),
    tokens="int8",
    maps="uint8",
    compute_dtype="float32",
    num_clips=130,
    content_id="cd" * 32,
    block_clips=64,
)

TOWER_CHANGES = {
    "model": "ViT-B-32",
    "pretrained": "laion",
    "weights_sha256": "ef" * 32,
    "image_size": 240,
    "patch_size": 8,
    "width": 64,
    "blocks": 11,
    "heads": 6,
    "quick_gelu": False,
    "mean": (0.5, 0.4, 0.2),
    "std": (0.2, 0.2, 0.2),
    "class_token": "mean",
    "registers": 4,
}
VIEW_CHANGES = {
    "frames": 16,
    "sampling": ViewSpec(sampling="tsn", stride=None),
    "stride": 8,
    "temporal_views": 3,
    "spatial_views": 3,
    "train_views": 2,
    "augment_seed": ViewSpec(train_views=1, augment_seed=1),
    "flip": ViewSpec(train_views=1, flip=True),
}
SPEC_CHANGES = {
    "frame_rule": 1,
    "chunk_keys": "folders",
    "pixels": "torchcodec",
    "dataset": "folder",
    "split": "val",
    "classes": ("a", "c"),
    "tower": replace(TOWER, width=1),
    "views": ViewSpec(frames=4),
    "layers": (12,),
    "tokens": "fp16",
    "maps": "none",
    "compute_dtype": "float16",
    "num_clips": 3,
    "content_id": "00" * 32,
    "block_clips": 8,
    "codec": "raw",
    "preprocessing": "short-side-bilinear-v2",
    "extra": {"new_field": 1},
}
NOT_FEATURES = "dataset split classes layers num_clips content_id block_clips codec chunk_keys extra".split()


def changed_tower(name):
    return replace(SPEC, tower=replace(TOWER, **{name: TOWER_CHANGES[name]}))


def changed_views(name):
    value = VIEW_CHANGES[name]
    return replace(SPEC, views=value if isinstance(value, ViewSpec) else replace(SPEC.views, **{name: value}))


def test_the_changes_below_are_of_every_field_there_is():
    assert set(TOWER_CHANGES) == {field.name for field in fields(TowerSpec)}
    assert set(VIEW_CHANGES) == {field.name for field in fields(ViewSpec)}
    assert set(SPEC_CHANGES) == {field.name for field in fields(CacheSpec)}


@pytest.mark.parametrize("name", TOWER_CHANGES)
def test_feature_id_follows_the_tower_but_not_what_it_is_called(name):
    assert (changed_tower(name).feature_id == SPEC.feature_id) == (name in ("model", "pretrained"))


@pytest.mark.parametrize("name", VIEW_CHANGES)
def test_feature_id_follows_the_views(name):
    assert changed_views(name).feature_id != SPEC.feature_id


@pytest.mark.parametrize("name", SPEC_CHANGES)
def test_feature_id_follows_what_changes_features_and_nothing_else(name):
    changed = replace(SPEC, **{name: SPEC_CHANGES[name]})
    assert (changed.feature_id == SPEC.feature_id) == (name in NOT_FEATURES)


def test_caches_that_were_made_keep_their_feature_id():
    """Written down when 0.1.0 made it: a new field must leave what it does not concern alone."""
    made = replace(SPEC, frame_rule=1, chunk_keys="folders")
    assert made.feature_id == "e6316d98527b0907f178d106f9d3633a9d67894a389afabec3a7e18543244dd5"
    assert not {"class_token", "registers"} & set(made.to_json()["tower"])
    assert not {"pixels", "frame_rule", "chunk_keys"} & set(made.to_json())


def test_a_description_that_tells_no_chunk_keys_has_a_folder_for_each_shard():
    content = SPEC.to_json()
    assert content.pop("chunk_keys") == "flat"
    found = CacheSpec.from_json(content)
    assert found == replace(SPEC, chunk_keys="folders") and found.to_json() == content
    assert 'chunk_keys: "flat", not "folders"' in SPEC.differences(found)
    assert (found.feature_id, found.name) == (SPEC.feature_id, SPEC.name)


@pytest.mark.parametrize("keys", ["", "dots", "Flat", 1, None, True, ["flat"], {}])
def test_what_are_no_chunk_keys_is_refused(keys):
    with pytest.raises(CacheError, match="chunk_keys"):
        CacheSpec.from_json(SPEC.to_json() | {"chunk_keys": keys})


def test_a_description_without_a_rule_for_frames_is_of_the_first_rule():
    content = {k: v for k, v in replace(SPEC, frame_rule=1).to_json().items() if k != "frame_rule"}
    found = CacheSpec.from_json(content)
    assert found.frame_rule == 1 and found.by_older_rule
    assert found.to_json() == content
    assert SPEC.frame_rule == FRAME_RULE and not SPEC.by_older_rule
    assert SPEC.to_json()["frame_rule"] == FRAME_RULE


def test_a_later_rule_for_frames_is_read_and_not_written():
    later = replace(SPEC, frame_rule=FRAME_RULE + 1)
    assert CacheSpec.from_json(later.to_json()) == later
    with pytest.raises(
        UsageError, match=f"rule {FRAME_RULE + 1}, this evl-cache knows rules up to {FRAME_RULE}"
    ):
        later.check_frame_rule("caches/later")
    SPEC.check_frame_rule("caches/now")


@pytest.mark.parametrize("rule", [0, -1, True, "2", 1.0, None])
def test_what_is_no_rule_for_frames_is_refused(rule):
    with pytest.raises(CacheError, match="frame_rule"):
        CacheSpec.from_json(SPEC.to_json() | {"frame_rule": rule})


def test_rules_for_frames_are_named_as_numbers_where_specs_differ():
    assert f"frame_rule: {FRAME_RULE}, not 1" in SPEC.differences(replace(SPEC, frame_rule=1))


def test_the_directory_name_follows_features_clips_and_layers():
    assert SPEC.name.startswith("list-all-") and len(SPEC.name) == len("list-all-") + 8
    others = [replace(SPEC, layers=(12,)), replace(SPEC, content_id="0"), changed_views("stride")]
    assert len({SPEC.name, *(other.name for other in others)}) == 4
    assert replace(SPEC, codec="raw").name == SPEC.name


@pytest.mark.parametrize(
    "spec",
    [SPEC, changed_views("sampling"), replace(SPEC, extra={"later": {"a": [1]}}), replace(SPEC, classes=())],
)
def test_a_spec_survives_its_json(spec):
    assert CacheSpec.from_json(spec.to_json()) == spec


def test_an_edited_or_incomplete_description_is_refused():
    content = SPEC.to_json()
    with pytest.raises(CacheError, match="was edited"):
        CacheSpec.from_json({**content, "tokens": "fp16"})
    for name in ("tower", "views", "layers", "tokens"):
        with pytest.raises(CacheError, match="incomplete"):
            CacheSpec.from_json({k: v for k, v in content.items() if k != name})
    with pytest.raises(CacheError, match="incomplete"):
        CacheSpec.from_json({**content, "tower": {"model": "x"}})


def test_differences_name_the_field_and_both_sides():
    assert SPEC.differences(SPEC) == []
    assert SPEC.differences(changed_views("stride")) == [
        line
        for line in SPEC.differences(changed_views("stride"))
        if line.startswith(("feature_id", "views.stride"))
    ]
    assert "views.stride: 16, not 8" in SPEC.differences(changed_views("stride"))
    assert "layers: [9, 10, 11, 12], not [12]" in SPEC.differences(replace(SPEC, layers=(12,)))


@pytest.mark.parametrize("name", ["model", "pretrained"])
def test_what_the_tower_is_called_is_no_difference(name):
    assert SPEC.differences(changed_tower(name)) == []


def test_sizes_follow_from_the_description():
    spec = replace(SPEC, views=ViewSpec(temporal_views=3, spatial_views=3))
    assert spec.tower.grid == (14, 14) and spec.num_tokens == 197
    assert spec.views.per_clip == 9 and spec.num_samples == 130 * 9
    assert spec.num_blocks == 3
    assert [list(spec.clips_of_block(block))[-1] for block in range(3)] == [63, 127, 129]
    assert SPEC.has_maps
    assert not replace(SPEC, maps="none").has_maps and not replace(SPEC, views=ViewSpec(frames=1)).has_maps


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("8-12", (8, 9, 10, 11, 12)),
        ("9,11,12", (9, 11, 12)),
        ("12, 3-4,3", (3, 4, 12)),
        ("7", (7,)),
        ("5-5", (5,)),
    ],
)
def test_layers_are_ranges_with_both_ends_and_lists(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "8-", "-8", "8--9", "1,,2", "1.5", "8:12"])
def test_what_is_no_list_of_layers_is_refused(text):
    with pytest.raises(UsageError, match="such as 8-12 or 9,11,12"):
        parse_layers(text)


def test_layers_that_run_backwards_are_refused():
    with pytest.raises(UsageError, match="expected 8-12"):
        parse_layers("12-8")


def test_views_are_temporal_times_spatial():
    assert parse_views("3x1") == (3, 1) and parse_views("1X3") == (1, 3)
    for text in ("3", "x", "3x", "axb", "3x1x1", "-1x3"):
        with pytest.raises(UsageError, match="such as 3x1"):
            parse_views(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "dense"}, "one of strided, tsn"),
        ({"sampling": "tsn"}, "TSN takes no stride"),
        ({"stride": None}, "strided needs it"),
        ({"frames": 0}, "frames is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"temporal_views": 0}, "temporal_views is 0"),
        ({"spatial_views": 2}, "expected 1 .centre. or 3"),
    ],
)
def test_views_that_contradict_themselves_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ViewSpec(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "int4"}, "int8, fp16"),
        ({"maps": "int8"}, "uint8, fp16"),
        ({"codec": "zip"}, "default"),
        ({"num_clips": 0}, "empty"),
    ],
)
def test_storage_that_does_not_exist_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        replace(SPEC, **options)
