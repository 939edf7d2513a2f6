"""What a fused network packed follows every change of the model, and every call that is unlike the last."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from networks import TOLERANCE, check, error, fused, images, plain, settled
from torch import Tensor, nn

import mnv2_fused
from mnv2_fused import InvertedResidual, MobileNetV2, network

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------- the packed weights follow every change


def step(model: MobileNetV2, optimizer: torch.optim.Optimizer) -> None:
    """A step in eval mode: the parameters change, the statistics do not."""
    nn.functional.cross_entropy(model(images(4, 32, 32)), torch.arange(4)).backward()
    optimizer.step()


def in_place(model: MobileNetV2) -> None:
    with torch.no_grad():
        model.features[3].conv[0][0].weight.mul_(1.5)


def in_inference_mode(model: MobileNetV2) -> None:
    with torch.inference_mode():
        model.features[3].conv[0][0].weight.mul_(1.5)


def set_storage(model: MobileNetV2) -> None:
    with torch.no_grad():
        weight = model.features[3].conv[0][0].weight
        weight.set_(weight * 1.5)


def new_data(model: MobileNetV2) -> None:
    weight = model.features[3].conv[0][0].weight
    weight.data = weight.data * 1.5


def new_offset(model: MobileNetV2) -> None:
    """Another part of the same storage."""
    weight = model.features[3].conv[0][0].weight
    one, other = torch.cat([weight.detach(), weight.detach() * 1.5]).split(len(weight))
    weight.data = one
    with torch.no_grad():
        model(images(1, 32, 32)), model(images(1, 32, 32))
    weight.data = other


def swap_tensors(model: MobileNetV2) -> None:
    weight = model.features[3].conv[0][0].weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 1.5))


def new_parameter(model: MobileNetV2) -> None:
    conv = model.features[3].conv[0][0]
    conv.weight = nn.Parameter(conv.weight.detach() * 1.5)


def new_buffer(model: MobileNetV2) -> None:
    bn = model.features[6].conv[3]
    bn.running_mean = bn.running_mean + 1


def statistics_in_place(model: MobileNetV2) -> None:
    model.features[6].conv[1][1].running_var.mul_(3)


def epsilon(model: MobileNetV2) -> None:
    model.features[9].conv[3].eps = 1.0


def add_bias(model: MobileNetV2) -> None:
    conv = model.features[2].conv[2]
    conv.bias = nn.Parameter(torch.randn(conv.out_channels))


def no_affine(model: MobileNetV2) -> None:
    bn = model.features[2].conv[3]
    bn.weight = bn.bias = None


def channels_last(model: MobileNetV2) -> None:
    model.to(memory_format=torch.channels_last)
    in_place(model)


def load(model: MobileNetV2) -> None:
    model.load_state_dict(settled(seed=5).state_dict())


def load_assigned(model: MobileNetV2) -> None:
    model.load_state_dict(settled(seed=5).state_dict(), assign=True)


def sgd(model: MobileNetV2) -> None:
    step(model, torch.optim.SGD(model.parameters(), 1e-3, foreach=False))


def sgd_foreach(model: MobileNetV2) -> None:
    step(model, torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, foreach=True))


def sgd_fused(model: MobileNetV2) -> None:
    step(model, torch.optim.SGD(model.parameters(), 1e-3, fused=True))


def adam_fused(model: MobileNetV2) -> None:
    step(model, torch.optim.Adam(model.parameters(), 1e-3, fused=True))


def rmsprop(model: MobileNetV2) -> None:
    step(model, torch.optim.RMSprop(model.parameters(), 1e-4))


def training_epoch(model: MobileNetV2) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(3):
        nn.functional.cross_entropy(model(images(8, 96, 96)), torch.arange(8)).backward()
        optimizer.step()
    model.eval()


def only_statistics(model: MobileNetV2) -> None:
    model.train()
    with torch.no_grad():
        model(images(8, 64, 64) + 1)
    model.eval()


def new_linear(model: MobileNetV2) -> None:
    model.classifier[1] = nn.Linear(1280, 10)


def new_classifier(model: MobileNetV2) -> None:
    model.classifier = nn.Sequential(nn.Linear(1280, 7, bias=False))


def bare_linear(model: MobileNetV2) -> None:
    model.classifier = nn.Linear(1280, 3)


def reset(model: MobileNetV2) -> None:
    model.reset_classifier(7)


def reset_to_none(model: MobileNetV2) -> None:
    model.reset_classifier(0)


def new_block(model: MobileNetV2) -> None:
    model.features[5] = settled(seed=9).features[5]


def another_block(model: MobileNetV2) -> None:
    model.features[5] = InvertedResidual(16, 16, 1, 3).eval()


def fewer_blocks(model: MobileNetV2) -> None:
    del model.features[5]


def ema_swap(model: MobileNetV2) -> None:
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(settled(seed=4))
    model.load_state_dict(average.module.state_dict())


def kaiming(model: MobileNetV2) -> None:
    nn.init.kaiming_normal_(model.features[4].conv[2].weight)


CHANGES: tuple[Callable[[MobileNetV2], None], ...] = (
    in_place, in_inference_mode, set_storage, new_data, new_offset, swap_tensors, new_parameter, new_buffer,
    statistics_in_place, epsilon, add_bias, no_affine, channels_last, load, load_assigned, sgd, sgd_foreach, sgd_fused,
    adam_fused, rmsprop, training_epoch, only_statistics, new_linear, new_classifier, bare_linear, reset, reset_to_none,
    new_block, another_block, fewer_blocks, ema_swap, kaiming,
)  # fmt: skip


@pytest.fixture(params=["direct", "plain"])
def watch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are noticed by torch's and Python's insides, and where these are not as known by asking."""
    monkeypatch.setattr(network._C, "Watch", partial(network._C.Watch, plain=request.param == "plain"))


@pytest.mark.usefixtures("watch")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_follows(change: Callable[[MobileNetV2], None]) -> None:
    model, x = settled(), images(2, 32, 32)
    before = check(model, x)
    change(model)
    after = check(model, x)
    assert after.shape != before.shape or error(after, before) > 1e-3
    with torch.no_grad():
        features = model.forward_features(x)
        model.fused = False
        assert error(features, model.forward_features(x)) < TOLERANCE


@pytest.mark.usefixtures("watch")
def test_follows_every_tensor() -> None:
    """Each parameter and statistic in turn, changed in place and put back."""
    model, x = settled(), images(1, 32, 32)
    before = fused(model, x)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point():
            continue
        with torch.no_grad():
            saved = tensor.clone()
            tensor.mul_(1.5).add_(0.1)
            after = fused(model, x)
            assert error(after, before) > 1e-4, name
            tensor.copy_(saved)
        assert torch.equal(fused(model, x), before), name


def test_follows_every_epsilon() -> None:
    model, x = settled(), images(1, 32, 32)
    for name, bn in model.named_modules():
        if isinstance(bn, nn.BatchNorm2d):
            before = fused(model, x)
            bn.eps = 0.5
            assert error(fused(model, x), before) > 1e-4, name


def test_follows_dtypes() -> None:
    model, x = settled(), images(2, 40, 40)
    before = check(model, x)
    model.to(torch.float64)
    assert error(fused(model, x.double()), plain(model, x)) < 1e-13
    with pytest.raises(RuntimeError, match="(?i)float|double"):
        model(x)
    assert torch.equal(fused(model.float(), x), before)
    model.bfloat16()
    assert fused(model, x.bfloat16()).dtype == torch.bfloat16
    with torch.no_grad():
        assert "the input is torch.float32, the weights are torch.bfloat16" in model.why_not_fused(x)
        model.half()
        assert model.why_not_fused(x.half()) != ""
        assert torch.equal(model(x.half()), plain(model, x, torch.float16))


def test_follows_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = settled(), images(2, 40, 40)
    for row in mnv2_fused.kernels():
        if row.supported and row.dtype == torch.float32:
            monkeypatch.setenv("MNV2_FUSED_KERNEL", row.name)
            check(model, x)
    for name in ("scalar_f64", "no_such_row"):
        monkeypatch.setenv("MNV2_FUSED_KERNEL", name)
        with pytest.raises(ValueError, match=name), torch.no_grad():
            model(x)


def test_copies_are_independent() -> None:
    model, x = settled(), images(2, 32, 32)
    before = fused(model, x)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ]
    for other in copies:
        assert torch.equal(fused(other, x), before)
    for other in (copies[0], *copies[2:]):  # copy.copy shares the modules
        in_place(other)
        assert error(check(other, x), before) > 1e-3
        assert torch.equal(fused(model, x), before)
    in_place(model)
    for one in (model, copies[1]):
        assert error(check(one, x), before) > 1e-3


def test_pickle_holds_no_packed_weights() -> None:
    model = settled()
    size = len(pickle.dumps(model))
    fused(model, images(1, 32, 32))
    assert len(pickle.dumps(model)) == size


def test_shared_blocks() -> None:
    """A block that stands in two models: both follow it."""
    one, two, x = settled(), settled(seed=1), images(1, 32, 32)
    two.features[5] = one.features[5]
    before = check(one, x), check(two, x)
    with torch.no_grad():
        one.features[5].conv[2].weight.mul_(3)
    for model, y in zip((one, two), before, strict=True):
        assert error(check(model, x), y) > 1e-3


def test_model_made_in_inference_mode() -> None:
    x = images(1, 32, 32)
    with torch.inference_mode():
        model = settled()
        before = model(x)
        assert torch.equal(model(x), before)
        model.features[3].conv[0][0].weight.mul_(1.5)
        assert error(model(x), before) > 1e-3
    other = settled()
    in_place(other)
    with torch.inference_mode():
        assert error(model(x), plain(other, x)) < TOLERANCE


def test_functional_call() -> None:
    model, other, x = settled(), settled(seed=1), images(1, 32, 32)
    before = fused(model, x)
    with torch.no_grad():
        y = torch.func.functional_call(model, other.state_dict(), (x,))
    assert error(y, plain(other, x)) < TOLERANCE
    assert torch.equal(fused(model, x), before)


def test_python_threads() -> None:
    """The first call after a change, and all others, from several Python threads at once."""
    model, xs = settled(), [images(1, 32, 32), images(3, 40, 33), images(2, 65, 33)]
    barrier = threading.Barrier(4)

    def calls(first: int) -> list[tuple[int, Tensor]]:
        barrier.wait()
        order = [(first + i) % 3 for i in range(9)]
        with torch.inference_mode():
            return [(i, model(xs[i]).clone()) for i in order]

    for _ in range(5):
        in_place(model)
        with ThreadPoolExecutor(4) as pool:
            results = [pair for pairs in pool.map(calls, range(4)) for pair in pairs]
        right = [check(model, x) for x in xs]
        assert all(torch.equal(y, right[i]) for i, y in results)


# ------------------------------------------------------------------------------------------------------ calls in a row


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Whom a call asked one thing after the other whether it can run fused, and not in one step."""
    found: list[nn.Module] = []
    prepare = network.FusedChain._prepare

    def record(self: network.FusedChain, root: nn.Module, x: Tensor) -> Any:
        found.append(root)
        return prepare(self, root, x)

    monkeypatch.setattr(network.FusedChain, "_prepare", record)
    return found


def no_grad_call(model: MobileNetV2, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def after_calls_in_a_row(
    call: Callable[[MobileNetV2, Tensor], object], asked: list[nn.Module]
) -> tuple[MobileNetV2, Tensor]:
    """A network, and an image for which calls of this kind are answered in one step now."""
    model, x = settled(), images(1, 32, 32)
    call(model, x), call(model, x)
    asked.clear()
    call(model, x)
    assert not asked
    return model, x


def test_calls_in_a_row_ask_once(asked: list[nn.Module]) -> None:
    """Whatever the batch and the size; and anew where the mode, the weights or hooks anywhere are others."""
    model, x = settled(), images(2, 32, 32)
    asked.clear()
    calls = (x, x, images(3, 32, 32), images(1, 40, 56), x.contiguous(memory_format=torch.channels_last))
    for given in calls:
        assert error(no_grad_call(model, given), plain(model, given)) < TOLERANCE
    assert asked == [model]
    with torch.inference_mode():
        y = model(x)
        assert len(asked) == 2 and torch.equal(model(x), y) and len(asked) == 2
    no_grad_call(model, x)
    asked.clear()
    with torch.no_grad():
        model.classifier[1].bias.add_(1)
    assert error(no_grad_call(model, x), y + 1) < TOLERANCE and error(no_grad_call(model, x), y + 1) < TOLERANCE
    assert len(asked) == 1
    nn.Linear(1, 1).register_forward_hook(print).remove()
    no_grad_call(model, x), no_grad_call(model, x)
    assert len(asked) == 2


def autocast_call(model: MobileNetV2, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    return y


def test_autocast_calls_in_a_row_ask_once(asked: list[nn.Module]) -> None:
    """As those without; the image is rounded to the same numbers."""
    model, x = settled(), images(2, 32, 32)
    asked.clear()
    calls = (x, x, images(3, 32, 37), images(1, 40, 56), x.contiguous(memory_format=torch.channels_last))
    for given in calls:
        y = autocast_call(model, given)
        assert torch.equal(y, autocast_call(copy.deepcopy(model), given.bfloat16()))
    assert asked.count(model) == 1
    with torch.no_grad():
        model.classifier[1].bias.add_(1)
    assert error(autocast_call(model, x), autocast_call(copy.deepcopy(model), x).double()) == 0
    assert asked.count(model) == 2


@pytest.mark.parametrize("call", [no_grad_call, autocast_call], ids=lambda call: call.__name__)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_calls_in_a_row_follow(
    change: Callable[[MobileNetV2], None], call: Callable[[MobileNetV2, Tensor], Tensor]
) -> None:
    """What a model that has just been packed gives."""
    model, x = settled(), images(1, 32, 32)
    before = [call(model, x) for _ in range(3)][-1]
    change(model)
    with torch.no_grad():
        after = call(model, x)
    assert torch.equal(after, call(copy.deepcopy(model), x))
    assert after.shape != before.shape or not torch.equal(after, before)


def test_what_is_compared_is_known_here() -> None:
    """Words of memory; without, every call would ask Python for hundreds of attributes."""
    model = settled()
    no_grad_call(model, images(1, 32, 32))
    tensors = len(list(model.parameters())) + len(list(model.buffers()))
    assert model._chain._packing._watch.words > 3 * tensors


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The images of the calls that went through torch's dispatcher."""
    found: list[Tensor] = []
    op = torch.ops.mnv2_fused.network.default

    def record(x: Tensor, *rest: Any) -> Tensor:
        found.append(x)
        return op(x, *rest)

    monkeypatch.setattr(network, "_NETWORK", record)
    return found


@pytest.mark.parametrize("call", [no_grad_call, autocast_call], ids=lambda call: call.__name__)
def test_calls_in_a_row_are_direct(dispatched: list[Tensor], call: Callable[[MobileNetV2, Tensor], Tensor]) -> None:
    """Kernels alone, unless somebody looks at ops, or the image is more than its memory."""
    model, x = settled(), images(1, 32, 32)
    y = [call(model, x) for _ in range(3)]
    assert len(dispatched) == 1 and torch.equal(y[0], y[2])
    assert not y[2].requires_grad and y[2]._version == 0 and type(y[2]) is Tensor
    with torch.inference_mode():
        y = [call(model, x) for _ in range(3)]
    assert len(dispatched) == 2 and y[2].is_inference()

    call(model, x), call(model, x)
    dispatched.clear()
    with torch.profiler.profile() as profile:
        call(model, x)
    assert len(dispatched) == 1 and "mnv2_fused::network" in {event.key for event in profile.key_averages()}
    with torch.overrides.BaseTorchFunctionMode():
        call(model, x)
    assert len(dispatched) == 2
    with torch.utils.flop_counter.FlopCounterMode(display=False) as first:
        call(model, x)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as second:
        call(model, x), call(model, x)
    assert 2 * first.get_total_flops() == second.get_total_flops() > 0
    call(model, x), call(model, x)
    assert torch.equal(call(model, torch._neg_view(x)), call(model, -x))


def test_calls_in_a_row_of_one_size(asked: list[nn.Module]) -> None:
    """Where the padding depends on the image, other sizes ask."""
    model, x = settled(padding="same"), images(2, 32, 32)
    asked.clear()
    for given in (x, x, images(1, 32, 32), images(1, 33, 45), images(1, 33, 45), x):
        assert error(no_grad_call(model, given), plain(model, given)) < TOLERANCE
    assert asked == [model] * 3


def half_autocast_call(model: MobileNetV2, x: Tensor) -> None:
    with torch.autocast("cpu", torch.float16):
        assert model(x).dtype == torch.float16


@pytest.mark.parametrize("call", [half_autocast_call, no_grad_call], ids=lambda call: call.__name__)
def test_another_call_after_autocast_calls_in_a_row(
    asked: list[nn.Module], call: Callable[[MobileNetV2, Tensor], None]
) -> None:
    model, x = after_calls_in_a_row(autocast_call, asked)
    with torch.no_grad():
        call(model, x)
    assert asked


def gradient_call(model: MobileNetV2, x: Tensor) -> None:
    with torch.enable_grad():
        assert model(x).requires_grad


def vmap_call(model: MobileNetV2, x: Tensor) -> None:
    y = torch.vmap(model)(torch.stack([x, x + 1]))
    assert error(y[:, 0], torch.cat([plain(model, x), plain(model, x + 1)])) < TOLERANCE


def dual_call(model: MobileNetV2, x: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        y = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None


def traced_call(model: MobileNetV2, x: Tensor) -> None:
    graph = str(torch.jit.trace(model, x, check_trace=False).inlined_graph)
    assert "aten::_convolution" in graph and "mnv2_fused::" not in graph


def compiled_call(model: MobileNetV2, x: Tensor) -> None:
    torch._dynamo.reset()
    assert error(torch.compile(model, backend="eager", fullgraph=True)(x), plain(model, x)) < TOLERANCE


def hooked_call(model: MobileNetV2, x: Tensor) -> None:
    fired = []
    handle = model.features[3].register_forward_hook(lambda *_: fired.append(1))
    model(x)
    handle.remove()
    assert fired == [1]


def globally_hooked_call(model: MobileNetV2, x: Tensor) -> None:
    fired = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: fired.append(type(module)))
    model(x)
    handle.remove()
    assert fired.count(nn.Conv2d) == 52


def subclass_call(model: MobileNetV2, x: Tensor) -> None:
    class Image(Tensor):
        pass

    assert type(model(x.as_subclass(Image))) is Image


def meta_call(model: MobileNetV2, x: Tensor) -> None:
    with pytest.raises(RuntimeError):
        model(x.to("meta"))


def double_call(model: MobileNetV2, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="(?i)float|double"):
        model(x.double())


def gray_call(model: MobileNetV2, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="channels"):
        model(x[:, :1])


def single_image_call(model: MobileNetV2, x: Tensor) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        model(x[0])


def volume_call(model: MobileNetV2, x: Tensor) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        model(x[..., None])


def empty_image_call(model: MobileNetV2, x: Tensor) -> None:
    with pytest.raises(RuntimeError):
        model(x[..., :0])


def training_call(model: MobileNetV2, x: Tensor) -> None:
    x = torch.cat([x, x + 1])
    y = model.train()(x)
    assert error(y, model.eval()(x)) > 1e-3  # statistics of the batch


def unfused_call(model: MobileNetV2, x: Tensor) -> None:
    model.fused = False
    assert torch.equal(model(x), plain(model, x, torch.float32))


def replica_call(model: MobileNetV2, x: Tensor) -> None:
    replica = copy.copy(model)
    replica._is_replica = True
    assert error(replica(x), plain(model, x)) < TOLERANCE


OTHER_CALLS = (
    autocast_call, half_autocast_call, gradient_call, vmap_call, dual_call, traced_call, compiled_call, hooked_call,
    globally_hooked_call, subclass_call, meta_call, double_call, gray_call, single_image_call, volume_call,
    empty_image_call, training_call, unfused_call, replica_call,
)  # fmt: skip


@pytest.mark.parametrize("call", OTHER_CALLS, ids=lambda call: call.__name__)
def test_another_call_after_calls_in_a_row(asked: list[nn.Module], call: Callable[[MobileNetV2, Tensor], None]) -> None:
    """Is not taken for one like them."""
    model, x = after_calls_in_a_row(no_grad_call, asked)
    with torch.no_grad():
        call(model, x)
    assert asked or call in (compiled_call, unfused_call)  # told apart before


def test_calls_in_a_row_see_the_kernel(asked: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = after_calls_in_a_row(no_grad_call, asked)
    monkeypatch.setenv("MNV2_FUSED_KERNEL", "scalar_f32")
    y = no_grad_call(model, x)
    assert torch.equal(no_grad_call(model, x), y) and len(asked) == 1
    monkeypatch.setenv("MNV2_FUSED_KERNEL", "scalar_f64")
    with pytest.raises(ValueError, match="scalar_f64"):
        no_grad_call(model, x)
