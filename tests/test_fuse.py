"""fuse(): networks as several libraries write them compute what they did, on our ops, and stay what they were."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import NETS, Net, logits_of, with_statistics

from mnv2_fused import FuseReport, InvertedResidual, MobileNetV2, fuse, unfuse
from mnv2_fused.recognition import is_depthwise

KINDS = ["stand-in", "real"]
by_name = {net.name: net for net in NETS}


def build(net: Net, kind: str, width: float = 0.35) -> nn.Module:
    if kind == "real" and net.real is None:
        pytest.skip(f"{net.name} is a repository and no package: the stand-in alone")
    model = (net.stand_in if kind == "stand-in" else net.real)(width)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # the libraries differ in that
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return model


def ops_of(call: Callable[[], Any]) -> dict[str, int]:
    """How often each of our ops ran in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    found: dict[str, int] = {}
    for event in profile.events():
        if event.name.startswith("mnv2_fused::"):
            name = event.name.removeprefix("mnv2_fused::")
            found[name] = found.get(name, 0) + 1
    return found


def error(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


# --------------------------------------------------------------------------------------------- the same, and faster


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_outputs_of_eval_mode(net: Net, kind: str) -> None:
    """To 2e-5, at even and odd sizes; a whole network is one op call."""
    model = with_statistics(build(net, kind), torch.randn(8, 3, 64, 64))
    original = copy.deepcopy(model)
    fused, report = fuse(model, report=True)
    assert fused is model and report.unfused == []
    chains = 1 if net.whole else 5  # the stages of several blocks
    assert len(report) == net.parts + chains
    for size in [(64, 64), (65, 33), (50, 71), (1, 1)]:
        x = torch.randn(3, 3, *size)
        with torch.no_grad():
            expected, result = original(x), model(x)
        assert type(result) is type(expected)
        assert error(logits_of(result), logits_of(expected)) < 2e-5, size
    with torch.no_grad():
        assert ops_of(lambda: model(x)) == {"network": 1 if net.whole else 7}  # or one for each stage
        assert not net.whole or model.why_not_fused(x) == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_training(net: Net, kind: str) -> None:
    """20 steps give the same parameters and statistics, in float64 to its rounding; blocks run as ops.

    Steps are small: a ReLU6 whose input is next to 0 or 6 makes differences grow, at a rate of 0.01 tenfold a step.
    """
    original = build(net, kind, width=0.1 if kind == "stand-in" else 0.35).double().train()
    for module in original.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    start = copy.deepcopy(original.state_dict())
    model = fuse(copy.deepcopy(original))
    images = torch.randn(20, 4, 3, 64, 64, dtype=torch.float64)
    for each in (original, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=1e-4, momentum=0.9)
        for x in images:
            optimizer.zero_grad()
            F.cross_entropy(logits_of(each(x)), torch.arange(4)).backward()
            optimizer.step()
    moved = [error(tensor, start[name]) for name, tensor in original.state_dict().items()]
    assert max(moved) > 0.01
    for (name, found), expected in zip(model.state_dict().items(), original.state_dict().values(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8), name
    ran = ops_of(lambda: logits_of(model(images[0])).sum().backward())
    assert ran["block_train"] == ran["block_train_backward"] == 17
    assert ran.get("conv_bn_relu6", 0) == (0 if "timm" in net.name else 2)  # timm has no modules around its other two


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_stand_ins(net: Net) -> None:
    """They have the real networks' keys, in their order, and their results."""
    real, stand_in = build(net, "real"), build(net, "stand-in")
    keys = {name: tensor.shape for name, tensor in real.state_dict().items()}
    assert list(keys.items()) == [(name, tensor.shape) for name, tensor in stand_in.state_dict().items()]
    stand_in.load_state_dict(with_statistics(real, torch.randn(4, 3, 64, 64)).state_dict())
    for size in [(64, 64), (65, 47)]:
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert torch.equal(logits_of(stand_in.eval()(x)), logits_of(real(x)))


def small(name: str = "torchvision", width: float = 0.35) -> nn.Module:
    return with_statistics(build(by_name[name], "stand-in", width), torch.randn(4, 3, 32, 32))


@pytest.mark.parametrize("name", ["torchvision", "timm", "transformers"])
def test_bfloat16(name: str) -> None:
    """Converted, and under autocast: as good as the modules are."""
    exact, x = small(name).double(), torch.randn(4, 3, 64, 64)
    model = fuse(copy.deepcopy(exact).float())
    plain = copy.deepcopy(exact).float()
    with torch.no_grad():
        expected = logits_of(exact(x.double()))
        with torch.autocast("cpu", torch.bfloat16):
            assert ops_of(lambda: model(x)) == {"pack": 1, "network": 1}
            errors = [error(logits_of(each(x)), expected) for each in (model, plain)]
        assert errors[0] < 1.5 * errors[1] + 0.01, errors
        model, plain = model.bfloat16(), plain.bfloat16()
        errors = [error(logits_of(each(x.bfloat16())), expected) for each in (model, plain)]
        assert errors[0] < 1.5 * errors[1] + 0.01, errors


# ------------------------------------------------------------------------------------------------ it stays what it was


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_what_stays(net: Net) -> None:
    model = build(net, "stand-in")
    parameters, keys, text = dict(model.named_parameters()), list(model.state_dict()), repr(model)
    kinds = [type(module) for module in model.modules()]
    attributes = [sorted(module.__dict__) for module in model.modules()]
    fuse(model)
    assert list(model.state_dict()) == keys and repr(model) == text
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))
    changed = sum(type(module) is not kind for module, kind in zip(model.modules(), kinds, strict=True))
    assert changed == len(fuse(model, report=True)[1].fused) > net.parts
    assert unfuse(model) is model
    assert [type(module) for module in model.modules()] == kinds
    assert [sorted(module.__dict__) for module in model.modules()] == attributes
    assert unfuse(model) is model  # once more is nothing more


@pytest.mark.parametrize("name", ["torchvision", "timm", "transformers"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_copies_are_fused(name: str, way: str) -> None:
    model, x = fuse(small(name)), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = logits_of(model(x))
        if way == "pickle":
            copied = pickle.loads(pickle.dumps(model))
        elif way == "deepcopy":
            copied = copy.deepcopy(model)
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            copied = torch.load(buffer, weights_only=False)
        assert ops_of(lambda: copied(x)) == {"network": 1, "pack": 1}
        assert torch.equal(logits_of(copied(x)), expected)
        next(copied.parameters()).zero_()
        assert torch.equal(logits_of(model(x)), expected)  # nothing is shared
        assert not torch.equal(logits_of(copied(x)), expected)
    copied.train()
    assert ops_of(lambda: copied(torch.randn(2, 3, 32, 32)))["block_train"] == 17
    assert type(unfuse(copied)) is type(small(name))


def test_hooks_on_blocks_fire_and_inside_they_stop_the_fusion() -> None:
    model, x, fired = small(), torch.randn(2, 3, 32, 32), []
    plain = copy.deepcopy(model)
    fuse(model)
    handle = model.features[3].register_forward_hook(lambda module, args, y: fired.append(y))
    with torch.no_grad():
        assert error(model(x), plain(x)) < 2e-5
        assert ops_of(lambda: model(x))["network"] == 19  # block by block, and stem and head
        assert len(fired) == 2 and error(fired[0], plain.features[:4](x)) < 2e-5
        handle.remove()
        assert ops_of(lambda: model(x)) == {"pack": 1, "network": 1}
        handle = model.features[3].conv[1][0].register_forward_hook(lambda *_: fired.append(1))
        assert error(model(x), plain(x)) < 2e-5 and fired[-1] == 1
        assert "hook" in model.features[3].why_not_fused(torch.randn(1, 8, 8, 8))
        assert model.features[4].why_not_fused(torch.randn(1, 8, 8, 8)) == ""
    hooked, report = fuse(copy.deepcopy(unfuse(model)), report=True)
    (left,) = report.unfused
    assert left.name == "features.3" and left.reason == "a hook inside, on conv.1.0"
    handle.remove()


def test_disabled_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = fuse(small()), torch.randn(2, 3, 32, 32)
    ours = MobileNetV2(width_mult=0.35).eval()
    with torch.no_grad():
        for each in (model, ours):
            monkeypatch.delenv("MNV2_FUSED_DISABLE", raising=False)
            assert ops_of(lambda each=each: each(x))["network"] == 1
            for value in ("1", "0"):
                monkeypatch.setenv("MNV2_FUSED_DISABLE", value)
                assert (ops_of(lambda each=each: each(x)) == {}) == (value == "1")
                assert ("MNV2_FUSED_DISABLE" in each.why_not_fused(x)) == (value == "1")
    monkeypatch.setenv("MNV2_FUSED_DISABLE", "1")
    assert ops_of(lambda: model.train()(x)) == {}


def test_calls_of_another_kind_are_left_alone() -> None:
    model = small("transformers")
    plain, x, labels = copy.deepcopy(model), torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    fuse(model)
    with torch.no_grad():
        assert ops_of(lambda: model(pixel_values=x)) == {"pack": 1, "network": 1}
        found, expected = model(pixel_values=x, labels=labels), plain(x, labels)
        assert list(found) == ["loss", "logits"] and error(found.loss, expected.loss) < 2e-5
        with pytest.raises(TypeError, match="images"):
            model(images=x)
        model.config.output_hidden_states = True  # which changes what a call returns
        found = model(x)
        assert list(found) == ["logits", "hidden_states"] and len(found.hidden_states) == 16
        model.config.output_hidden_states = False
        assert list(model(x)) == ["logits"]


def test_changes_after_fusing() -> None:
    """Of weights, modes, modules and attributes: results are always those of the modules as they are."""
    model, x = small(), torch.randn(2, 3, 33, 33)
    plain = copy.deepcopy(model)
    fuse(model)

    def changes(each: nn.Module) -> Any:
        yield
        each.features[0][0].weight.data.mul_(1.5)
        if each is model:
            model.repack()
            model.features[0].repack()
        yield
        each.features[2].conv[1][0].stride = (1, 1)
        yield
        each.features[2].conv[1][0].padding, each.features[2].conv[1][0].dilation = (2, 2), (2, 2)
        yield
        each.features[5].use_res_connect = False
        yield
        each.features[7].conv[2] = nn.Conv2d(each.features[7].conv[2].in_channels, 24, 1)
        torch.manual_seed(1)
        nn.init.normal_(each.features[7].conv[2].weight, std=0.1)
        nn.init.zeros_(each.features[7].conv[2].bias)
        yield
        each.features[9].conv[1][2] = nn.ReLU()  # which the kernels do not have
        yield
        each.classifier = nn.Sequential(nn.Linear(1280, 7).eval(), nn.Softmax(1))
        nn.init.constant_(each.classifier[0].weight, 0.01)
        nn.init.zeros_(each.classifier[0].bias)
        yield
        each.features[4].train()
        yield

    with torch.no_grad():
        for step, _ in enumerate(zip(changes(model), changes(plain), strict=True)):
            for _ in range(2):
                assert error(model(x), plain(x)) < 2e-5, step
    for name, buffer in plain.named_buffers():
        assert torch.allclose(model.get_buffer(name), buffer, rtol=1e-4, atol=1e-6), name


def test_synchronised_batch_norm() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(small()))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert ops_of(lambda: model(x))["network"] == 1
    assert ops_of(lambda: model.train()(x))["block_train"] == 17  # torch's own refuse to train on the CPU


def test_pieces_of_a_fused_sequential() -> None:
    model = small()
    plain = copy.deepcopy(model).features[2:5]
    x = torch.randn(1, 8, 16, 16)
    with torch.no_grad():
        piece = fuse(model.features)[2:5]  # a Sequential of the fused class, which is fused no more; its blocks are
        assert error(piece(x), plain(x)) < 2e-5


def test_replicas_run_unfused() -> None:
    """nn.DataParallel's, which share what is packed with their original."""
    model, x = fuse(small()), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        replica = model._replicate_for_data_parallel()
        assert error(replica(x), expected) < 2e-5


# ------------------------------------------------------------------------------------------------ what is recognised


class Functional(nn.Module):
    """The block in functions, with BatchNorms folded away, its layers out of order, its name of nothing."""

    def __init__(self, top: Callable[[Tensor], Tensor] = F.relu6, kernel: int = 3, gate: bool = False) -> None:
        super().__init__()
        self.last = nn.Conv2d(48, 8, 1)
        self.middle = nn.Conv2d(48, 48, kernel, padding=kernel // 2, groups=48)
        self.first = nn.Conv2d(8, 48, 1)
        self.gate = nn.Conv2d(48, 48, 1) if gate else None
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        h = self.top(self.middle(self.top(self.first(x))))
        if self.gate is not None:
            h = h * torch.sigmoid(self.gate(h.mean((2, 3), keepdim=True)))
        return torch.add(self.last(h), x)


@pytest.mark.parametrize(
    "top", [F.relu6, lambda x: x.clamp(0, 6), nn.Hardtanh(0, 6), nn.ReLU6(inplace=True), lambda x: x.clamp_(0, 6)]
)
def test_a_block_in_functions(top: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    block = Functional(top)
    x = torch.randn(2, 8, 9, 7, requires_grad=True)
    plain = copy.deepcopy(block)
    fused, report = fuse(block, report=True)
    assert [tuple(found) for found in report] == [("", "inverted residual", "")]
    with torch.no_grad():
        assert error(fused(x), plain(x)) < 1e-6 and ops_of(lambda: fused(x)) == {"network": 1}
        assert fused.training  # of which nothing in it makes a difference
    gradients = []
    for each in (fused, plain):
        each(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in each.parameters())])
        x.grad = None
    assert all(error(a, b) < 1e-5 for a, b in zip(*gradients, strict=True))
    assert ops_of(lambda: fused(x).sum().backward())["block_train_backward"] == 1


class Wrapped(nn.Module):
    """Any function of a block's result."""

    def __init__(self, block: nn.Module, after: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.block, self.after = block, after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.block(x))


class Shifted(nn.Module):
    """Changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Functional()

    def forward(self, x: Tensor) -> Tensor:
        return self.block.last(F.relu6(self.block.middle(F.relu6(self.block.first(x.add_(1))))))


class Hidden(Functional):
    """Looks at numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum().item() > 0 else x


def hooked() -> nn.Module:
    block = zoo.FlatBlock(8, 8, 1, 6)
    block.conv[3].register_forward_pre_hook(lambda *_: None)
    return block


def quantised() -> nn.Module:
    block = zoo.FlatBlock(8, 8, 1, 6)
    block.conv[2] = nn.Sequential(
        nn.ReLU6(), Wrapped(nn.Identity(), lambda x: torch.fake_quantize_per_tensor_affine(x, 0.02, 0, 0, 255))
    )
    return block


def pruned() -> nn.Module:
    block = zoo.FlatBlock(8, 8, 1, 6)
    nn.utils.parametrizations.weight_norm(block.conv[0])
    return block


def own_forward() -> nn.Module:
    block = Functional()
    block.forward = lambda x: Functional.forward(block, x)
    return block


REASONS = {
    "5x5": (lambda: Functional(kernel=5), "a 5x5 convolution, stride (1, 1), groups 48 before the projection"),
    "ReLU": (lambda: Functional(F.relu), "another activation than ReLU6: relu"),
    "Hardswish": (lambda: Functional(F.hardswish), "another activation than ReLU6: hardswish"),
    "clamp": (lambda: Functional(lambda x: x.clamp(0, 5)), "another activation than ReLU6: clamp(0, 5)"),
    "gate": (lambda: Functional(gate=True), "a product, as of squeeze-and-excitation"),
    "quantiser": (quantised, "a quantiser: fake_quantize_per_tensor_affine"),
    "hook": (hooked, "a hook inside, on 0.conv.3"),
    "weight norm": (pruned, "a weight that is computed"),
    "forward": (own_forward, "a forward that was set on the module itself"),
    "in place": (Shifted, "it changes its input in place (add_)"),
    "numbers": (Hidden, "its forward cannot be watched: RuntimeError: Tensor.item() cannot be called on meta tensors"),
    "stride 3": (lambda: zoo.FlatBlock(8, 16, 3, 6), "a 3x3 convolution, stride (3, 3)"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name: str) -> None:
    """Of blocks that are not fused; they compute what they did."""
    make, words = REASONS[name]
    torch.manual_seed(0)
    block = make().eval()
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        expected = block(x.clone())
    with pytest.warns(UserWarning, match="was found to fuse"):
        model, report = fuse(nn.Sequential(block), report=True)
    (found,) = report
    assert words in found.reason and "\n" not in found.reason, found
    assert found.reason in str(report) and "0 fused, 1 not" in str(report)
    with torch.no_grad():
        assert torch.equal(model(x.clone()), expected)


class Reversed(torch.autograd.Function):
    """A gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def written(h: Tensor) -> Tensor:
    h[:, :4] = 0
    return h


def through_data(h: Tensor) -> Tensor:
    h.data.mul_(0.1)
    return h


def through_a_list(h: Tensor) -> Tensor:
    torch._foreach_mul_([h], 0.1)
    return h


def without_gradients(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h * 1


TRICKS: dict[str, Callable[[Tensor], Tensor]] = {
    "a write into a part": written,
    "a write through .data": through_data,
    "a write through a list": through_a_list,
    "detached": Tensor.detach,
    "without gradients": without_gradients,
    "reversed gradients": Reversed.apply,
    "a constant": lambda h: h + 1,
    "float32": Tensor.float,
    "a crop": lambda h: F.pad(F.pad(h, (-1,) * 4), (1,) * 4),
}


class Tricky(nn.Module):
    """A block that does something more with its expansion."""

    def __init__(self, trick: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(8, 48, 1), nn.BatchNorm2d(48), nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.c = nn.Conv2d(48, 8, 1)
        self.trick = trick

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(F.relu6(self.b(self.trick(F.relu6(self.norm(self.a(x)))))))


@pytest.mark.filterwarnings("ignore:nothing in")
@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_nothing_is_missed(trick: str, train: bool) -> None:
    """Values, gradients and dtypes stay, whatever a forward does that is no layer."""
    torch.manual_seed(0)
    plain = Tricky(TRICKS[trick]).train(train)
    model = fuse(copy.deepcopy(plain))
    results = []
    for each in (model, plain):
        x = torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = each(x)
        y.square().sum().backward()
        gradients = [x.grad, *(parameter.grad for parameter in each.parameters())]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            halved = each(x) if not train else y
        results.append([y, *gradients, halved])
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert found.dtype == expected.dtype
            tolerance = 1e-4 if expected is not results[1][-1] or train else 0.02
            assert torch.allclose(
                found.float(), expected.float(), rtol=tolerance, atol=1e-5 + tolerance * float(expected.abs().max())
            )


def drawn(block: nn.Module, x: Tensor) -> Tensor:
    return x if block.training and random.random() < 0.5 else Functional.forward(block, x)


def other_eps(block: nn.Module, x: Tensor) -> Tensor:
    norm = block.norm
    h = F.batch_norm(block.a(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, eps=0.5)
    return x + block.c(F.relu6(block.b(F.relu6(h))))


def statistics_of_the_batch(block: nn.Module, x: Tensor) -> Tensor:
    h = F.batch_norm(block.a(x), None, None, block.norm.weight, block.norm.bias, True)
    return x + block.c(F.relu6(block.b(F.relu6(h))))


def without_its_bias(block: nn.Module, x: Tensor) -> Tensor:
    h = block.norm(F.conv2d(x, block.a.weight))
    return x + block.c(F.relu6(block.b(F.relu6(h))))


def counting(block: nn.Module, x: Tensor) -> Tensor:
    block.calls = getattr(block, "calls", 0) + 1
    return Tricky.forward(block, x)


@pytest.mark.filterwarnings("ignore:nothing in")
@pytest.mark.parametrize("forward", [other_eps, statistics_of_the_batch, without_its_bias, counting])
def test_layers_used_otherwise(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    kind = type("Own", (Tricky,), {"forward": forward})
    plain, x = kind(lambda h: h), torch.randn(2, 8, 7, 7)
    with torch.no_grad():
        nn.init.uniform_(plain.norm.running_var, 0.5, 2)
        model = fuse(copy.deepcopy(plain.eval()))
        assert error(model(x), plain(x)) < 1e-6
        assert getattr(model, "calls", None) == getattr(plain, "calls", None)


def test_random_branches_stay_random() -> None:
    block = type("Drawn", (Functional,), {"forward": drawn})().train()
    state = random.getstate()
    fuse(block)
    x = torch.randn(1, 8, 5, 5)
    results = [torch.equal(block(x), x) for _ in range(64)]
    assert 0 < sum(results) < 64
    assert random.getstate() != state


def test_copies_that_share_and_pieces() -> None:
    block = fuse(zoo.TorchvisionBlock(8, 8, 1, 6)).eval()
    x = torch.randn(1, 8, 7, 7)
    with torch.no_grad():
        block(x)
        shallow = copy.copy(block)
        shallow.use_res_connect = False
        assert error(shallow(x), block(x) - x) < 1e-5
    piece = fuse(small().features)[1:5]
    assert piece.why_not_fused(x) == "a part of a fused Sequential" and piece.repack() is None
    again = fuse(piece)
    assert type(unfuse(pickle.loads(pickle.dumps(again)))) is nn.Sequential
    assert type(unfuse(again)) is nn.Sequential


def test_first_call_in_inference_mode() -> None:
    model, x = pickle.loads(pickle.dumps(fuse(small()))), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        model(x)
        assert ops_of(lambda: model(x)) == {"network": 1}


@pytest.mark.parametrize(
    "pool", [lambda x: x.mean((2, 3), keepdim=True).squeeze(), lambda x: x.mean((2, 3)).reshape(1, -1)]
)
def test_features_that_depend_on_the_number_of_images(pool: Callable[[Tensor], Tensor]) -> None:
    body = with_statistics(
        nn.Sequential(zoo.conv_norm_activation(3, 8, 3, 2), zoo.FlatBlock(8, 8, 1, 6)), torch.randn(4, 3, 16, 16)
    )
    model = Wrapped(body, pool).eval()
    plain = copy.deepcopy(model)
    fuse(model)
    with torch.no_grad():
        for batch in (1, 2):
            x = torch.randn(batch, 3, 16, 16)
            assert model(x).shape == plain(x).shape and error(model(x), plain(x)) < 1e-5


def test_compiled_after_a_change() -> None:
    torch._dynamo.reset()
    block = fuse(zoo.TorchvisionBlock(8, 8, 1, 6)).eval()
    conv, x = block.conv[1][0], torch.randn(1, 8, 9, 9)
    conv.dilation, conv.padding = (2, 2), (2, 2)
    plain = unfuse(copy.deepcopy(block))
    with torch.no_grad():
        assert error(torch.compile(block, backend="eager")(x), plain(x)) < 1e-5
        assert error(torch.export.export(block, (x,)).module()(x), plain(x)) < 1e-5
    torch._dynamo.reset()


def test_a_mixed_network() -> None:
    """What can be fused is, and the rest is told of."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "good": zoo.FlatBlock(8, 8, 1, 6),
            "list": nn.ModuleList([InvertedResidual(8, 8, 1, 6), Functional(F.relu)]),
            "none": nn.Conv2d(3, 8, 3),
            "wrapped": Wrapped(zoo.FlatBlock(8, 8, 1, 6), torch.tanh),
        }
    )
    _, report = fuse(model, report=True)
    assert [tuple(found) for found in report] == [
        ("good", "inverted residual", ""),
        ("list.0", "runs on mnv2_fused as it is", ""),
        ("list.1", "a block of 3 convolutions", "another activation than ReLU6: relu"),
        ("wrapped.block", "inverted residual", ""),
    ]
    assert isinstance(report, FuseReport) and len(report.fused) == 3 and len(report.unfused) == 1
    assert str(report).splitlines()[-1] == "3 fused, 1 not"


def test_dropped_paths_are_fused_in_eval_mode_alone() -> None:
    model = with_statistics(zoo.TimmMobileNetV2(0.35, drop_path=0.2), torch.randn(4, 3, 32, 32))
    plain = copy.deepcopy(model)
    fuse(model)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert ops_of(lambda: model(x)) == {"network": 1, "pack": 1} and error(model(x), plain(x)) < 2e-5
    results = []
    for each in (model.train(), plain.train()):
        torch.manual_seed(3)
        results.append(each(x))
    assert error(*results) < 1e-4
    assert "dropped paths" in model.blocks[1][1].why_not_fused(torch.randn(1, 8, 8, 8))
    assert ops_of(lambda: model(x))["block_train"] == 7  # those without a shortcut


def test_separable_blocks_with_relu6() -> None:
    """MobileNetV1's, one after the other in Sequentials: the 1x1 convolution of one is no expansion of the next."""

    def separable(i: int, o: int, stride: int) -> nn.Sequential:
        depthwise = nn.Conv2d(i, i, 3, stride, 1, groups=i, bias=False)
        pointwise = nn.Conv2d(i, o, 1, bias=False)
        layers = [depthwise, nn.BatchNorm2d(i), nn.ReLU6(), pointwise, nn.BatchNorm2d(o), nn.ReLU6()]
        return nn.Sequential(*layers)

    first = zoo.conv_norm_activation(3, 8, 3, 2)
    blocks = [separable(8, 16, 1), separable(16, 32, 2), separable(32, 32, 1)]
    model = nn.Sequential(first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    model = with_statistics(model, torch.randn(4, 3, 32, 32))
    plain = copy.deepcopy(model)
    _, report = fuse(model, report=True)
    assert [found.what for found in report] == [
        "6 layers as one op, 3 of them blocks", "3x3 convolution", *["depthwise separable convolution"] * 3
    ]  # fmt: skip
    x = torch.randn(2, 3, 37, 41)
    with torch.no_grad():
        assert error(model(x), plain(x)) < 2e-5 and ops_of(lambda: model(x)) == {"network": 1}


def test_shared_blocks_and_intermediate_maps() -> None:
    """A block in two places; a backbone that returns maps, whose stages are chains."""
    block = zoo.FlatBlock(8, 8, 1, 6)
    model = with_statistics(nn.Sequential(block, block), torch.randn(4, 8, 16, 16))
    plain, x = copy.deepcopy(model), torch.randn(2, 8, 16, 16)
    fuse(model)
    assert model[0] is model[1]
    with torch.no_grad():
        assert error(model(x), plain(x)) < 2e-5
    _, report = fuse(zoo.TimmMobileNetV2(0.35, maps=True), report=True)
    chains = {found.name: found.what for found in report if "layers" in found.what}
    assert chains["blocks.2"] == "3 layers as one op, 3 of them blocks" and "blocks" not in chains


def test_nothing_to_fuse() -> None:
    with pytest.warns(UserWarning, match="nothing in Linear was found to fuse$"):
        fuse(nn.Linear(2, 3))
    with pytest.raises(TypeError, match="takes a model, an nn.Module, got str"):
        fuse("mobilenet_v2")
    model = MobileNetV2(width_mult=0.35)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = fuse(model, report=True)
    assert [found.what for found in report] == ["runs on mnv2_fused as it is"] and type(model) is MobileNetV2


def test_wide_3x3_convolutions_are_left_to_torch() -> None:
    """Our 3x3 kernel is one for images."""
    with pytest.warns(UserWarning, match="nothing"):
        fuse(nn.Sequential(zoo.conv_norm_activation(64, 64, 3)))


# ------------------------------------------------------------------------------------------------------- the compiler


PIECES = {
    "torchvision": lambda model: model.features[1:4],
    "timm": lambda model: model.blocks[1],
    "transformers": lambda model: model.mobilenet_v2.conv_stem,
}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["piece", "whole"])
def test_compile_without_graph_breaks(name: str, whole: bool) -> None:
    model = small(name)
    model = fuse(model if whole else PIECES[name](model))
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    x = torch.randn(2, channels, 32, 32)
    blocks = sum(map(is_depthwise, model.modules()))
    for mode, wanted in ((model.train, blocks), (model.eval, 0)):
        mode()
        torch._dynamo.reset()
        with torch.set_grad_enabled(wanted > 0):
            explained = torch._dynamo.explain(model)(x)
        assert explained.graph_break_count == 0 and explained.graph_count == 1
        called = [str(node.target) for graph in explained.graphs for node in graph.graph.nodes]
        assert sum("block_train" in target for target in called) == wanted
    torch._dynamo.reset()


def test_a_compiled_step_of_training() -> None:
    """Of any batch and size, by the compiler's interpreter of graphs."""
    torch._dynamo.reset()
    model = fuse(zoo.TorchvisionMobileNetV2(0.1).features[:4]).double().train()
    plain = unfuse(copy.deepcopy(model))
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    for size in [(2, 3, 32, 32), (3, 3, 24, 40)]:
        x = torch.randn(size, dtype=torch.float64)
        results = []
        for call, each in ((compiled, model), (plain, plain)):
            each.zero_grad()
            y = call(x)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            results.append([y, *(parameter.grad for parameter in each.parameters())])
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(*results, strict=True))
    torch._dynamo.reset()
