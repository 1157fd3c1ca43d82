"""Heads under compilers, exporters, transforms, modes and wrappers: right there, and the same eager heads after it."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from evl_cache.heads import HEADS, Workspace, build_head, head_class
from evl_cache.heads.decoder.evl import EVLHead
from evl_cache.heads.decoder.plain import PlainHead
from evl_cache.heads.layer_tokens import LayerTokens
from evl_cache.quantize import quantize_maps, quantize_tokens

NAMES = [name.replace("N", "2") for name in HEADS]
FUSED = ["attentive", "ladder"]  # their self-attention is torch's fused one
SIZES = {"width": 16, "num_frames": 3, "grid": (2, 2), "num_classes": 4, "num_heads": 2, "dropout": 0.0}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Torch's own use, where it first differentiates forward.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch._dynamo.reset()


def new_head(name, dtype=torch.float32, **changes):
    """A head none of whose parameters is zero, as some are in the beginning."""
    depth = head_class(name).default_depth or 2
    head = build_head(name, num_layers=depth, **{**SIZES, **changes}).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.3)
    return head


def features(head, clips=3, seed=1):
    """Tokens and maps of every layer."""
    generator, dtype = torch.Generator().manual_seed(seed), next(head.parameters()).dtype
    tokens = [torch.randn(clips, 3, 5, 16, generator=generator, dtype=dtype) for _ in range(head.num_layers)]
    maps = [torch.rand(clips, 2, 2, 4, 4, generator=generator, dtype=dtype).softmax(-1) for _ in tokens]
    return tokens, maps


def results(head, inputs, model=None):
    """Logits, and the gradients of a fixed function of them."""
    head.zero_grad()
    logits = (head if model is None else model)(*inputs)
    (logits * torch.arange(logits.numel()).view_as(logits).cos()).sum().backward()
    return logits.detach().clone(), [None if p.grad is None else p.grad.clone() for p in head.parameters()]


def assert_same(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(got[1], expected[1], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=10 * tolerance)


def assert_unspoiled(head, inputs, expected):
    """The eager head gives the very bits that it gave, and so do a few steps after it."""
    for _ in range(3):
        logits, gradients = results(head, inputs)
        assert torch.equal(logits, expected[0])
        for mine, theirs in zip(gradients, expected[1], strict=True):
            assert mine is theirs is None or torch.equal(mine, theirs)
    if isinstance(head, EVLHead):
        assert all(type(spare) is torch.Tensor for spare in head.workspace._spare)


@pytest.fixture(params=NAMES)
def case(request):
    """A head that has taken a step, its features, and what it gives for them."""
    head = new_head(request.param)
    inputs = features(head)
    expected = results(head, inputs)
    yield head, inputs, expected
    assert_unspoiled(head, inputs, expected)


@pytest.fixture
def decoder():
    head = new_head("decoder2")
    inputs = features(head)
    expected = results(head, inputs)
    yield head, inputs, expected
    assert_unspoiled(head, inputs, expected)


# Compilers


def test_a_head_compiles_in_one_graph(case):
    head, inputs, expected = case
    assert_same(results(head, inputs, torch.compile(head, backend="eager", fullgraph=True)), expected)


def test_a_decoder_compiles_with_its_backward_pass(decoder):
    head, inputs, expected = decoder
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    assert_same(results(head, inputs, compiled), expected)
    fewer = features(head, clips=2, seed=5)
    assert_same(results(head, fewer, compiled), results(head, fewer))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*inputs), expected[0], rtol=1e-5, atol=1e-5)


def test_a_compiled_decoder_follows_its_switches_and_its_mode(decoder):
    head, inputs, _ = decoder
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    compiled(*inputs)
    head.temporal_conv = False
    assert_same(results(head, inputs, compiled), results(head, inputs))
    head.temporal_cross_attention = False
    assert_same(results(head, inputs, compiled), results(head, inputs))
    head.temporal_conv = head.temporal_cross_attention = True


def test_a_compiled_head_drops_out_in_training_alone():
    head = new_head("decoder2", dropout=0.5)
    inputs = features(head)
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    assert not torch.equal(compiled(*inputs), compiled(*inputs))
    head.eval()
    torch.testing.assert_close(compiled(*inputs), head(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["decoder2", "linear", "mlap"])
def test_codes_and_lower_precision_compile(name):
    head = new_head(name)
    tokens, maps = features(head)
    coded = [quantize_tokens(t) for t in tokens], [quantize_maps(m) for m in maps]
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    assert_same(results(head, coded, compiled), results(head, coded))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(results(head, coded, compiled), results(head, coded), tolerance=2e-2)


@pytest.mark.soak
def test_a_decoder_compiles_with_the_default_backend(decoder):
    head, inputs, expected = decoder
    assert_same(results(head, inputs, torch.compile(head)), expected)
    assert_same(results(head, inputs, torch.compile(head, fullgraph=True)), expected)


# Exports and traces


def exported(head, inputs, *, strict):
    """The head exported for any number of clips."""
    clips = torch.export.Dim("clips", min=2)
    shapes = [[{0: clips}] * len(inputs[0]), [{0: clips}] * len(inputs[1])]
    return torch.export.export(head, inputs, dynamic_shapes=shapes, strict=strict).module()


def test_a_head_is_exported_for_any_number_of_clips(case):
    head, inputs, _ = case
    module = exported(head, inputs, strict=False)
    for given in (inputs, features(head, clips=5, seed=4)):
        torch.testing.assert_close(module(*given), head(*given), rtol=1e-5, atol=1e-5)


def test_a_decoder_is_exported_strictly(decoder):
    head, inputs, _ = decoder
    module = exported(head, inputs, strict=True)
    other = features(head, clips=5, seed=4)
    torch.testing.assert_close(module(*other), head(*other), rtol=1e-5, atol=1e-5)


def test_an_exported_decoder_is_saved_without_this_package(decoder, tmp_path):
    head, inputs, expected = decoder
    torch.export.save(torch.export.export(head.eval(), inputs), tmp_path / "head.pt2")
    head.train()
    loaded = torch.export.load(tmp_path / "head.pt2")
    torch.testing.assert_close(loaded.module()(*inputs), expected[0], rtol=1e-5, atol=1e-5)
    assert "evl_cache" not in loaded.graph_module.code


def test_traced_operations_are_those_of_the_features_and_no_constants(case):
    head, inputs, _ = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and warns of every branch
        traced = [torch.jit.trace(head, inputs)]
    traced += [make_fx(lambda *given: head(*given), pre_dispatch=early)(*inputs) for early in (False, True)]
    for trace in traced:
        other = features(head, seed=7)
        torch.testing.assert_close(trace(*other), head(*other), rtol=1e-5, atol=1e-5)


# Fake tensors, modes and classes of tensors


def test_a_head_runs_on_fake_tensors(case):
    head, inputs, expected = case
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [[mode.from_tensor(t) for t in part] for part in inputs]
        assert head(*fake).shape == expected[0].shape
        head(*inputs).sum().backward()  # real tensors in the mode
    head.zero_grad()


def test_a_fake_head_has_the_shapes_of_a_real_one():
    with FakeTensorMode():
        fake = build_head("decoder2", num_layers=2, **SIZES)
        fake([torch.randn(3, 3, 5, 16)] * 2, [torch.rand(3, 2, 2, 4, 4)] * 2).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in fake.parameters())
    assert fake.workspace._spare == []


def test_a_head_on_the_meta_device_has_the_shapes_and_gradients_of_a_real_one():
    for name in NAMES:
        head = new_head(name).to("meta")
        inputs = [[t.to("meta") for t in part] for part in features(new_head(name))]
        logits = head(*inputs)
        logits.sum().backward()
        assert logits.shape == (3, 4) and all(p.grad.shape == p.shape for p in head.parameters()), name


def test_functional_tensors_pass_and_leave_nothing_behind(decoder):
    head, inputs, expected = decoder
    torch.testing.assert_close(functionalize(lambda *given: head(*given))(*inputs), expected[0])
    with FunctionalTensorMode():
        wrapped = [[FunctionalTensor.to_functional(t) for t in part] for part in inputs]
        assert type(head(*wrapped)) is FunctionalTensor


class Marked(torch.Tensor):
    """A class of its own, as many libraries have one."""


def test_tensors_of_another_class_give_what_ordinary_ones_give(case):
    head, inputs, expected = case
    marked = [[t.as_subclass(Marked) for t in part] for part in inputs]
    logits, gradients = results(head, marked)
    assert_same((logits.as_subclass(torch.Tensor), gradients), expected)


def test_a_mode_sees_the_operations_of_all_clips(decoder):
    from torch.utils.flop_counter import FlopCounterMode

    head, *_ = decoder
    counts = []
    for clips in (4, 8):
        with FlopCounterMode(display=False) as counter:
            head(*features(head, clips=clips))
        counts.append(counter.get_total_flops())
    # The tokens and maps of every clip: two products of each attention head, and one of each direction of motion.
    assert counts[1] - counts[0] > 4 * 2 * (2 * 2 * 2 * 15 * 16 + 2 * 2 * 2 * 4 * 4 * 16)


def test_a_workspace_keeps_and_serves_ordinary_memory_alone():
    workspace, cpu = Workspace(), torch.device("cpu")
    mine = workspace.take((2, 3), torch.float32, cpu)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(mine)
        workspace.give_back(fake, torch.empty(2, 3))
        assert workspace._spare == []
        workspace._spare.append(mine)
        assert type(workspace.take((2, 3), torch.float32, cpu)) is not torch.Tensor
    assert workspace._spare == [mine]  # and what was there still is
    workspace._spare.clear()
    with torch.inference_mode():
        inference = torch.empty(2, 3)
    workspace.give_back(
        fake,
        torch.empty(2, 3).as_subclass(Marked),
        torch.empty(2, 3, device="meta"),
        torch.empty(3, 2).t(),
        torch.empty(0),
        inference,
    )
    assert workspace._spare == []
    vmap(lambda t: workspace.give_back(t) or t)(torch.empty(2, 3))
    assert workspace._spare == []
    workspace.give_back(mine)
    with torch.inference_mode():
        taken = workspace.take((3, 2), torch.float32, cpu)
        assert taken.data_ptr() == mine.data_ptr() and not taken.is_inference()
        assert not workspace.take((3, 2), torch.float32, cpu).is_inference()
    workspace.give_back(mine)
    assert workspace.take((2, 3), torch.float64, cpu).dtype == torch.float64
    assert workspace.take((2, 3), torch.float32, torch.device("meta")).device.type == "meta"


def test_layer_tokens_keep_what_a_later_reader_can_use():
    layer = LayerTokens(quantize_tokens(torch.randn(2, 3, 5, 16)))
    expected = LayerTokens(layer.stored).values
    vmap(lambda t: t + layer.values.sum())(torch.zeros(2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer.values.shape == (2, 3, 5, 16)
    assert not layer.has_values
    with torch.inference_mode():
        assert layer.values is layer.values and layer.unit.is_inference()
    assert not layer.values.is_inference() and torch.equal(layer.values, expected)
    weight = torch.ones(16, requires_grad=True)
    (layer.unit * weight).sum().backward()  # an inference tensor could not be kept for this


# Wrappers


def test_a_copied_head_is_the_head(case):
    head, inputs, expected = case
    other = copy.deepcopy(head)
    assert_unspoiled(other, inputs, expected)
    results(other, features(other, clips=2))


@pytest.mark.parametrize("is_saved", [False, True], ids=["recomputed", "saved elsewhere"])
def test_a_head_under_saved_tensor_hooks_is_the_head(case, is_saved):
    head, inputs, expected = case
    with torch.autograd.graph.save_on_cpu() if is_saved else nullcontext():
        model = head if is_saved else lambda *given: checkpoint(head, *given, use_reentrant=False)
        assert_same(results(head, inputs, model), expected, tolerance=1e-6)


@pytest.mark.filterwarnings(
    "ignore:Grad strides do not match bucket view strides"
)  # of a convolution's gradient
def test_a_head_wrapped_for_several_processes_is_the_head(case):
    head, inputs, expected = case
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(head)
        assert_same(results(head, inputs, wrapped), expected, tolerance=1e-6)
        del wrapped
    finally:
        dist.destroy_process_group()


# Transforms and second derivatives


def test_gradients_of_single_clips_add_up(case):
    head, inputs, _ = case

    def loss(parameters, tokens, maps):
        one = [[t[None] for t in part] for part in (tokens, maps)]
        return functional_call(head, parameters, tuple(one)).square().sum()

    parameters = {name: p.detach() for name, p in head.named_parameters()}
    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, *inputs)
    head.zero_grad()
    head(*inputs).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert len(each[name]) == 3
        torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-4)


def test_forward_and_backward_differentiation_agree():
    for name in NAMES:
        head = new_head(name, torch.float64)
        inputs = features(head)
        along = [torch.ones_like(t) for t in inputs[0]]
        logits, slope = jvp(lambda tokens, h=head, m=inputs[1]: h(tokens, m), (inputs[0],), (along,))
        tokens = [t.requires_grad_() for t in inputs[0]]
        found = torch.autograd.grad(head(tokens, inputs[1]).sum(), tokens)
        torch.testing.assert_close(slope.sum(), sum((f * a).sum() for f, a in zip(found, along, strict=True)))
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(t.detach(), a) for t, a in zip(tokens, along, strict=True)]
            torch.testing.assert_close(forward_ad.unpack_dual(head(dual, inputs[1])).tangent, slope)
        assert logits.shape == (3, 4)


def second_derivatives(model, tokens, maps):
    """The gradient of a gradient's square, of tokens, maps and parameters."""
    inputs = [t.detach().clone().requires_grad_() for t in (*tokens, *maps)]
    everything = [*inputs, *model.parameters()]
    logits = model(inputs[: len(tokens)], inputs[len(tokens) :])
    first = torch.autograd.grad(logits.square().sum(), everything, create_graph=True, allow_unused=True)
    total = sum(g.square().sum() for g in first if g is not None)
    return torch.autograd.grad(total, everything, allow_unused=True)


def test_second_derivatives_are_the_plain_twins():
    head = new_head("decoder2", torch.float64)
    inputs = features(head)
    with sdpa_kernel(SDPBackend.MATH):  # the twin's attention is torch's
        found, expected = (second_derivatives(model, *inputs) for model in (head, PlainHead(head)))
    names = [*range(4), *(name for name, _ in head.named_parameters())]
    by_name = dict(
        zip([*range(4), *(n for n, _ in PlainHead(head).named_parameters())], expected, strict=True)
    )
    for name, value in zip(names, found, strict=True):
        theirs = by_name[name]
        if value is None or theirs is None:
            assert not any(v is not None and v.abs().max() > 1e-9 for v in (value, theirs)), name
        else:
            torch.testing.assert_close(value, theirs, rtol=1e-8, atol=1e-8, msg=str(name))


def test_tokens_of_two_layers_that_are_one_tensor_have_each_layers_share():
    head = new_head("decoder2", torch.float64)
    (tokens, _), maps = features(head)
    found = []
    with sdpa_kernel(SDPBackend.MATH):
        for model in (head, PlainHead(head)):
            shared = tokens.clone().requires_grad_()
            loss = model([shared, shared], maps).square().sum()
            (first,) = torch.autograd.grad(loss, shared, create_graph=True)
            found.append((first.detach(), *torch.autograd.grad(first.square().sum(), shared)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def test_second_derivatives_of_a_step_in_lower_precision_run(decoder):
    head, inputs, _ = decoder
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert any(g is not None and g.abs().sum() > 0 for g in second_derivatives(head, *inputs))
    head.zero_grad()


@pytest.mark.parametrize("name", FUSED)
def test_second_derivatives_of_fused_attention_are_refused_in_a_line_and_have_a_way(name):
    head = new_head(name)
    inputs = features(head)
    with pytest.raises(RuntimeError, match=r"derivative for aten::_scaled_dot_product.* is not implemented"):
        second_derivatives(head, *inputs)
    with sdpa_kernel(SDPBackend.MATH):
        assert any(g is not None and g.abs().sum() > 0 for g in second_derivatives(head, *inputs))


def test_curvature_by_transforms_is_that_of_autograd(case):
    head, inputs, _ = case

    def loss(query):
        name = next(name for name, _ in head.named_parameters())
        return functional_call(head, {name: query}, tuple(inputs)).square().sum()

    first = next(head.parameters()).detach()
    if first.numel() > 64:
        pytest.skip("a large matrix")
    found = hessian(loss)(first)
    assert found.shape == (*first.shape, *first.shape) and bool(found.isfinite().all())


def test_many_gradients_at_once_are_each_of_them(decoder):
    head, inputs, _ = decoder
    parameters = list(head.parameters())
    logits = head(*inputs)
    each = torch.eye(logits.numel()).view(-1, *logits.shape)
    many = torch.autograd.grad(logits, parameters, each, is_grads_batched=True, retain_graph=True)
    for number, gradient in enumerate(each):
        for all_of_them, one in zip(
            many, torch.autograd.grad(logits, parameters, gradient, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(all_of_them[number], one, rtol=1e-4, atol=1e-5)
