"""The command line, mostly in this process (``cli.run``), and a few times as a user's shell starts it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import safetensors.torch
import timm
import torch
from support.command_line import NETWORK, Ran, start

import ddf_convert as ddf
from ddf_convert.artifacts import source
from ddf_convert.artifacts.artifact import read_manifest
from ddf_convert.commands.options import is_assignment, spread, timm_arguments

SMALL = ("--input-size", "3", "64", "64")


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small converted model; tests copy it."""
    folder = tmp_path_factory.mktemp("artifact") / "out"
    model = timm.create_model("resnet10t")
    ddf.save(ddf.convert(model, example_input=torch.empty(1, 3, 64, 64)), folder)
    return folder


# --- inspect ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "params", "macs"),
    [
        (("resnet50",), (25_557_032, 16_843_748), (4.09e9, 2.27e9)),
        # tests/conversion has these from Python
        pytest.param(("resnet101",), (44_549_160, 28.15e6), (7.80e9, 4.03e9), marks=pytest.mark.long),
        pytest.param(
            *(("resnet18", "--se-ratio", "0.5"), (11_689_512, 7.69e6), (1.81e9, 0.36e9)), marks=pytest.mark.long
        ),
    ],
)
def test_the_papers_figures(run: Any, arguments: tuple[str, ...], params: Any, macs: Any) -> None:
    ran = run("inspect", *arguments, "--json")
    found = json.loads(ran.out)
    assert ran.code == 0
    assert ran.err == ""
    assert (found["before"]["params"], found["after"]["params"]) == pytest.approx(params, abs=5e3)
    assert (found["before"]["macs"], found["after"]["macs"]) == pytest.approx(macs, abs=6e6)
    if arguments == ("resnet50",):
        assert found["after"]["params"] == 16_843_748


@pytest.mark.slow
def test_depthwise_convolutions_are_left_alone_with_the_reason(run: Any) -> None:
    sites = json.loads(run("inspect", "mobilenetv2_100", "--json").out)["sites"]
    depthwise = [site for site in sites if site["kind"] == "depthwise 3x3"]
    assert len(depthwise) == 17
    for site in depthwise:
        assert site["action"] == "skip"
        assert "parameters to a depthwise convolution" in site["reason"]
        assert site["before"] == site["after"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("resnet10t", ()),
        ("resnet10t", ("--all",)),
        ("mobilenetv2_035", ()),
        ("regnetx_002", ("--allow-growth", "--mixing", "always")),
        ("net_for_cli:Net", ()),
    ],
)
def test_tables_fit_80_columns(run: Any, model: str, arguments: tuple[str, ...]) -> None:
    ran = run("inspect", model, *SMALL, *arguments)
    assert ran.code == 0
    assert "parameters" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.usefixtures("quick_timing")
def test_options_reach_the_plan(run: Any) -> None:
    options = ("--se-ratio", 0.25, "--combine", "add", "--heads", 2, "--mixing", "always", "--stem", "--functional")
    more = ("--keep-first", 1, "--keep-last", 2, "--target-macs", "1.5M", "--target-params", "200k", "--only-faster")
    chosen = ("--depthwise", "--allow-growth", "--kernel-size", 3, 5, "--exclude", "layer2*")
    registry = ("--filter", "ddf", "--filter-option", "nonlinearity=linear")
    asked = (*options, *more, *chosen, *registry)
    found = json.loads(run("inspect", "resnet10t", "--input-size", 3, 32, 32, *asked, "--json").out)
    assert found["config"] == {
        **{"filter": "ddf", "filter_options": {"nonlinearity": "linear"}},
        **{
            "se_ratio": 0.25,
            "combine": "add",
            "heads": 2,
            "mixing": "always",
            "stem": True,
            "depthwise": True,
            "affine": False,
            "upsample": False,
        },
        **{"allow_growth": True, "functional": True, "kernel_size": [3, 5], "keep_first": 1, "keep_last": 2},
        **{"target_macs": 1_500_000, "target_params": 200_000, "only_faster": True},
    }
    assert found["input_size"] == [3, 32, 32]
    reasons = {site["name"]: site["reason"] for site in found["sites"]}
    assert reasons["layer2.0.conv1"] == "excluded by 'layer2*'"
    assert reasons["conv1.3"] == "kept: among the first 1 (keep_first)"
    assert all(site["before"]["latency_ms"] > 0 for site in found["sites"])


@pytest.mark.slow
def test_include_and_exclude_repeat(run: Any) -> None:
    ran = run(
        *("inspect", "resnet10t", *SMALL, "--json"),
        *("--include", "layer1*", "--include", "layer2.0.conv1", "--exclude", "re:.*conv2"),
    )
    replaced = [site["name"] for site in json.loads(ran.out)["sites"] if site["action"] == "replace"]
    assert replaced == ["layer1.0.conv1", "layer2.0.conv1"]


@pytest.mark.slow
def test_the_default_input_size_is_the_models_own(run: Any) -> None:
    assert json.loads(run("inspect", "resnet10t", "--json").out)["input_size"] == [3, 176, 176]
    assert json.loads(run("inspect", "net_for_cli:Net", "--json").out)["input_size"] == [3, 224, 224]


def test_json_is_alone_on_stdout_even_if_the_model_prints(run: Any) -> None:
    ran = run("inspect", "net_for_cli:Net", "--json")
    assert json.loads(ran.out)["model"] == "net_for_cli:Net"
    assert "the model talks" in ran.err


@pytest.mark.slow
def test_html_is_written_beside_the_tables(run: Any, folder: Path) -> None:
    ran = run("inspect", "resnet10t", *SMALL, "--html", "page.html")
    assert ran.code == 0
    assert "page.html" in ran.out
    assert "resnet10t" in (folder / "page.html").read_text()
    assert sorted(files(folder)) == ["net_for_cli.py", "page.html"]


# --- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_convert_then_inspect_from_a_shell(folder: Path, run: Any) -> None:
    ran = start("convert", "resnet10t", "-o", "out", *SMALL, "--json", "--html", "out/page.html")
    assert (ran.returncode, ran.stderr) == (0, "")
    out = folder / "out"
    assert sorted(files(out)) == ["manifest.json", "model.safetensors", "page.html", "report.json"]
    assert json.loads(ran.stdout) == json.loads((out / "report.json").read_text())
    loaded = ddf.load(out)
    assert ddf.count_parameters(loaded) == json.loads(ran.stdout)["after"]["params"]
    again = run("inspect", "out", *SMALL, "--json")
    assert (again.code, again.err) == (0, "")
    kinds = [site["kind"] for site in json.loads(again.out)["sites"]]
    assert kinds.count("DDF + 1x1") == sum(site["action"] == "replace" for site in json.loads(ran.stdout)["sites"]) > 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_the_seed_decides_the_weights(run: Any, folder: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("convert", "resnet10t", *SMALL, "-o", name, "--seed", seed).code == 0
    a, b, c = (weights(folder / name) for name in "abc")
    assert equal(a, b)
    assert a.keys() == c.keys()
    assert not torch.equal(a["fc.weight"], c["fc.weight"])
    assert not torch.equal(a["layer1.0.conv1.mix.weight"], c["layer1.0.conv1.mix.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_checkpoint_weights_are_kept(run: Any, folder: Path, suffix: str) -> None:
    state = timm.create_model("resnet10t").state_dict()
    if suffix == "pth":
        torch.save({"state_dict": state}, "file.pth")
    else:
        safetensors.torch.save_file(state, "file.safetensors")
    ran = run("convert", "resnet10t", *SMALL, "-o", "out", "--checkpoint", f"file.{suffix}")
    assert ran.code == 0, ran.err
    kept = weights(folder / "out")
    common = state.keys() & kept.keys()
    assert {"fc.weight", "conv1.0.weight", "bn1.running_mean"} <= common
    assert all(torch.equal(state[name], kept[name]) for name in common)


@pytest.mark.slow
def test_overwrite_replaces_and_its_absence_refuses(run: Any, folder: Path, artifact: Path) -> None:
    shutil.copytree(artifact, "out")
    before = files(folder)
    refused = run("convert", "resnet10t", *SMALL, "-o", "out", "--seed", 3)
    assert refused.code == 2
    assert "--overwrite" in refused.err
    assert files(folder) == before
    assert run("convert", "resnet10t", *SMALL, "-o", "out", "--seed", 3, "--overwrite").code == 0
    assert files(folder)["out/model.safetensors"] != before["out/model.safetensors"]


def test_a_model_of_ones_own_is_saved_for_restore(run: Any, folder: Path) -> None:
    converted = run("convert", "net_for_cli:Net", "-o", "out")
    assert converted.code == 0
    assert "ddf_convert.restore(model, 'out')" in converted.out
    import net_for_cli

    restored = ddf.restore(net_for_cli.Net(), folder / "out")
    assert isinstance(restored.body, ddf.layers.DDFConv2d)
    ran = run("inspect", "out")
    assert ran.code == 2
    assert "restore" in ran.err


def test_a_callable_can_give_an_example_input_too(run: Any, folder: Path) -> None:
    ran = run("convert", "net_for_cli:odd", "--functional", "-o", "out")
    assert ran.code == 0
    assert "2 of 3 convolutions replaced" in ran.out
    import net_for_cli

    model, example = net_for_cli.odd()
    restored = ddf.restore(model, folder / "out")
    assert isinstance(restored.ddf_conv2d, ddf.layers.DDFConv2d)
    assert restored(**example)["feature"].shape == (1, 64, 8, 8)


# --- arguments of timm's models --------------------------------------------------------------------------------------

KWARGS = ("--num-classes", "5", "--in-chans", "1", "--model-kwargs", "drop_rate=0.25", "output_stride=16")


@pytest.mark.slow
def test_arguments_of_timm_are_recorded_and_come_back(run: Any, folder: Path) -> None:
    ran = run("convert", "resnet10t", "-o", "out", "--input-size", "1", "64", "64", *KWARGS)
    assert (ran.code, ran.err) == (0, "")
    title = "resnet10t(num_classes=5, in_chans=1, drop_rate=0.25, output_stride=16)"
    assert " ".join(ran.out.split()).startswith(f"{title}, one 1x64x64 input")
    manifest = read_manifest(folder / "out")
    expected = {"num_classes": 5, "in_chans": 1, "drop_rate": 0.25, "output_stride": 16}
    assert (manifest.source.name, manifest.source.kwargs) == ("resnet10t", expected)
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["model"] == title
    model = ddf.load(folder / "out")
    assert (model.num_classes, model.drop_rate) == (5, 0.25)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 5)
    again = json.loads(run("inspect", "out", "--json").out)  # whose images have one channel too
    assert again["input_size"][0] == 1


@pytest.mark.parametrize(
    ("arguments", "given", "size"),
    [
        (("resnet10t", "--model-kwargs", "in_chans=2"), {"in_chans": 2}, (2, 176, 176)),
        (("test_vit", "--model-kwargs", "img_size=64"), {"img_size": 64}, (3, 64, 64)),
        (("test_vit", "--model-kwargs", "img_size=(64, 32)"), {"img_size": [64, 32]}, (3, 64, 32)),
        (
            ("resnet10t", "--model-kwargs", "act_layer=silu", "zero_init_last=False", "--model-kwargs", "drop_rate=.5"),
            {"act_layer": "silu", "zero_init_last": False, "drop_rate": 0.5},
            (3, 176, 176),
        ),
    ],
)
def test_arguments_of_timm_are_read_as_timms_scripts_do(
    arguments: tuple[str, ...], given: dict[str, Any], size: tuple[int, int, int]
) -> None:
    name, *options = spread(arguments, "--model-kwargs", is_assignment)
    texts = [text for text in options if text != "--model-kwargs"]
    assert options == [each for text in texts for each in ("--model-kwargs", text)]
    opened = source.open_model(name, arguments=timm_arguments(None, None, texts))
    assert opened.source is not None
    assert opened.source.kwargs == given
    assert opened.input_size == size


@pytest.mark.parametrize("command", [("inspect",), ("bench", "model"), ("export",), ("visualize",), ("evaluate",)])
def test_every_command_passes_them_on(run: Any, command: tuple[str, ...], folder: Path) -> None:
    PIL.Image.new("RGB", (8, 8)).save(folder / "photo.png")
    more = {
        "export": ("-o", "out.onnx"),
        "visualize": ("photo.png",),
        "evaluate": ("--data", "."),
    }.get(command[-1], ())
    ran = run(*command, "resnet10t", *more, "--num-classes", 5, "--model-kwargs", "drop_rat=0.1")
    one_line(ran, 2, "cannot build resnet10t", "'drop_rat'", "did you mean drop_rate")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("resnet10t --model-kwargs drop_rate", ("--model-kwargs drop_rate: write KEY=VALUE",)),
        ("resnet10t --model-kwargs =3", ("write KEY=VALUE",)),
        ("resnet10t --model-kwargs act_layer=nonsense", ("cannot build resnet10t", "'nonsense'")),
        ("resnet10t --model-kwargs drop_rate={1,2}", ("drop_rate={1, 2}", "cannot be saved as JSON")),
        ("resnet10t --model-kwargs drop_rate=1e999", ("drop_rate=inf", "cannot be saved as JSON")),
        ("resnet10t --model-kwargs checkpoint_path=x.pth", ("arguments do not read files", "--checkpoint FILE")),
        ("resnet10t --model-kwargs pretrained=True", ("arguments do not read files", "--pretrained")),
        ("resnet10t --num-classes 3 --model-kwargs num_classes=4", ("--num-classes says 3", "one of the two")),
        ("resnet10t --in-chans 0", ("--in-chans",)),
        ("net_for_cli:Net --num-classes 3", ("arguments of timm's models", "net_for_cli:Net is not one")),
        ("./out --in-chans 1", ("arguments of timm's models", "./out is not one")),
    ],
)
def test_mistakes_in_arguments_of_timm(run: Any, arguments: str, words: tuple[str, ...]) -> None:
    one_line(run("inspect", *arguments.split()), 2, *words)


@pytest.mark.slow
def test_a_checkpoint_of_another_number_of_classes(run: Any, folder: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=7)
    torch.save({"epoch": 1, "net": model.state_dict()}, folder / "seven.pth")
    convert = ("convert", "resnet10t", "-o", "out", *SMALL, "--checkpoint", "seven.pth")
    one_line(run(*convert), 2, "of another shape (fc.weight is 7x512 and should be 1000x512")
    ran = run(*convert, "--num-classes", 7)
    assert ran.code == 0
    assert torch.equal(weights(folder / "out")["fc.weight"], model.fc.weight)


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(folder)

    def interrupted(tensors: Any, file: Path, **options: Any) -> None:
        Path(file).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    ran = run("convert", "resnet10t", *SMALL, "-o", "deep/out")
    assert ran.code == 130
    assert len(ran.err.splitlines()) == 1
    assert not any("half of it" in content.decode(errors="ignore") for content in files(folder).values())
    assert not (folder / "deep" / "out").exists()
    assert {name for name in files(folder) if not name.startswith("deep")} == set(before)


# --- every mistake is one line ---------------------------------------------------------------------------------------


def one_line(ran: Ran, code: int, *words: str) -> None:
    assert ran.out == ""
    assert len(ran.err.splitlines()) == 1, ran.err
    for word in words:
        assert word in ran.err
    assert "Traceback" not in ran.err
    assert ran.code == code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("resnet5O", ("resnet5O", "did you mean resnet50")),
        ("qqqqqqqqqqq", ("unknown model", "module:callable")),
        ("resnet10t.no_such_tag", ("no_such_tag",)),
        ("hf-hub:someone/something", ("hub", "--checkpoint")),
        ("timm/resnet50.a1_in1k", ("timm names have no 'timm/' in front: resnet50.a1_in1k",)),
        ("hf-hub:timm/resnet50.a1_in1k", ("timm names have no 'timm/' in front: resnet50.a1_in1k",)),
        ("timm:resnet50", ("timm names have no 'timm/' in front: resnet50",)),
        ("ResNet50", ("'ResNet50'", "written exactly: resnet50")),
        ("resnet50/", ("'resnet50/'", "written exactly: resnet50")),
        ("timm/nothing", ("timm/nothing", "no such folder")),
        ("resnet50.a1_in1", ("resnet50 has no pretrained tag 'a1_in1': did you mean resnet50.a1_in1k? known are",)),
        ("resnet50.nonsense", ("resnet50 has no pretrained tag 'nonsense'", "resnet50.ra_in1k")),
        ("./nothing", ("./nothing", "no such folder")),
        (".", ("manifest.json",)),
        ("resnet10t --include layer9*", ("layer9*", "matches no")),
        ("resnet10t --exclude re:[", ("re:[",)),
        ("resnet10t --se-ratio 0", ("se_ratio",)),
        ("resnet10t --se-ratio many", ("--se-ratio", "--help")),
        ("resnet10t --heads 0", ("heads",)),
        ("resnet10t --mixing perhaps", ("--mixing", "always")),
        ("resnet10t --input-size 3 0 64", ("--input-size", "at least 1")),
        ("resnet10t --input-size 3 64", ("--input-size",)),
        ("resnet10t --input-size 4 64 64", ("4x64x64",)),
        ("vgg11 --input-size 3 8 8", ("vgg11", "3x8x8", "too small", "larger --input-size")),
        ("resnet10t --frobnicate", ("--frobnicate", "inspect --help")),
        ("--json", ("MODEL",)),
        ("net_for_cli:fails", ("RuntimeError", "first line")),
        ("net_for_cli:Nett", ("did you mean Net?",)),
        ("net_for_cli:number", ("int", "callable")),
        ("net_for_cli:built", ("callable",)),
        ("os:getcwd", ("str", "torch.nn.Module")),
        ("no_such_module:Net", ("cannot import no_such_module",)),
        ("net_for_cli:", ("package.module:callable",)),
    ],
)
def test_mistakes_of_inspect(run: Any, folder: Path, arguments: str, words: tuple[str, ...]) -> None:
    if arguments.startswith("net_for_cli:"):  # which prints when it is built, to stderr
        (folder / "net_for_cli.py").write_text(NETWORK.replace("print(", "(lambda *_: None)("))
    before = files(folder)
    one_line(run("inspect", *arguments.split()), 2, *words)
    assert files(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("resnet5O -o out", ("did you mean resnet50",)),
        ("resnet50.nonsense -o out --pretrained", ("resnet50 has no pretrained tag 'nonsense'",)),
        ("resnet10t", ("--output", "convert --help")),
        ("resnet10t -o net_for_cli.py", ("net_for_cli.py", "is a file")),
        ("resnet10t -o net_for_cli.py/out", ("net_for_cli.py", "is a file")),
        ("resnet10t -o /proc/nowhere/out", ("/proc/nowhere/out", "another folder")),
        ("resnet10t -o out --include nothing*", ("nothing*",)),
        ("resnet10t -o out --exclude *", ("nothing to convert", "inspect")),
        ("vgg11 --input-size 3 8 8 -o out", ("too small",)),
        ("resnet10t -o out --checkpoint missing.pth", ("missing.pth", "no such file")),
        ("resnet10t -o out --checkpoint net_for_cli.py", ("net_for_cli.py",)),
        ("resnet10t -o out --checkpoint code.pth", ("code.pth", "code")),
        ("resnet10t -o out --checkpoint other.pth", ("other.pth", "conv1.weight")),
        ("resnet10t -o out --checkpoint other.pth --pretrained", ("--pretrained", "--checkpoint")),
        ("net_for_cli:Net -o out --pretrained", ("--pretrained", "timm")),
        ("resnet10t -o out --html no/where.html", ("no/where.html", "no folder")),
        ("resnet10t -o out --html .", ("is a folder",)),
    ],
)
def test_mistakes_of_convert(run: Any, folder: Path, arguments: str, words: tuple[str, ...]) -> None:
    (folder / "net_for_cli.py").write_text(NETWORK.replace("print(", "(lambda *_: None)("))
    torch.save(RunsOnUnpickling(folder / "ran"), folder / "code.pth")
    torch.save({"conv1.weight": torch.zeros(3)}, folder / "other.pth")
    before = files(folder)
    one_line(run("convert", *arguments.split()), 2, *words)
    assert files(folder) == before


class RunsOnUnpickling:
    """Makes a file if it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def newer(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 999}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, ("model.safetensors",)),
        (newer, ("newer",)),
    ],
)
@pytest.mark.parametrize("command", [("inspect",), ("convert", "-o", "new")])
def test_a_damaged_artifact_is_refused(
    run: Any, folder: Path, artifact: Path, damage: Any, words: Any, command: Any
) -> None:
    damage(shutil.copytree(artifact, folder / "out"))
    before = files(folder)
    one_line(run(command[0], "out", *command[1:]), 2, "out", *words)
    assert files(folder) == before


def test_no_network_is_a_failure_not_a_mistake(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **options: Any) -> Any:
        if options.get("pretrained"):
            raise OSError("Name or service not known\nand more")
        raise AssertionError

    monkeypatch.setattr(timm, "create_model", unreachable)
    one_line(run("convert", "resnet18", "-o", "out", "--pretrained"), 1, "Name or service not known", "network")
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_a_fault_is_one_line_and_debug_shows_where(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("ddf_convert.report.report", broken)
    one_line(run("inspect", "resnet10t", *SMALL, "--json"), 1, "ZeroDivisionError: by zero", "--debug")
    shown = run("inspect", "resnet10t", *SMALL, "--json", "--debug")
    assert shown.code == 1
    assert "Traceback" in shown.err
    assert "test_cli.py" in shown.err


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "ddf_convert.cli", "inspect", "resnet10t", *SMALL]
    ran = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (1, "")


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "streams", "code", "words"),
    [
        ("recipes show quick", ">&-", 0, ""),
        pytest.param("recipes show quick", "</dev/null | head -1 | wc -l", 0, "1\n", marks=pytest.mark.long),
        ("recipes list --json", ">/dev/full", 1, "error: stdout cannot be written: No space left on device\n"),
        ("recipes show nonsense", ">&- 2>&-", 2, ""),
        pytest.param("recipes show quick", ">&- 2>&- <&-", 0, "", marks=pytest.mark.long),
        pytest.param("recipes show quick", "2>/dev/full >/dev/null", 0, "", marks=pytest.mark.long),
        pytest.param(
            *("--help", ">/dev/full", 1, "error: stdout cannot be written: No space left on device\n"),
            marks=pytest.mark.long,
        ),
        pytest.param("recipes show nonsense", "2>/dev/full", 2, "", marks=pytest.mark.long),
    ],
)
def test_streams_that_are_closed_or_full(folder: Path, arguments: str, streams: str, code: int, words: str) -> None:
    command = f"{{ {sys.executable} -m ddf_convert {arguments}; echo $? >&3; }} 3>code {streams}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, env=environment)
    assert ran.stdout + ran.stderr == words
    assert (folder / "code").read_text() == f"{code}\n"


@pytest.mark.slow
def test_work_is_not_lost_with_its_streams(folder: Path) -> None:
    """No file of ours takes the number of a stream that is closed, and then gets what is printed."""
    command = f"{sys.executable} -m ddf_convert convert net_for_cli:Net -o out --input-size 3 16 16 >&- 2>&- <&-"
    subprocess.run(["sh", "-c", command], check=True, timeout=120)
    assert read_manifest(folder / "out").conversion.replaced
    code = (
        "from ddf_convert.commands.console import secure_streams; secure_streams();"
        "file = open('opened', 'w'); print(file.fileno(), file=file); print('lost')"
    )
    subprocess.run(["sh", "-c", f'{sys.executable} -c "{code}" >&- 2>&- <&-'], check=True, timeout=60)
    assert int((folder / "opened").read_text()) > 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "x" * 300),
        ("inspect", f"folder/{'x' * 300}"),
        ("convert", "resnet10t", "-o", "out", "--checkpoint", "x" * 300),
        ("inspect", "resnet10t", "--recipe", "x" * 300),
        ("depth", "predict", "--rgb", "x" * 300, "--depth", "x.png", "--checkpoint", "x", "-o", "y.png"),
    ],
)
def test_names_that_are_too_long_for_a_file(run: Any, arguments: tuple[str, ...]) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    (line,) = ran.err.splitlines()
    assert "fault of ddf-convert" not in line


def test_version_and_help(run: Any) -> None:
    assert run("--version").out == f"ddf-convert {ddf.__version__}\n"
    for command in ("inspect", "convert", "depth", "doctor"):
        assert command in run("--help").out
        shown = run(command, "--help")
        assert shown.code == 0
        assert max(map(len, shown.out.splitlines())) <= 80


@pytest.mark.parametrize(("old", "new"), [("upsample", "predict"), ("upsample-train", "train")])
def test_older_names_of_the_depth_commands_still_work_and_are_hidden(run: Any, old: str, new: str) -> None:
    ran = run(old, "--help")
    assert ran.code == 0
    assert ran.out.replace(old, f"depth {new}").split() == run("depth", new, "--help").out.split()
    assert old not in run("--help").out.split()


def test_the_help_of_conversion_options_is_that_of_their_fields(run: Any) -> None:
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run("inspect", "--help").out).split())
    for name, field in ddf.ConvertConfig.model_fields.items():
        option = "filter-option" if name == "filter_options" else name.replace("_", "-")
        assert f"--{option} " in shown
        assert " ".join(field.description.replace("``", "`").split()) in shown
