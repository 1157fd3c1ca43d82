"""Dropout is drawn by sample, so a step that is split into passes is the step, in every head."""

import pytest

from evl_cache.heads import HEADS
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import write_pair

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"))


@pytest.mark.parametrize("head", [name.replace("N", "2") for name in HEADS])
def test_accumulating_passes_changes_no_loss(caches, tmp_path, head):
    losses = {}
    for accumulate in (1, 2, 4):
        found = losses[accumulate] = []
        options = TrainOptions(
            head=head, epochs=2, batch=4, lr=1e-3, dropout=0.5, seed=3, accumulate=accumulate
        )
        train(
            *caches,
            options=options,
            out=tmp_path / str(accumulate),
            on_step=lambda done, total, loss, to=found: to.append(loss),
        )
    assert losses[2] == pytest.approx(losses[1], abs=1e-5)
    assert losses[4] == pytest.approx(losses[1], abs=1e-5)
