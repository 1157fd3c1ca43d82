"""Augmented training views: reproducible from seed, clip and number; one draw and one box for all frames; as timm."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import RandomResizedCrop

from evl_cache.batches.epoch_order import EpochOrder
from evl_cache.batches.feature_loader import FeatureLoader
from evl_cache.clips import ClipList
from evl_cache.errors import ClipError, UsageError
from evl_cache.extract import augmentation
from evl_cache.extract.augmentation import (
    Box,
    Operation,
    ViewAugmentation,
    apply_operations,
    draw_box,
    draw_operations,
    view_generator,
)
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.prepare import choose_frames, prepare_clip
from evl_cache.extract.request import ExtractRequest
from evl_cache.extract.stage import extract
from evl_cache.extract_options import VIEW_RECIPES
from evl_cache.sampling import strided_train_view, tsn_train_view
from evl_cache.spec import CacheSpec, ViewSpec
from evl_cache.store import FeatureCache
from evl_cache.train.stage import TrainOptions, train
from evl_cache.video import decode_frames
from tests.support.store_helpers import (
    differences,
    extract_small,
    make_clips,
    one_thread,
    small_job,
    small_spec,
    small_tower,
    tree,
)

VIEWS = ViewSpec(frames=4, stride=2, train_views=3)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def augmented_view(frames, rng, *, flip=False, **how):
    """All frames of a view at once."""
    height, width = frames.shape[1:3]
    return ViewAugmentation.draw(rng, height=height, width=width, flip=flip).apply(frames, **how)


def picture(height=48, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Draws


def test_timm_with_the_same_fortune_makes_the_same_picture(monkeypatch):
    """The slow twin: timm's own operations as `rand-m7-n4-mstd0.5-inc1` has them, told what to draw."""
    frame = picture()
    for number in range(60):
        operations = draw_operations(view_generator(0, "clip", number), short_side=48)
        image = Image.fromarray(frame)
        for name, happens, level, sign_seed in fortune(view_generator(0, "clip", number)):
            hparams = {
                "img_mean": (128, 128, 128),
                "interpolation": Image.Resampling.BICUBIC,
                "translate_const": 21,
            }
            twin = auto_augment.AugmentOp(name, prob=1.0, magnitude=level, hparams=hparams)
            random.seed(sign_seed)
            image = twin(image) if happens else image
        assert np.array_equal(apply_operations(frame[None], operations)[0], np.asarray(image))


def fortune(rng):
    """What `draw_operations` draws, in its order."""
    names = [name.replace("Rel", "") for name in auto_augment._RAND_INCREASING_TRANSFORMS]
    for name in rng.choice(names, 4).tolist():
        happens, level = rng.random() < 0.5, rng.normal(7.0, 0.5)
        yield name, happens, level, int(rng.integers(2**63))


def test_operations_have_the_published_frequencies_and_magnitudes():
    drawn = [draw_operations(view_generator(1, "c", i), short_side=100) for i in range(1500)]
    assert np.mean([len(operations) for operations in drawn]) == pytest.approx(2.0, abs=0.08)  # four halves
    names = Counter(operation.name for operations in drawn for operation in operations)
    assert len(names) == 15 and max(names.values()) < 1.5 * min(names.values())
    shifts = [op.arguments[0] for ops in drawn for op in ops if op.name in ("TranslateX", "TranslateY")]
    assert np.mean(np.abs(shifts)) == pytest.approx(
        0.7 * 45, rel=0.05
    )  # magnitude 7 of 10, 0.45 of the short side
    assert 0.4 < np.mean(np.asarray(shifts) > 0) < 0.6
    assert max(np.abs(shifts)) <= 45


def test_drawing_leaves_the_generators_of_others_alone():
    random.seed(3)
    np.random.seed(3)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    augmented_view(np.stack([picture()] * 2), view_generator(0, "c", 0), size=16, **PLAIN)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_boxes_have_the_published_area_and_aspect():
    rng = np.random.default_rng(0)
    boxes = [draw_box(rng, 240, 320) for _ in range(2000)]
    area = np.array([box.height * box.width / (240 * 320) for box in boxes])
    aspect = np.array([box.width / box.height for box in boxes])
    assert area.min() > 0.075 and area.max() <= 1
    torch.manual_seed(0)
    image = torch.empty(3, 240, 320)
    twin = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(2000)]
    )
    assert area.mean() == pytest.approx((twin.prod(axis=1) / (240 * 320)).mean(), abs=0.02)
    assert np.log(aspect).mean() == pytest.approx(np.log(twin[:, 1] / twin[:, 0]).mean(), abs=0.02)
    assert aspect.min() > 0.74 and aspect.max() < 1.35
    assert all(0 <= b.top <= 240 - b.height and 0 <= b.left <= 320 - b.width for b in boxes)
    assert draw_box(np.random.default_rng(0), 4, 400) == Box(
        top=0, left=197, height=4, width=5
    )  # none fits: the centre


# Views


def test_one_box_and_one_draw_for_all_frames_of_a_view(monkeypatch):
    # A coded clip: each pixel of red and green tells its place, blue tells the frame.
    y, x = np.mgrid[0:64, 0:96].astype(np.uint8)
    frames = np.stack([np.stack([y, x, np.full_like(x, 40 * t)], axis=-1) for t in range(4)])
    boxes = set()
    for number in range(20):
        rng = view_generator(0, "clip", number)
        with monkeypatch.context() as local:
            local.setattr(augmentation, "draw_operations", lambda rng, short_side: ())
            view = augmented_view(frames, rng, size=32, **PLAIN) * 255
        assert torch.equal(view[:, :2], view[:1, :2].expand(4, -1, -1, -1))  # one box
        np.testing.assert_allclose(view[:, 2, 0, 0], [0, 40, 80, 120], atol=1e-3)
        boxes.add((float(view[0, 0, 0, 0]), float(view[0, 1, 0, 0])))
    assert len(boxes) > 15
    still, changed = np.stack([picture()] * 4), 0
    for number in range(20):
        view = augmented_view(still, view_generator(0, "clip", number), size=16, **PLAIN)
        assert torch.equal(view, view[:1].expand(4, -1, -1, -1))  # one draw
        changed += bool(draw_operations(view_generator(0, "clip", number), short_side=48))
    assert changed > 10


def test_what_comes_from_outside_is_grey_and_operations_keep_their_order():
    black = np.zeros((1, 32, 32, 3), np.uint8)
    shifted = apply_operations(black, (Operation(name="TranslateX", arguments=(8.0,)),))
    assert set(np.unique(shifted)) == {0, 128}
    inverted = apply_operations(
        black, (Operation(name="TranslateX", arguments=(8.0,)), Operation(name="Invert", arguments=()))
    )
    assert set(np.unique(inverted)) == {127, 255}


def test_mirroring_is_off_unless_asked_for_and_then_a_coin():
    frames = np.stack([picture()] * 2)
    same = [
        torch.equal(
            augmented_view(frames, view_generator(0, "c", i), size=16, **PLAIN),
            augmented_view(frames, view_generator(0, "c", i), size=16, flip=True, **PLAIN),
        )
        for i in range(40)
    ]
    assert 8 < sum(same) < 32
    i = same.index(False)
    plain = augmented_view(frames, view_generator(0, "c", i), size=16, **PLAIN)
    assert torch.equal(
        augmented_view(frames, view_generator(0, "c", i), size=16, flip=True, **PLAIN), plain.flip(-1)
    )


def test_frames_are_drawn_first_by_the_training_rules():
    for views, rule in (
        (VIEWS, lambda rng: strided_train_view(90, frames=4, stride=2, rng=rng)),
        (replace(VIEWS, sampling="tsn", stride=None), lambda rng: tsn_train_view(90, frames=4, rng=rng)),
    ):
        chosen = choose_frames(90, views, "clip")
        assert np.array_equal(chosen, [rule(view_generator(0, "clip", v)) for v in range(3)])
        assert len({tuple(view) for view in chosen.tolist()}) == 3


def test_frames_without_pixels_are_the_clips_failure():
    with pytest.raises(ClipError, match="no pixels"):
        augmented_view(np.zeros((2, 0, 4, 3), np.uint8), view_generator(0, "c", 0), size=8, **PLAIN)


# In a cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("augmented")
    make_clips(folder, 6, broken=False)
    return folder


def clip_list(folder, order=range(6)):
    whole = make_clips(folder, 6, broken=False)
    return ClipList(clips=tuple(whole.clips[i] for i in order), classes=whole.classes, source=str(folder))


def augmented(clips, folder, **changes):
    return small_spec(clips, small_tower(folder), views=replace(VIEWS, **changes), block_clips=2)


def rows(cache):
    return {
        cache.clips[clip].id: [cache.read_row(3 * clip + view) for view in range(3)]
        for clip in range(len(cache.clips))
    }


def test_views_are_the_same_bytes_again_in_another_order_and_with_other_workers(folder, tmp_path):
    first, shuffled = clip_list(folder), clip_list(folder, (4, 2, 0, 5, 1, 3))
    extract_small(first, tmp_path / "a", spec=augmented(first, folder))
    extract_small(shuffled, tmp_path / "b", spec=augmented(shuffled, folder))
    a, b = rows(FeatureCache(tmp_path / "a")), rows(FeatureCache(tmp_path / "b"))
    assert a.keys() == b.keys()
    for clip in a:
        for mine, theirs in zip(a[clip], b[clip], strict=True):
            assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
        assert not np.array_equal(a[clip][0]["tokens"], a[clip][1]["tokens"])
    pixels = [
        prepare_clip(clip, folder, tower=small_tower(folder).spec, views=VIEWS, decode=decode_frames).samples
        for clip in first.clips
        for _ in "ab"
    ]
    assert all(torch.equal(x, y) for x, y in zip(pixels[::2], pixels[1::2], strict=True))


def test_the_number_of_workers_changes_no_byte(folder, tmp_path):
    clips = clip_list(folder)
    extract_small(clips, tmp_path / "one", spec=augmented(clips, folder))
    with one_thread():
        extract(
            small_job(clips, tmp_path / "three", spec=augmented(clips, folder)),
            options=ExtractOptions(batch=4, decode_workers=3),
        )
    assert differences(tree(tmp_path / "one"), tree(tmp_path / "three")) == []


def test_augmentation_is_part_of_the_features_identity_and_absent_elsewhere(folder):
    clips = clip_list(folder)
    plain, drawn = small_spec(clips, small_tower(folder)), augmented(clips, folder)
    assert not {"train_views", "augment_seed", "flip"} & plain.to_json()["views"].keys()
    assert CacheSpec.from_json(drawn.to_json()) == drawn
    others = [
        augmented(clips, folder, **c) for c in ({"train_views": 2}, {"augment_seed": 1}, {"flip": True})
    ]
    assert len({plain.feature_id, drawn.feature_id, *(spec.feature_id for spec in others)}) == 5
    for wrong in (
        {"train_views": 2, "spatial_views": 3},
        {"flip": True},
        {"augment_seed": 1},
        {"train_views": -1},
    ):
        with pytest.raises(UsageError):
            ViewSpec(**wrong)


def test_reused_rows_are_those_of_the_same_clip_not_only_of_the_same_file(folder, tmp_path):
    clips = clip_list(folder)
    spec = augmented(clips, folder)
    extract_small(clips, tmp_path / "old", spec=spec)
    renamed = ClipList(
        clips=(replace(clips.clips[0], id="another name"), *clips.clips[1:]),
        classes=clips.classes,
        source=clips.source,
    )
    extract_small(renamed, tmp_path / "new", spec=augmented(renamed, folder), reuse=tmp_path / "old")
    extract_small(renamed, tmp_path / "fresh", spec=augmented(renamed, folder))
    new, fresh = rows(FeatureCache(tmp_path / "new")), rows(FeatureCache(tmp_path / "fresh"))
    for clip in fresh:
        assert all(
            np.array_equal(x["tokens"], y["tokens"]) for x, y in zip(new[clip], fresh[clip], strict=True)
        )


def test_an_epoch_has_one_view_of_each_clip_and_all_views_in_turn():
    order = EpochOrder(samples=np.arange(60), batch=8, seed=1, views=3)
    assert len(order) == 3 and order.samples_of_epoch == 20
    for cycle in range(3):
        epochs = [order.of(3 * cycle + i) for i in range(3)]
        assert all(sorted(epoch // 3) == list(range(20)) for epoch in epochs)
        assert sorted(np.concatenate(epochs)) == list(range(60))
    assert len({tuple(order.of(epoch) % 3) for epoch in range(9)}) == 9
    parts = [list(replace(order, rank=rank, world=2).parts(4)) for rank in range(2)]
    joined = [np.concatenate([a.rows, b.rows]) for a, b in zip(*parts, strict=True)]
    whole = [part.rows for part in order.parts(4)]
    assert all(np.array_equal(x, y) for x, y in zip(joined, whole, strict=True))
    later = [part.rows for part in order.parts(4, start_batch=1)]
    assert all(np.array_equal(x, y) for x, y in zip(later, whole[1:], strict=True))
    blocks = replace(order, shuffle_blocks=1, block_samples=15).of(2)
    assert sorted(blocks // 3) == list(range(20)) and np.count_nonzero(np.diff(blocks // 15)) == 3


def test_training_draws_a_view_per_epoch_and_validates_on_test_views(folder, tmp_path):
    clips = clip_list(folder)
    extract_small(clips, tmp_path / "train", spec=augmented(clips, folder))
    plain = replace(small_spec(clips, small_tower(folder)), split="val")
    extract_small(clips, tmp_path / "val", spec=plain)
    caches = FeatureCache(tmp_path / "train"), FeatureCache(tmp_path / "val")
    result = train(*caches, options=TrainOptions(head="decoder2", epochs=4, batch=4), out=tmp_path / "run")
    assert (result.steps, result.val_clips) == (4 * 2, 6)
    loader = FeatureLoader(caches[0], np.arange(18), layers=(2, 3), batch=4, shuffle_seed=0)
    assert len(loader) == 2 and sum(len(batch.samples) for batch in loader.epoch(1)) == 6
    assert (
        len(FeatureLoader(caches[0], np.arange(18), layers=(2, 3), batch=4)) == 5
    )  # unshuffled: all of them


# The request


def chosen_views(**choices):
    return ExtractRequest(dataset="k400", **choices).chosen_views()


@pytest.mark.parametrize(("name", "frames", "stride", "views"), [
    ("k400-8", 8, 16, (3, 1)), ("k400-16", 16, 16, (1, 3)), ("k400-32", 32, 8, (1, 3)),
    ("ssv2-8", 8, None, (3, 1)), ("ssv2-16", 16, None, (1, 3)), ("ssv2-32", 32, None, (1, 3)),
])  # fmt: skip
def test_recipes_set_the_published_views_of_validation(name, frames, stride, views):
    val, trained = chosen_views(recipe=name)
    assert (val.frames, val.stride, (val.temporal_views, val.spatial_views)) == (frames, stride, views)
    assert val.sampling == ("strided" if stride else "tsn")
    assert trained == replace(val, temporal_views=1, spatial_views=1)
    _, drawn = chosen_views(recipe=name, train_views=4, augment_seed=2, flip=True)
    assert drawn == replace(trained, train_views=4, augment_seed=2, flip=True)
    assert name in VIEW_RECIPES and len(VIEW_RECIPES) == 6


def test_options_given_win_over_the_recipe():
    val, _ = chosen_views(recipe="k400-8", stride=4, views="1x1", frames=16)
    assert (val.frames, val.stride, val.temporal_views) == (16, 4, 1)
    assert chosen_views() == (ViewSpec(), None)
    with pytest.raises(UsageError, match="TSN takes no stride"):
        chosen_views(recipe="ssv2-8", stride=4)
    with pytest.raises(UsageError, match="give --train-views"):
        chosen_views(flip=True)


def test_views_given_whole_leave_nothing_else_to_say():
    whole, of_train = ViewSpec(frames=4), ViewSpec(frames=4, train_views=2)
    assert chosen_views(views=whole, train_split_views=of_train) == (whole, of_train)
    assert chosen_views(train_split_views=of_train) == (ViewSpec(), of_train)
    with pytest.raises(UsageError, match="views is a whole ViewSpec, beside frames, recipe; give one or"):
        chosen_views(views=whole, recipe="k400-8", frames=4)
    with pytest.raises(UsageError, match="train_split_views is a whole ViewSpec, beside flip"):
        chosen_views(train_split_views=of_train, flip=True)
    with pytest.raises(UsageError, match="recipe 'k400'; expected one of k400-8"):
        chosen_views(recipe="k400")


def test_views_that_suit_a_data_set_are_its_default():
    assert ExtractRequest(dataset="motions").chosen_views() == (ViewSpec(stride=2), None)
    assert ExtractRequest(dataset="motions", recipe="k400-8").chosen_views()[0].stride == 16
