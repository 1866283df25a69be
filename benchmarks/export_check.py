"""Families of converted models as ONNX and torch.export files: what their sizes may be, and how far they are off.

    python benchmarks/export_check.py                     an hour on two busy cores; writes results/export.json and .md
    python benchmarks/export_check.py --only 'U-Net*'     some rows; the others stay as they were
    python benchmarks/export_check.py --latency           also how long DDF-ResNet-50 takes in onnxruntime

Needs onnx, onnxscript and onnxruntime (pip install 'ddf-convert[export]') and torchvision. Weights are random, and
batch norms have the statistics of random images, so that outputs are of size 1.
"""

from __future__ import annotations

import fnmatch
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from common.markdown import paragraph, table
from common.results import exit_code, machine, study_parser
from torch import Tensor, nn

import ddf_convert as ddf
from ddf_convert import export
from ddf_convert.artifacts.atomic import write_file
from ddf_convert.cost.timing import median_ms
from ddf_convert.errors import DDFError
from ddf_convert.layers import DDF2d, DDFUp2d
from ddf_convert.models.ddf_upnet import DDFUpNet
from ddf_convert.utils.device import describe_short

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support import converted_networks, networks

UP = {"upsample": True, "allow_growth": True}
FLAGSHIP = "DDF-ResNet-50"


@dataclass(frozen=True)
class Family:
    """A model to export.

    Attributes:
        build: Makes the model, before it is converted.
        options: Of the conversion; None leaves the model as it is.
        shapes: Of the example inputs.
        torch_export: Also make the torch.export file, which takes longer.
        dtype: Of the model and its inputs.
        exports: Whether the export is expected to work.
    """

    build: Callable[[], nn.Module]
    options: dict[str, Any] | None = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ((1, 3, 96, 96),)
    torch_export: bool = False
    dtype: torch.dtype = torch.float32
    exports: bool = True


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, **options)


def torchvision_model(kind: str, name: str) -> Callable[[], nn.Module]:
    return partial(getattr(getattr(torchvision.models, kind), name), weights=None, weights_backbone=None)


LARGE = ((1, 3, 224, 224),)
FAMILIES = {
    FLAGSHIP: Family(timm_model("ddf_mul_resnet50", zero_init_last=False), None, LARGE, torch_export=True),
    "tf_efficientnet_b0, depthwise": Family(timm_model("tf_efficientnet_b0"), {"depthwise": True}, LARGE),
    "tf_efficientnetv2_b0": Family(timm_model("tf_efficientnetv2_b0"), {}),
    "U-Net with DDF-Up": Family(
        partial(converted_networks.UNet, (32, 64, 128)), {**UP, "stem": True}, ((1, 3, 128, 128),), torch_export=True
    ),
    "U-Net, size by factor": Family(networks.UNet, UP),
    "resnet18": Family(timm_model("resnet18", zero_init_last=False)),
    "resnet18, float16": Family(timm_model("resnet18", zero_init_last=False), dtype=torch.float16),
    "resnet18, heads=4, combine=add": Family(
        timm_model("resnet18", zero_init_last=False), {"heads": 4, "combine": "add"}
    ),
    "mobilenetv2_100, depthwise": Family(timm_model("mobilenetv2_100"), {"depthwise": True}),
    "regnetx_002, allow_growth": Family(timm_model("regnetx_002"), {"allow_growth": True}),
    "vgg11_bn": Family(timm_model("vgg11_bn")),
    "efficientformer_l1": Family(timm_model("efficientformer_l1"), {}, LARGE),
    "gcvit_xxtiny": Family(timm_model("gcvit_xxtiny"), {}, LARGE),
    "lraspp_mobilenet_v3_large, upsample": Family(torchvision_model("segmentation", "lraspp_mobilenet_v3_large"), UP),
    "deeplabv3_mobilenet_v3_large, upsample": Family(
        torchvision_model("segmentation", "deeplabv3_mobilenet_v3_large"), UP
    ),
    "DDF-Up-Net, 8x": Family(partial(DDFUpNet, 8), None, ((1, 1, 20, 24), (1, 3, 160, 192))),
    "transposed convolution": Family(partial(networks.Up, nn.ConvTranspose2d(8, 4, 4, 2, 1)), UP, torch_export=True),
    "pixel shuffle": Family(networks.Shuffles, UP),
    "nearest in a pyramid": Family(networks.Pyramid, UP),
    "F.conv2d, a GraphModule": Family(networks.Functions, {"functional": True}, torch_export=True),
    "ssdlite320_mobilenet_v3_large": Family(
        torchvision_model("detection", "ssdlite320_mobilenet_v3_large"), {"depthwise": True}, LARGE, exports=False
    ),
    "fasterrcnn_mobilenet_v3_large_fpn": Family(
        torchvision_model("detection", "fasterrcnn_mobilenet_v3_large_fpn"), {}, LARGE, exports=False
    ),
}


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="some rows")
    parser.add_argument("--latency", action="store_true", help=f"time {FLAGSHIP}")
    options = parser.parse_args()
    file = options.results / "export.json"
    document = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    names = [] if options.page_only else [name for name in FAMILIES if fnmatch.fnmatch(name, options.only)]
    for name in names:
        document["rows"][name] = row(FAMILIES[name])
        print(f"{name}: {json.dumps(document['rows'][name])}", flush=True)
        write(options.results, document)
    if options.latency:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # on a busy machine threads wait for each other
        document["latency"] = latency()
        torch.set_num_threads(threads)
        write(options.results, document)
    if options.page_only:
        write_file(options.results / "export.md", "\n".join([*page(document), ""]))
    print("\n".join(page(document)))
    surprises = [name for name in names if exports(document["rows"][name]) != FAMILIES[name].exports]
    if surprises:
        raise DDFError(f"otherwise than expected, exported or not: {', '.join(surprises)}")


def exports(found: dict[str, Any]) -> bool:
    """Returns whether a row has no error."""
    return not any("error" in part for part in (found, *found.values()) if isinstance(part, dict))


def write(folder: Path, document: dict[str, Any]) -> None:
    """Writes what there is so far."""
    packages = ("timm", "torchvision", "onnx", "onnxscript", "onnxruntime")
    document["machine"] = {**machine(), **{name: metadata.version(name) for name in packages}}
    document["rows"] = {name: document["rows"][name] for name in FAMILIES if name in document["rows"]}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "export.json", json.dumps(document, indent=1) + "\n")
    write_file(folder / "export.md", "\n".join([*page(document), ""]))


def prepared(family: Family) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Returns a converted model and inputs for it."""
    torch.manual_seed(0)

    def images(count: int) -> tuple[Tensor, ...]:
        positive = len(family.shapes) > 1  # depth maps, and photos
        shapes = [(count, *shape[1:]) for shape in family.shapes]
        return tuple(torch.rand(shape) + 0.5 if positive else torch.randn(shape) for shape in shapes)

    inputs = images(1)
    model = family.build().eval()
    if family.options is not None:
        model = ddf.convert(model, example_input=inputs, **family.options).eval()
    for layer in model.modules():
        if isinstance(layer, DDF2d):
            # With the biases of 0 that new layers have, the output is a product of three features, and a relative error
            # grows to 1.7 times its size in every layer.
            for part in (layer.spatial_branch[0], layer.channel_branch[3]):
                nn.init.normal_(part.bias)
            nn.init.ones_(layer.channel_branch[1].bias)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(*images(8))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
    return model.to(family.dtype), tuple(value.to(family.dtype) for value in inputs)


def row(family: Family) -> dict[str, Any]:
    """Exports one family and returns what came of it."""
    found: dict[str, Any] = {}
    try:
        model, inputs = prepared(family)
    except Exception as error:
        return {"error": f"not converted: {' '.join(str(error).split())[:200]}"}
    found["layers"] = sum(isinstance(layer, DDF2d | DDFUp2d) for layer in model.modules())
    with tempfile.TemporaryDirectory() as folder:
        exporters = {"onnx": (export.to_onnx, f"{folder}/model.onnx")}
        if family.torch_export:
            exporters["torch-export"] = (export.to_torch_export, f"{folder}/model.pt2")
        for format, (exporter, path) in exporters.items():
            start = time.process_time()
            try:
                report = exporter(model, inputs, path)
            except DDFError as error:
                found[format] = {"error": " ".join(str(error).split())}
                continue
            found[format] = {"seconds": time.process_time() - start, **report.to_dict(), "file": ""}
            found[format]["sizes"] = {size.name: str(size) for size in report.sizes}
    return found


def latency() -> dict[str, Any]:
    """Times DDF-ResNet-50, one image at a time, in PyTorch and in onnxruntime."""
    model, (image,) = prepared(FAMILIES[FLAGSHIP])
    calls = {"PyTorch with DDF's kernels": partial(model, image), "onnxruntime": in_onnxruntime(model, image)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(7):  # in turns, and the least of them: the machine is not quiet
            for name, call in calls.items():
                call()
                times[name].append(median_ms(call, torch.device("cpu"), 1.0))
    return {"threads": torch.get_num_threads(), "shape": list(image.shape), "ms": {n: min(t) for n, t in times.items()}}


def in_onnxruntime(model: nn.Module, image: Tensor) -> Callable[[], object]:
    """Exports a model and returns a function that runs it in onnxruntime."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        export.to_onnx(model, image, file, check=False)
        content = file.read_bytes()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: image.numpy()})


def page(document: dict[str, Any]) -> Iterator[str]:
    done = [
        (name, way, row["layers"], row[way])
        for name, row in document["rows"].items()
        for way in ("onnx", "torch-export")
        if way in row and "error" not in row[way]
    ]
    yield "# Exported models beside PyTorch"
    yield ""
    yield from paragraph(
        "Written by `benchmarks/export_check.py`. Each model as ONNX in onnxruntime, some as torch.export files too:"
        " the largest difference of any output from PyTorch with DDF's kernels, at the example's size and at another"
        " batch and another size, beside the largest output. Weights are random; batch norms have the statistics of"
        " random images."
    )
    checks = []
    for name, way, layers, found in done:
        for check in found["checks"]:
            shapes = " and ".join("x".join(map(str, shape)) for shape in check["inputs"].values())
            checks.append((name, way, layers, shapes, f"{check['difference']:.1e}", f"{check['largest']:.3g}"))
    yield from table(("model", "format", "DDF layers", "inputs", "difference", "largest output"), checks, numbers=True)
    yield "What sizes of the inputs may be, the seconds of a core that export and checks took, and ONNX's nodes:"
    yield ""
    files = []
    for name, way, _, found in done:
        sizes = "; ".join(f"{size}: {words}" for size, words in found["sizes"].items())
        files.append((name, way, f"{found['seconds']:.0f}", sum(found["operators"].values()), sizes))
    yield from table(("model", "format", "seconds", "operators", "sizes"), files, numbers=True)
    failed = [
        f"- {name}, {way}: {found['error']}"
        for name, row in document["rows"].items()
        for way, found in (("", row), *((way, row.get(way, {})) for way in ("onnx", "torch-export")))
        if "error" in found
    ]
    if failed:
        yield "What cannot be exported, with the reason that the user is given:"
        yield ""
        yield from failed
        yield ""
    if found := document.get("latency"):
        shape = "x".join(map(str, found["shape"]))
        yield from paragraph(
            f"One forward pass of {FLAGSHIP}, {shape}, one thread, the least of seven medians in turns; the machine"
            f" had other work, too. {'; '.join(f'{name}: {ms:.0f} ms' for name, ms in found['ms'].items())}."
        )
    if facts := document.get("machine"):
        packages = ("python", "timm", "torchvision", "onnx", "onnxscript", "onnxruntime")
        versions = ", ".join(f"{name} {facts[name]}" for name in packages)
        text = f"{describe_short(facts)}, shared with others (load {facts['load']:.1f}); {versions}."
        yield from paragraph(text)[:-1]  # the page's last line


if __name__ == "__main__":
    sys.exit(exit_code(main))
