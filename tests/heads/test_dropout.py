"""Masks of dropout belong to samples: fair, unrelated, and the same wherever a sample is; elsewhere dropout is torch's."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from evl_cache.errors import UsageError
from evl_cache.heads import HEADS, Dropout, SampleMasks, build_head, head_class, sample_keys

SIZES = {"width": 16, "num_frames": 3, "grid": (2, 2), "num_classes": 4, "num_heads": 2}
NAMES = [name.replace("N", "2") for name in HEADS]

pytestmark = pytest.mark.usefixtures("one_thread")


def new_head(name, dropout=0.5):
    torch.manual_seed(0)
    return build_head(name, num_layers=head_class(name).default_depth or 2, dropout=dropout, **SIZES).train()


def features(head, samples):
    """Tokens and maps of samples by their numbers: the same for a sample, whichever are beside it."""
    tokens, maps = [], []
    for layer in range(head.num_layers):
        drawn = [torch.Generator().manual_seed(100 * layer + int(s)) for s in samples]
        tokens.append(torch.stack([torch.randn(3, 5, 16, generator=g) for g in drawn]))
        maps.append(torch.stack([torch.rand(2, 2, 4, 4, generator=g) for g in drawn]))
    return tokens, maps


def logits(head, samples, *, seed=3, step=7):
    with SampleMasks(head).of(sample_keys(seed, step, np.asarray(samples))):
        return head(*features(head, samples))


@pytest.mark.parametrize("name", NAMES)
def test_a_samples_masks_do_not_depend_on_the_samples_beside_it(name):
    head, samples = new_head(name), [5, 900, 12, 7]
    whole = logits(head, samples)
    for order in ([7, 5], [900], [12, 900, 5]):
        expected = whole[[samples.index(s) for s in order]]
        torch.testing.assert_close(logits(head, order), expected, rtol=1e-5, atol=1e-6)
    head.eval()
    assert not torch.allclose(whole, head(*features(head, samples)), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_torchs_generators_have_no_part_in_a_training(name):
    head = new_head(name)
    torch.manual_seed(1)
    first = logits(head, [1, 2, 3])
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(logits(head, [1, 2, 3]), first)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn
    assert all(type(m) is not nn.Dropout for m in head.modules())


@pytest.mark.parametrize("name", NAMES)
def test_outside_a_training_dropout_is_torchs(name):
    head = new_head(name)
    inputs = features(head, [1, 2, 3])
    logits(head, [1, 2, 3])  # leaves nothing behind
    torch.manual_seed(4)
    first, second = head(*inputs), head(*inputs)
    torch.manual_seed(4)
    assert torch.equal(head(*inputs), first) and not torch.equal(first, second)
    for module in head.modules():
        if isinstance(module, Dropout):
            module.forward = nn.Dropout(module.p).forward
    torch.manual_seed(4)
    assert torch.equal(head(*inputs), first)


def test_without_dropout_values_are_untouched():
    head = new_head("decoder2", dropout=0.0)
    expected = head(*features(head, [1, 2]))
    assert torch.equal(logits(head, [1, 2]), expected)
    layer, x = Dropout(0.5).eval(), torch.randn(2, 8)
    with SampleMasks(layer).of(sample_keys(0, 0, np.arange(2))):
        assert layer(x) is x


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_masks_are_fair_and_unrelated(probability):
    layers = nn.ModuleList(Dropout(probability) for _ in range(2))
    masks = SampleMasks(layers)
    found = []
    for seed, step in ((0, 0), (0, 1), (1, 0)):
        with masks.of(sample_keys(seed, step, np.arange(512))):
            found += [layer(torch.ones(512, 384)) for layer in layers]
    share, count = 1 - probability, 512 * 384
    deviation = (probability * share) ** 0.5
    for mask in found:
        kept = mask.ne(0).double()
        torch.testing.assert_close(mask[mask != 0].mean(), torch.tensor(1 / share))
        assert abs(float(kept.mean()) - share) < 5 * deviation / count**0.5
        for means, of in ((kept.mean(0), 512), (kept.mean(1), 384)):
            assert float((means - share).abs().max()) < 6 * deviation / of**0.5
    # Of layers, steps and seeds, of neighbouring samples and of neighbouring values: no two agree more than by chance.
    centred = [(mask.ne(0).double() - share) / deviation for mask in found]
    pairs = [(a, b) for i, a in enumerate(centred) for b in centred[:i]]
    pairs += [(c[1:], c[:-1]) for c in centred] + [(c[:, 1:], c[:, :-1]) for c in centred]
    for a, b in pairs:
        assert abs(float((a * b).mean())) < 6 / a.numel() ** 0.5


def test_a_seed_step_and_sample_of_any_size_have_keys():
    keys = [sample_keys(seed, step, np.asarray([0, 2**40])) for seed in (0, 2**62) for step in (0, 10**9)]
    assert len(torch.cat(keys).unique()) == 8


def test_values_without_a_row_for_each_sample_are_an_error():
    layer = Dropout(0.5)
    with (
        SampleMasks(layer).of(sample_keys(0, 0, np.arange(3))),
        pytest.raises(
            UsageError, match=r"got values \(6, 4\) of 3 samples; expected one row for each sample"
        ),
    ):
        layer(torch.ones(6, 4))
    layer(torch.ones(6, 4))  # after an error too it is torch's


def test_a_head_is_copied_and_pickled_without_masks():
    head, inputs = new_head("decoder2"), None
    with SampleMasks(head).of(sample_keys(0, 0, np.arange(2))):
        inputs = features(head, [0, 1])
        head(*inputs)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other.eval()(*inputs), head.eval()(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_masks_are_the_same_in_any_precision(dtype):
    layer = Dropout(0.25)
    keys = sample_keys(2, 3, np.arange(8))
    with SampleMasks(layer).of(keys):
        found, expected = layer(torch.ones(8, 32, dtype=dtype)), layer(torch.ones(8, 32))
    assert found.dtype == dtype and torch.equal(found.ne(0), expected.ne(0))
    assert set(found.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75, dtype=dtype))}
