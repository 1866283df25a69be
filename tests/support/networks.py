"""Odd networks: each holds one thing that a planner can get wrong."""

import contextvars
import dataclasses
import functools
import random
import threading
import warnings

import numpy
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from ddf_convert.layers import SpatialFilterNorm


def conv(inputs=32, outputs=32, **options):
    return nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **options})


def around(*layers, width=32, after=None):
    """An image into ``width`` channels by a 1x1, the layers, and a ReLU."""
    return nn.Sequential(nn.Conv2d(3, width, 1), *layers, *([after] if after else []), nn.ReLU())


def bottleneck(*layers, width=32):
    """The layers between two 1x1 convolutions."""
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width), nn.ReLU(), *layers, nn.Conv2d(width, 8, 1))


class Shared(nn.Module):
    """One convolution called three times, at two sizes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 1)
        self.shared = conv()

    def forward(self, x):
        x = self.shared(self.shared(self.first(x)))
        return self.shared(F.max_pool2d(x, 2))


class TwoNames(nn.Module):
    """One convolution registered under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 1)
        self.a = conv()
        self.b = nn.ModuleDict({"same": self.a})

    def forward(self, x):
        return self.b["same"](self.a(self.first(x)))


class TiedWeights(nn.Module):
    """Two convolutions that hold one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 1)
        self.a, self.b = conv(), conv()
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(self.first(x)))


class Functional(nn.Module):
    """F.conv2d with a parameter of the model's own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight, stride=2, padding=1)


class SameNames(nn.Module):
    """A functional call whose fx node takes the name of a module; and a transposed one."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(32, 3, 3, 3))
        self.up = nn.Parameter(torch.randn(32, 8, 3, 3))
        self.conv2d = conv()

    def forward(self, x):
        return F.conv_transpose2d(self.conv2d(F.conv2d(x, self.kernel)), self.up, stride=2)


class ReadDirectly(nn.Module):
    """A convolution whose weight the forward pass also reads."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 1)
        self.conv = conv()

    def forward(self, x):
        return self.conv(self.first(x)) * self.conv.weight.mean()


class Uncalled(nn.Module):
    """A convolution that the forward pass never reaches."""

    def __init__(self):
        super().__init__()
        self.unused = conv()
        self.used = nn.Conv2d(3, 32, 3)

    def forward(self, x):
        return self.used(x)


class Residual(nn.Module):
    """A bottleneck whose inner feature meets a residual addition before the 1x1."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.last = nn.Conv2d(3, 32, 1), conv(), nn.Conv2d(32, 8, 1)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.conv(x))


class Concatenated(Residual):
    """The same with a concatenation."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(64, 8, 1)

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.cat([x, self.conv(x)], 1))


class TwoConsumers(Residual):
    """The same with a 1x1 and the model's output as consumers."""

    def forward(self, x):
        x = self.conv(self.first(x))
        return self.last(x), x


class Gated(Residual):
    """A bottleneck with squeeze-and-excitation written by hand, a learned scale, padding, pooling and casts between."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 32)
        self.scale = nn.Parameter(torch.ones(1, 32, 1, 1))

    def forward(self, x):
        x = F.relu(self.first(x)) * self.scale
        x = F.pad(self.conv(x), (1, 1, 1, 1)).float()
        gate = torch.sigmoid(self.gate(x.mean((2, 3)))).view(x.shape[0], x.shape[1], 1, 1)
        return self.last(F.max_pool2d(x * gate, 2) * 0.5)


class ForeignGate(Residual):
    """The feature is multiplied by something that does not come from it."""

    def forward(self, x):
        return self.last(self.conv(self.first(x)) * x.mean(1, keepdim=True))


class Optional(nn.Module):
    """Optional arguments, tested in Python."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 32, 1), conv()

    def forward(self, x, mask=None, scale: float = 1.0):
        x = self.conv(self.first(x))
        if mask is not None:
            x = x * mask
        return x * scale if scale > 0 else x


class OwnForward(nn.Conv2d):
    """A subclass that scales its weight."""

    def forward(self, x):
        return self._conv_forward(x, self.weight * 2, self.bias)


class OwnStandard(timm.layers.StdConv2d):
    """The same of a convolution that timm has."""

    def forward(self, x):
        return super().forward(x) * 2


class SameForward(nn.Conv2d):
    """A subclass that only adds an attribute."""

    note = "unchanged"


class Untraceable(nn.Module):
    """Control flow on values, around blocks that have none."""

    def __init__(self):
        super().__init__()
        self.first, self.blocks, self.conv = nn.Conv2d(3, 32, 1), nn.ModuleList([Inner(), Inner()]), conv()

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
            if x.mean() > 1e9:
                x = x / 2
        return self.conv(x)


class Inner(nn.Module):
    """A bottleneck."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.last = nn.Conv2d(32, 32, 1), conv(), nn.Conv2d(32, 32, 1)

    def forward(self, x):
        return self.last(self.conv(self.first(x)).relu())


class AroundUntraceable(nn.Module):
    """A model whose middle alone cannot be traced; the middle is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 3, 1), Untraceable(), conv()

    def forward(self, x):
        x = self.middle(self.first(x))
        return self.last(self.middle(x[:, :3]))


class Iterating(nn.Module):
    """Looks at the size of its input in a loop, which torch.fx cannot follow; runs on shapes alone."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 32, 1), conv()

    def forward(self, x):
        x = self.first(x)
        for _ in range(x.shape[0]):
            x = self.conv(x)
        return x


class Loop(nn.Module):
    """Convolutions in a ModuleList, called in a loop."""

    def __init__(self):
        super().__init__()
        self.first, self.convs = nn.Conv2d(3, 32, 1), nn.ModuleList([conv(), conv()])

    def forward(self, x):
        x = self.first(x)
        for layer in self.convs:
            x = x + layer(x)
        return x


class Kernel(nn.Module):
    """A block that calls F.conv2d with its own parameters."""

    def __init__(self, stride=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32, 3, 3))
        self.bias = nn.Parameter(torch.randn(32))
        self.stride = stride

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, padding=1, stride=self.stride)


class Functions(nn.Module):
    """Convolutions as functions: of a block that is called twice, of another, with computed and with shared weights."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.once = nn.Conv2d(3, 32, 1), Kernel(), Kernel(stride=2)
        self.weight = nn.Parameter(torch.randn(32, 32, 3, 3))
        self.dropout = nn.Dropout()

    def forward(self, x):
        x = self.once(self.twice(self.twice(self.first(x))))
        x = F.conv2d(x, self.weight)
        return self.dropout(F.conv2d(x, weight=self.weight.tanh()) + self.weight.mean())


@dataclasses.dataclass
class Outputs:
    """What a model can return."""

    feature: torch.Tensor
    names: list


class ManyInputs(nn.Module):
    """Two tensors, a dict of tensors and a flag come in; what goes out depends on ``kind``."""

    def __init__(self, kind="tuple"):
        super().__init__()
        self.kind = kind
        self.first, self.conv, self.last = nn.Conv2d(3, 32, 1), conv(), nn.Conv2d(32, 8, 1)

    def forward(self, image, mask, *, extra, scale=True):
        x = self.first(image) * mask
        x = self.last(self.conv(x + extra["shift"])) if scale else x
        return {
            "tuple": (x, mask),
            "dict": {"feature": x, "mask": mask},
            "list": [x, [mask, x]],
            "dataclass": Outputs(x, ["x"]),
        }[self.kind]


class TakesList(nn.Module):
    """As detectors do: a list of images of several sizes."""

    def __init__(self):
        super().__init__()
        self.body = Inner()
        self.first = nn.Conv2d(3, 32, 1)

    def forward(self, images):
        return [{"feature": self.body(self.first(image[None]))} for image in images]


class TakesDict(nn.Module):
    """A dict is its one argument."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 32, 1), conv()

    def forward(self, batch):
        return self.conv(self.first(batch["image"]))


class Stateful(nn.Module):
    """Counts its calls in a buffer, draws random numbers of every kind, and keeps its last feature."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.first, self.conv = nn.Conv2d(3, 32, 1), conv()
        self.last = None

    def forward(self, x):
        self.calls += 1
        x = self.first(x) + random.random() + float(numpy.random.rand()) + torch.rand(())
        if float(x.mean()) > 1e9:
            return x
        self.last = self.conv(x)
        return self.last


def hooked():
    layer = conv()
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def parametrised():
    return torch.nn.utils.parametrizations.weight_norm(conv())


def overridden():
    layer = conv()
    layer.forward = lambda x: x
    return layer


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(conv())


def spectral_norm():
    return torch.nn.utils.spectral_norm(conv())


def pruned():
    return prune.identity(conv(), "weight")


same = timm.layers.create_conv2d(32, 64, 3, stride=2, padding="same")


_collected = contextvars.ContextVar("collected", default=None)


def install_capture(module):
    """As transformers does it: a hook that is active while the model that collects runs."""

    def capture(module, args, output):
        if _collected.get() is not None:
            _collected.get().append(output)

    module.register_forward_hook(capture)


class LazyHooks(nn.Module):
    """Registers hooks on its blocks at its first forward, remembers that it did, and returns what they collect."""

    def __init__(self, blocks=2):
        super().__init__()
        self.first, self.blocks = nn.Conv2d(3, 32, 1), nn.ModuleList([Inner() for _ in range(blocks)])
        self.hooked = False

    def install(self):
        for block in self.blocks:
            install_capture(block)

    def run(self, x):
        token = _collected.set([])
        try:
            for block in self.blocks:
                x = block(x)
            return _collected.get()
        finally:
            _collected.reset(token)

    def forward(self, x):
        if not self.hooked:
            self.install()
            self.hooked = True
        return self.run(self.first(x))[-1]


class LazyClosures(LazyHooks):
    """The same with hooks whose closure holds the model and a list of it, in partials."""

    def install(self):
        self.collected = found = []

        def capture(key, module, args, output):
            found.append((key, output))
            self.last = output

        for number, block in enumerate(self.blocks):
            block.register_forward_hook(functools.partial(capture, number))

    def run(self, x):
        self.collected.clear()
        for block in self.blocks:
            x = block(x)
        assert self.last is self.collected[-1][1]
        return [output for _, output in self.collected]


class _Capture:
    """A callable hook, which keeps what it saw."""

    def __init__(self):
        self.seen = None

    def __call__(self, module, args, output):
        self.seen = output


class LazyObjects(LazyHooks):
    """The same with hooks that are objects."""

    def install(self):
        self.captures = []
        for block in self.blocks:
            self.captures.append(_Capture())
            block.register_forward_hook(self.captures[-1])

    def run(self, x):
        for block in self.blocks:
            x = block(x)
        return [capture.seen for capture in self.captures]


class LazyPreHooks(LazyHooks):
    """The same with hooks before the forward, which take keyword arguments."""

    @staticmethod
    def scale(module, args, kwargs):
        return (args[0] * kwargs.pop("scale"),), kwargs

    def install(self):
        for block in self.blocks:
            block.register_forward_pre_hook(self.scale, with_kwargs=True)

    def run(self, x):
        for block in self.blocks:
            x = block(x, scale=2.0)
        return [x]


class Caching(nn.Module):
    """Makes tables at its first forward and keeps them: in an attribute, in a dict by size, in a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 32, 1), conv()
        self.table, self.tables, self.ready = None, {}, False

    def forward(self, x):
        x = self.first(x)
        if not self.ready:
            self.table = torch.linspace(0, 1, x.shape[-1])
            self.register_buffer("rows", torch.linspace(0, 1, x.shape[-2])[:, None], persistent=False)
            self.ready = True
        if x.shape not in self.tables:
            self.tables[x.shape] = torch.ones(x.shape[-2:])
        return self.conv(x + self.table + self.rows + self.tables[x.shape])


class Uncopyable(nn.Module):
    """Holds what deepcopy cannot copy, some of it deep inside."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 32, 1), conv()
        self.lock, self.event, self.local = threading.RLock(), threading.Event(), threading.local()
        self.steps = (step for step in range(3))
        self.helpers = {"numpy": numpy, "state": [threading.Lock(), _collected]}
        self.local.calls = 0

    def forward(self, x):
        with self.lock, self.helpers["state"][0]:
            self.local.calls = getattr(self.local, "calls", 0) + 1
            return self.conv(self.first(x))


class _Reversible(torch.autograd.Function):
    """Runs blocks without a graph, and again for the gradient, as reversible networks do."""

    @staticmethod
    def forward(ctx, x, blocks, *parameters):
        ctx.blocks = blocks
        ctx.save_for_backward(x)
        with torch.no_grad():
            for block in blocks:
                x = x + block(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = x
            for block in ctx.blocks:
                y = y + block(y)
        parameters = [parameter for block in ctx.blocks for parameter in block.parameters()]
        given = torch.autograd.grad(y, (x, *parameters), gradient)
        return given[0], None, *given[1:]


class Reversible(nn.Module):
    """A network whose blocks run inside an autograd function of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Conv2d(3, 32, 1), nn.ModuleList([Inner(), Inner()])

    def forward(self, x):
        parameters = [parameter for block in self.blocks for parameter in block.parameters()]
        return _Reversible.apply(self.first(x), self.blocks, *parameters)


class Demanding(nn.Module):
    """Runs only if a check, or something that it does to its feature first, succeeds."""

    def __init__(self, demand):
        super().__init__()
        self.demand = demand
        self.first, self.conv = nn.Conv2d(3, 32, 1), conv()
        self.register_parameter("scale", nn.Parameter(torch.ones(()), requires_grad=False))

    def forward(self, x):
        x = self.conv(self.first(x))
        return x * self.demand(self, x)


def without_gradients(model, x):
    assert not torch.is_grad_enabled(), "use torch.no_grad()"
    return 1


def in_inference_mode(model, x):
    assert torch.is_inference_mode_enabled()
    return 1


def in_training_mode(model, x):
    assert model.training
    return 1


def frozen(model, x):
    assert not any(parameter.requires_grad for parameter in model.first.parameters()), "freeze me"
    return 1


def to_numpy(model, x):
    return float(x.numpy().mean())


def scaled_in_place(model, x):
    model.scale.view(1).mul_(0.5)
    return model.scale


def backward(model, x):
    x.sum().backward(inputs=list(model.first.parameters()))
    return model.first.weight.grad.mean()


def gradient(model, x):
    with torch.enable_grad():
        (found,) = torch.autograd.grad(x.square().sum(), model.first.weight)
    return found.mean()


def unwatched(model, x):
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch._C._len_torch_dispatch_stack() == 0
    return 1


class Asks(nn.Module):
    """A block whose forward asks something of its convolution before it calls it."""

    def __init__(self, ask, width=32):
        super().__init__()
        self.ask, self.conv, self.other = ask, conv(width, width), conv(width, width)

    def forward(self, x):
        found = self.ask(self, x)
        return self.other(self.conv(x)) if found is None else found


def weight_of_the_convolution(block, x):
    dict(block.conv.named_parameters(recurse=False))["weight"]


def counts_parameters(block, x):
    assert len(block.conv._parameters) == 2, "a convolution has two parameters"


def is_a_convolution(block, x):
    assert isinstance(block.conv, nn.Conv2d)


def does_without(block, x):
    return None if type(block.conv) is nn.Conv2d else block.other(x)


def other_shape(block, x):
    return None if type(block.conv) is nn.Conv2d else block.other(block.conv(x))[..., 1:]


def on_values(block, x):
    assert float(x.detach().mean()) < 1e9
    assert isinstance(block.conv, nn.Conv2d), "a convolution"


class Up(nn.Module):
    """An image into ``width`` channels, upsampled by a module."""

    def __init__(self, up, width=8):
        super().__init__()
        self.first, self.up = nn.Conv2d(3, width, 1), up

    def forward(self, x):
        return self.up(self.first(x)).relu()


class Interpolates(nn.Module):
    """The same with F.interpolate, called with the arguments given."""

    def __init__(self, **arguments):
        super().__init__()
        self.first, self.last, self.arguments = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), arguments

    def forward(self, x):
        return self.last(F.interpolate(self.first(x), **self.arguments))


class UNet(nn.Module):
    """Goes down twice and up again, with F.interpolate to the sizes of the skipped features."""

    def __init__(self, mode="bilinear"):
        super().__init__()
        self.mode = mode
        self.down = nn.ModuleList([nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])
        self.across = nn.ModuleList([nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)])

    def forward(self, x):
        skipped = []
        for step, layer in enumerate(self.down):
            x = layer(F.max_pool2d(x, 2) if step else x)
            skipped.append(x)
        for layer, skip in zip(self.across, skipped[-2::-1], strict=True):
            x = layer(torch.cat([F.interpolate(x, size=skip.shape[-2:], mode=self.mode), skip], 1))
        return x


class Pyramid(nn.Module):
    """Calls F.interpolate itself, and modules that do: one of its own, one of torch, one that it calls twice."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.up = nn.Conv2d(3, 8, 1), Interpolates(scale_factor=2), nn.Upsample(scale_factor=2)
        self.inner.first, self.inner.last = nn.Identity(), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = F.interpolate(self.inner(F.interpolate(self.first(x), scale_factor=2)), scale_factor=0.5)
        x = self.inner(self.up(x))
        return F.interpolate(x, scale_factor=3, mode="bilinear")


class Shuffles(nn.Module):
    """A head of a super-resolution network: a convolution and a pixel shuffle."""

    def __init__(self, conv=None, shuffle=None, between=None):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 1)
        self.conv = conv or nn.Conv2d(32, 64, 3, padding=1)
        self.between = between or nn.Identity()
        self.shuffle = shuffle or nn.PixelShuffle(2)

    def forward(self, x):
        return self.shuffle(self.between(self.conv(self.first(x))))


class ShufflesAndMore(Shuffles):
    """The same, whose convolution is read by something else too."""

    def forward(self, x):
        x = self.conv(self.first(x))
        return self.shuffle(x).mean() + x.mean()


class Routed(nn.Module):
    """Like ultralytics' models: where each layer reads from, and what it is, stands on the instances."""

    def __init__(self):
        super().__init__()
        layers = [(conv(), -1), (conv(stride=2), -1), (nn.Upsample(scale_factor=2), -1), (conv(64, 32), [-1, 0])]
        self.model = nn.Sequential(*(self._marked(i, *each) for i, each in enumerate(layers)))
        self.save = sorted({place for _, reads in layers if isinstance(reads, list) for place in reads if place >= 0})

    @staticmethod
    def _marked(number, layer, reads):
        layer.i, layer.f, layer.type = number, reads, f"torch.nn.{type(layer).__name__}"
        layer.np = sum(parameter.numel() for parameter in layer.parameters())
        return layer

    def forward(self, x):
        outputs = []
        for layer in self.model:
            if isinstance(layer.f, list):
                x = torch.cat([x if place == -1 else outputs[place] for place in layer.f], 1)
            x = layer(x)
            outputs.append(x if layer.i in self.save else None)
        return x


class Normalized(nn.Module):
    """One call of FilterNorm, which is quickly exported."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 18, 1)
        self.norm = SpatialFilterNorm(3, heads=2)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.conv(image))
