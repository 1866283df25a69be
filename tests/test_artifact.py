"""Save, load, restore: equal outputs in a new process; every damage refused; interrupted at any moment, old or new."""

import copy
import json
import os
import pickle
import random
import shutil
import subprocess
import sys

import networks as net
import pytest
import safetensors.torch
import timm
import torch
from tolerances import far
from torch import nn

from ddf_convert import artifact, folder
from ddf_convert.artifact import TimmSource, load, load_checkpoint, read_manifest, restore, save
from ddf_convert.errors import ArtifactError, DDFError, UsageError
from ddf_convert.graph import convert, plan, recorded

IMAGE = torch.empty(1, 3, 64, 64)
SMALL = "resnet10t"


def shaken(model):
    """Every parameter and buffer moved off its initial value, batch norm statistics included."""
    generator = torch.Generator().manual_seed(7)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator).to(tensor) * 0.1)
        else:
            tensor.add_(3)
    return model.eval()


def converted(name=SMALL, **options):
    torch.manual_seed(0)
    return shaken(convert(timm.create_model(name, **{"num_classes": 5, **options}), example_input=IMAGE))


@pytest.fixture(scope="module")
def model():
    return converted()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "out"
    save(model, path, report={"model": SMALL})
    return path


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of a good artifact, to damage."""
    return shutil.copytree(saved, tmp_path / "damaged")


def same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value, second[name]) for name, value in first.items()
    )


# --- round trips ---


def test_a_new_process_gives_equal_outputs(model, saved, tmp_path):
    image = torch.randn(2, 3, 64, 64)
    torch.save(image, tmp_path / "image.pt")
    script = (
        "import sys, torch, ddf_convert\n"
        "model = ddf_convert.load(sys.argv[1])\n"
        "assert not model.training\n"
        "with torch.no_grad(): torch.save(model(torch.load(sys.argv[2])), sys.argv[3])\n"
    )
    arguments = [saved, tmp_path / "image.pt", tmp_path / "output.pt"]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True)
    with torch.no_grad():
        assert torch.equal(model(image), torch.load(tmp_path / "output.pt"))


def test_folders_of_the_first_format_are_read(model, saved, tmp_path):
    old = shutil.copytree(saved, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["format_version"] = 1
    del manifest["original"], manifest["original_shared"], manifest["conversion"]["recipe"]
    for config in manifest["conversion"]["configs"]:
        del config["affine"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert same_state(load(old), model)


def test_what_is_in_the_folder(model, saved):
    assert sorted(os.listdir(saved)) == ["manifest.json", "model.safetensors", "report.json"]
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["format"] == "ddf_convert"
    assert manifest["format_version"] == 4
    assert manifest["source"] == {"kind": "timm", "name": SMALL, "kwargs": {"num_classes": 5}}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["dtype"] == "float32"
    assert json.loads((saved / "report.json").read_text()) == {"model": SMALL}
    assert read_manifest(saved).conversion == recorded(model)
    assert set(safetensors.torch.load_file(saved / "model.safetensors")) == set(model.state_dict())


def test_loading_and_saving_again_keeps_everything(model, saved, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    loaded = load(saved)
    assert torch.equal(state, torch.get_rng_state())
    assert same_state(loaded, model)
    assert recorded(loaded) == recorded(model)
    save(loaded, tmp_path / "again")
    assert read_manifest(tmp_path / "again").weights == read_manifest(saved).weights


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, lambda model: model.half()),
        ({}, lambda model: model.to(torch.float64)),
        ({}, lambda model: model.to(memory_format=torch.channels_last)),
        ({"in_chans": 1}, lambda model: model),
        ({"num_classes": 0}, lambda model: model),
        ({}, lambda model: model.reset_classifier(7) or model),
    ],
)
def test_timm_models_are_recognised(tmp_path, options, change):
    image = torch.randn(1, options.get("in_chans", 3), 64, 64)
    base = timm.create_model(SMALL, **{"num_classes": 5, **options})
    model = change(shaken(convert(base, example_input=image))).eval()
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert same_state(loaded, model)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        # Another memory format adds up in another order.
        expected = model(image.to(dtype))
        torch.testing.assert_close(loaded(image.to(dtype)), expected, **far(dtype, expected))


def test_a_model_converted_twice(tmp_path):
    once = convert(timm.create_model(SMALL, num_classes=5), example_input=IMAGE, include="layer1.*")
    twice = shaken(convert(once, example_input=IMAGE, combine="add"))
    save(twice, tmp_path / "out")
    assert same_state(load(tmp_path / "out"), twice)


def test_a_changed_timm_model_is_the_users_own(tmp_path):
    model = converted()
    model.layer1[0].act1 = nn.SiLU()  # no weight tells
    save(model, tmp_path / "out")
    assert read_manifest(tmp_path / "out").source.kind == "own"
    with pytest.raises(UsageError, match=r"it has .*SiLU.* where timm builds .*ReLU"):
        save(model, tmp_path / "other", source=SMALL)
    assert not (tmp_path / "other").exists()


def test_a_source_can_be_given(tmp_path):
    model = shaken(convert(timm.create_model(SMALL, num_classes=5, drop_rate=0.2), example_input=IMAGE))
    save(model, tmp_path / "out", source=TimmSource(name=SMALL, kwargs={"num_classes": 5, "drop_rate": 0.2}))
    assert same_state(load(tmp_path / "out"), model)
    with pytest.raises(UsageError, match="cannot be saved as timm's resnet5O: timm has no model"):
        save(model, tmp_path / "other", source="resnet5O")


class MixedDtypes(net.Residual):
    """A float64 parameter among float32 ones."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        return super().forward(x) + self.offset.to(x.dtype)


OWN = {
    "bottleneck": lambda: net.bottleneck(net.conv()),
    "two names": net.TwoNames,
    "shared": net.Shared,
    "tied": net.TiedWeights,
    "gated": net.Gated,
    "bfloat16": lambda: net.bottleneck(net.conv()).to(torch.bfloat16),
    "mixed dtypes": lambda: MixedDtypes(),
}


@pytest.mark.parametrize("name", OWN)
def test_restore(name, tmp_path):
    build = OWN[name]
    image = torch.randn(1, 3, 20, 20)
    first = build()
    model = shaken(convert(first, example_input=image.to(list(first.parameters())[-1].dtype)))
    save(model, tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"a model of your own .*restore"):
        load(tmp_path / "out")
    fresh = build().train()
    assert restore(fresh, tmp_path / "out") is fresh
    assert fresh.training
    assert same_state(fresh, model)
    assert recorded(fresh) == recorded(model)


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    model = shaken(net.TiedWeights())
    save(model, tmp_path / "out")
    assert "b.weight" not in safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    fresh = restore(net.TiedWeights(), tmp_path / "out")
    assert fresh.b.weight is fresh.a.weight
    assert torch.equal(fresh.b.weight, model.a.weight)


def test_views_of_one_memory_are_saved(tmp_path):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            memory = torch.randn(40)
            self.a, self.b = nn.Parameter(memory[:10]), nn.Parameter(memory[10:30].view(4, 5).t())
            self.register_buffer("c", torch.randn(1).expand(6))

    model = Flat()
    save(model, tmp_path / "out")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())


# --- refusals ---


def edit(**changes):
    def change(path):
        content = json.loads((path / "manifest.json").read_text())
        content.update(changes)
        (path / "manifest.json").write_text(json.dumps(content))

    return change


def write(name, data):
    return lambda path: (path / name).write_bytes(data)


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(path):
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def other_weights(path):
    """Weights of another model, under a manifest that vouches for them."""
    safetensors.torch.save_file({"fc.weight": torch.zeros(3)}, path / "model.safetensors")
    edit(weights=folder.FileRecord.of(path / "model.safetensors").model_dump())(path)


def not_weights(path):
    (path / "model.safetensors").write_bytes(b"\xff" * 64)
    edit(weights=folder.FileRecord.of(path / "model.safetensors").model_dump())(path)


def edit_step(**changes):
    def change(path):
        content = json.loads((path / "manifest.json").read_text())
        step = content["conversion"]["replaced"][0]
        step["replacement"]["options"].update(changes)
        (path / "manifest.json").write_text(json.dumps(content))

    return change


def timm_source(**fields):
    return edit(source={"kind": "timm", "name": SMALL, "kwargs": {}, **fields})


DAMAGE = {
    "no folder": (shutil.rmtree, "no such folder"),
    "a file": (lambda path: shutil.rmtree(path) or path.write_text(""), "is a file, not a folder"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "not an artifact of ddf_convert"),
    "manifest cut off": (write("manifest.json", b'{"format": "ddf'), "is not JSON"),
    "manifest is binary": (write("manifest.json", b"\xff\xfe\x00"), "is not JSON"),
    "manifest nested deeply": (write("manifest.json", b"[" * 100_000), "is not JSON"),
    "manifest is a list": (write("manifest.json", b"[]"), "is not a manifest of ddf_convert"),
    "manifest of something else": (edit(format="other"), "is not a manifest of ddf_convert"),
    "newer version": (
        edit(format_version=5),
        r"written by a newer ddf_convert \(format 5, this one reads 4\); upgrade",
    ),
    "version that never was": (edit(format_version=0), "format_version"),
    "unknown field": (edit(surprise=1), "surprise: Extra inputs"),
    "no conversion": (edit(conversion=None), "conversion: "),
    "weights missing": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    "weights truncated": (truncate, "it is incomplete"),
    "weights damaged": (flip, "SHA-256"),
    "weights of another model": (other_weights, r"\d+ missing \(conv1.*\); 1 of another shape \(fc\.weight is 3 and"),
    "weights are no safetensors": (not_weights, "model.safetensors is damaged"),
    "shared with nothing": (edit(shared={"a": "b"}), "b is not among the weights"),
    "unknown timm model": (timm_source(name="resnet5O"), "has no model 'resnet5O'"),
    "a model from the network": (timm_source(name="hf-hub:someone/something"), "has no model"),
    "reads a file": (timm_source(kwargs={"checkpoint_path": "x.pth"}), "checkpoint_path is not an argument"),
    "downloads": (timm_source(kwargs={"pretrained": True}), "pretrained is not an argument"),
    "unknown argument": (timm_source(kwargs={"colour": 1}), "cannot build resnet10t"),
    "another width": (timm_source(kwargs={"num_classes": 6}), "2 of another shape"),
    "no such layer": (edit_step(colour=1), "cannot be built"),
    "other channels": (edit_step(in_channels=10**9), "has in_channels"),
    "other kernel": (edit_step(kernel_size=10**6 + 1), "has kernel_size 3"),
    "huge squeeze": (edit_step(se_ratio=1e30), "cannot be built"),
    "wrong type": (edit_step(heads="many"), "cannot be built"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_in_one_line(damaged, case):
    change, message = DAMAGE[case]
    change(damaged)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(damaged)
    assert "\n" not in str(caught.value)
    assert "damaged" in str(caught.value)  # the folder's name


def test_a_damaged_report_stands_in_no_models_way(damaged, model):
    (damaged / "report.json").write_text("?")
    assert same_state(load(damaged), model)


def test_random_damage_to_the_manifest_is_refused_or_harmless(damaged, model):
    generator = random.Random(0)
    original = (damaged / "manifest.json").read_bytes()
    refused = 0
    for _ in range(60):
        data = bytearray(original)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.choice(b'0179"{}[],:az\xff ')
        (damaged / "manifest.json").write_bytes(data)
        try:
            loaded = load(damaged)
        except ArtifactError:
            refused += 1
        else:
            assert same_state(loaded, model)
    assert refused > 20


@pytest.mark.parametrize("change", ["another model", "already converted", "meta device"])
def test_restore_into_the_wrong_model_changes_nothing(saved, change):
    wrong = timm.create_model("resnet14t" if change == "another model" else SMALL, num_classes=5)
    if change == "already converted":
        wrong = convert(wrong, example_input=IMAGE)
    if change == "meta device":
        wrong = wrong.to("meta")
    modules, state = dict(wrong.named_modules()), {k: v.clone() for k, v in wrong.state_dict().items()}
    message = {"another model": "not fit", "already converted": "already converted", "meta device": "meta device"}
    with pytest.raises(ArtifactError, match=message[change]):
        restore(wrong, saved)
    assert dict(wrong.named_modules()) == modules
    assert change == "meta device" or all(torch.equal(state[k], v) for k, v in wrong.state_dict().items())


def test_models_that_cannot_be_saved(tmp_path):
    class Extra(nn.Module):
        def get_extra_state(self):
            return {"anything": 1}

    with pytest.raises(UsageError, match="weight is on the meta device"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "out")
    with pytest.raises(UsageError, match="_extra_state is not a tensor"):
        save(Extra(), tmp_path / "out")
    assert os.listdir(tmp_path) == []


# --- places that cannot be written ---


def place_file(path):
    path.write_text("")
    return path


def place_under_file(path):
    path.write_text("")
    return path / "deeper" / "out"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (place_file, "is a file"),
        (place_under_file, "is a file"),
        (lambda path: path / ("x" * 300), "cannot write to .*name too long"),
        (lambda path: path / "nul\0byte", "cannot write to"),
    ],
)
def test_places_that_cannot_be_written(tmp_path, place, message, model):
    path = place(tmp_path / "here")
    before = sorted(tmp_path.rglob("*"))
    for attempt in (artifact.check_writable, lambda path: save(model, path)):
        with pytest.raises(ArtifactError, match=f"(?i){message}"):
            attempt(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_permission(tmp_path, model, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder.tempfile, "TemporaryFile", refuse)  # root may write anywhere, so chmod proves nothing
    for attempt in (artifact.check_writable, lambda path: save(model, path)):
        with pytest.raises(ArtifactError, match=r"cannot write to .*out: Permission denied; choose another folder"):
            attempt(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_check_writable_leaves_nothing_and_save_makes_parents(tmp_path, model):
    artifact.check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []
    save(model, tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a") == ["b"]


# --- interruptions ---


class Killed(BaseException):
    """As if the power went."""


def killed_at(count, monkeypatch):
    """Makes the ``count``-th step of writing the last one, with no cleaning up after it."""
    steps = {"left": count}

    def interrupted(call):
        def wrapped(*args, **kwargs):
            if steps["left"] == 0:
                raise Killed
            steps["left"] -= 1
            return call(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(folder.os, "replace", interrupted(os.replace))
    monkeypatch.setattr(folder.os, "rename", interrupted(os.rename))
    monkeypatch.setattr(folder.os, "fsync", interrupted(os.fsync))
    monkeypatch.setattr(artifact.safetensors.torch, "save_file", interrupted(safetensors.torch.save_file))
    monkeypatch.setattr(folder.shutil, "rmtree", lambda *args, **kwargs: None)


def small(value, report):
    model = nn.Sequential(nn.Conv2d(3, 2, 1))
    nn.init.constant_(model[0].weight, value)
    return model, {"value": report}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("second_report", [True, False])
def test_interrupted_at_any_moment_it_is_old_or_new(tmp_path, existing, second_report):
    """Killed at each step in turn; read after it; and saved again after it."""
    old, new, third = 1.0, 2.0, 3.0
    seen = set()
    for count in range(100):
        path = tmp_path / str(count)
        if existing:
            model, report = small(old, old)
            save(model, path, report=report)
        model, report = small(new, new)
        with pytest.MonkeyPatch.context() as patch:
            killed_at(count, patch)
            try:
                save(model, path, report=report if second_report else None)
                done = True
            except Killed:
                done = False
        copied = shutil.copytree(path, tmp_path / f"{count} again") if path.exists() else None
        if not path.exists():
            assert not existing
            found = None
        else:
            found = restore(nn.Sequential(nn.Conv2d(3, 2, 1)), path)[0].weight.mean().item()
            manifest = read_manifest(path)
            if manifest.report is not None:
                assert json.loads((path / "report.json").read_text()) == {"value": found}
        assert found in ({old, new} if existing else {None, new})
        seen.add(found)
        if copied:  # a save that meets an interrupted one, and is interrupted in turn before its own manifest
            with pytest.MonkeyPatch.context() as patch:
                killed_at(1, patch)
                with pytest.raises(Killed):
                    save(small(third, third)[0], copied)
            assert restore(nn.Sequential(nn.Conv2d(3, 2, 1)), copied)[0].weight.mean().item() in (found, third)
            save(small(third, third)[0], copied)
            assert restore(nn.Sequential(nn.Conv2d(3, 2, 1)), copied)[0].weight.mean().item() == third
        if done:
            break
    assert done
    assert found == new
    assert len(seen) == 2


def test_a_failed_write_leaves_nothing_behind(tmp_path, model, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact.safetensors.torch, "save_file", full)
    with pytest.raises(DDFError, match=r"could not write .*out: No space left on device"):
        save(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_files_are_as_readable_as_any_other(tmp_path, model):
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    save(model, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_saving_over_an_artifact_replaces_it(tmp_path):
    for value in (1.0, 2.0):
        model, report = small(value, value)
        save(model, tmp_path / "out", report=report)
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "model.safetensors", "report.json"]
    save(model, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]


# --- foreign weights ---


class Trap:
    """Pickled, it runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def with_prefix(state):
    return {f"module.{name}": value for name, value in state.items()}


WRAPPINGS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "module.": with_prefix,
    "both": lambda state: {"state_dict": with_prefix(state)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_checkpoints_of_torch(wrapping, tmp_path):
    source, target = shaken(net.bottleneck(net.conv())), net.bottleneck(net.conv())
    torch.save(WRAPPINGS[wrapping](source.state_dict()), tmp_path / "weights.pth")
    load_checkpoint(target, tmp_path / "weights.pth")
    assert same_state(source, target)


def test_checkpoints_in_safetensors(tmp_path):
    source, target = shaken(net.bottleneck(net.conv())), net.bottleneck(net.conv())
    safetensors.torch.save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_checkpoint(target, str(tmp_path / "weights.safetensors"))
    assert same_state(source, target)


BAD_CHECKPOINTS = {
    "absent": ("x.pth", lambda path: None, "no such file"),
    "folder": ("x.pth", lambda path: path.mkdir(), "is a folder"),
    "garbage": ("x.pth", lambda path: path.write_bytes(b"garbage"), "cannot be read as a checkpoint"),
    "empty": ("x.pth", lambda path: path.write_bytes(b""), "cannot be read as a checkpoint"),
    "bad safetensors": ("x.safetensors", lambda path: path.write_bytes(b"\xff" * 20), "cannot be read as a checkpoint"),
    "code in a zip": ("x.pth", lambda path: torch.save({"a": Trap(path.parent / "ran")}, path), "holds code"),
    "code in a pickle": (
        "x.pth",
        lambda path: path.write_bytes(pickle.dumps({"a": Trap(path.parent / "ran")}, protocol=2)),
        "holds code",
    ),
    "a whole model": ("x.pth", lambda path: torch.save(nn.Linear(1, 1), path), "holds code"),
    "not weights": ("x.pth", lambda path: torch.save({"state_dict": {"a": 1}}, path), "'a' is not a tensor"),
    "one tensor": ("x.pth", lambda path: torch.save(torch.zeros(2), path), "checkpoint"),
    "another model": (
        "x.pth",
        lambda path: torch.save(nn.Conv2d(3, 2, 3).state_dict() | {"extra": torch.zeros(1)}, path),
        r"does not fit Conv2d: 1 not in the model \(extra\); 2 of another shape \(weight is 2x3x3x3 and should be 4x",
    ),
    "half of it": ("x.pth", lambda path: torch.save({"bias": torch.zeros(4)}, path), r"1 missing \(weight\)"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_checkpoints_that_are_refused(case, tmp_path):
    name, make, message = BAD_CHECKPOINTS[case]
    make(tmp_path / name)
    model = nn.Conv2d(3, 4, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=message) as caught:
        load_checkpoint(model, tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_plan_is_not_needed_to_load(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("loading decided something")

    monkeypatch.setattr("ddf_convert.graph.planner.trace", refuse)
    with pytest.raises(AssertionError):
        plan(timm.create_model(SMALL), IMAGE)
    load(saved)


def test_a_graph_module_is_restored_from_the_model_that_it_was(tmp_path):
    image = torch.randn(1, 3, 20, 20)
    graph = convert(net.Functions(), example_input=image, functional=True).eval()
    manifest = save(graph, tmp_path / "functions")
    assert manifest.source.model_class == "Functions"
    fresh = net.Functions()
    again = restore(fresh, tmp_path / "functions").eval()
    assert isinstance(again, torch.fx.GraphModule)
    assert torch.equal(again(image), graph(image))
    with pytest.raises(ArtifactError, match=r"does not fit Loop: it has no twice\.conv2d\(\)"):
        restore(net.Loop(), tmp_path / "functions")


def test_what_data_parallel_wraps_is_saved_and_restored(tmp_path):
    image = torch.randn(1, 3, 20, 20)
    wrapped = convert(nn.DataParallel(net.Loop()), example_input=image).eval()
    save(wrapped, tmp_path / "loop")
    for fresh in (net.Loop(), nn.DataParallel(net.Loop())):
        again = restore(fresh, tmp_path / "loop").eval()
        assert again is fresh
        assert torch.equal(again(image), wrapped(image))


def test_a_model_that_folds_pixels_into_channels_is_timms_too(tmp_path):
    folded = convert(timm.create_model("tresnet_m", num_classes=3), example_input=IMAGE, include="body.layer4.0.conv2*")
    assert save(folded, tmp_path / "folded").source == TimmSource(name="tresnet_m", kwargs={"num_classes": 3})
