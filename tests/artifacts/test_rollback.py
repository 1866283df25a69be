"""A restore that fails leaves the model unchanged."""

import copy
import shutil

import pytest
import timm
import torch
from support.artifacts import IMAGE, SMALL, recast, same_state, shaken, tiny
from torch import nn

from ddf_convert.artifacts import artifact
from ddf_convert.artifacts.artifact import restore, save
from ddf_convert.conversion import convert, recorded
from ddf_convert.errors import ArtifactError


def test_restore_is_all_or_nothing_with_foreign_weights(tmp_path):
    model = tiny()
    for dtype in (torch.int32, torch.complex64, torch.float8_e5m2):
        save(model, tmp_path / "out")
        recast("0.bias", dtype)(tmp_path / "out")
        fresh = tiny(5.0)
        before = Seen(fresh)
        with pytest.raises(ArtifactError, match="another dtype"):
            restore(fresh, tmp_path / "out")
        before.check(fresh)
        shutil.rmtree(tmp_path / "out")


class Seen:
    """All of a model: modules by identity, values by their bits, attributes, hooks and modes."""

    def __init__(self, model):
        self.parts = [(name, part, type(part)) for name, part in model.named_modules(remove_duplicate=False)]
        self.attributes = [copy.copy(vars(part)) for _, part, _ in self.parts]
        self.inner = [
            {key: list(value.items()) for key, value in vars(part).items() if isinstance(value, dict)}
            for _, part, _ in self.parts
        ]
        tensors = [*model.parameters(), *model.buffers()]
        self.tensors = [(t, t.data_ptr(), t.dtype, t.stride(), t.requires_grad, t.detach().clone()) for t in tensors]
        self.notes = copy.deepcopy([getattr(part, "notes", None) for _, part, _ in self.parts])

    def check(self, model):
        now = Seen(model)
        assert [(name, id(part), kind) for name, part, kind in now.parts] == [
            (name, id(part), kind) for name, part, kind in self.parts
        ]
        for one, other in zip(now.attributes, self.attributes, strict=True):
            assert list(one) == list(other)
            assert all(one[name] is other[name] for name in one)
        for one, other in zip(now.inner, self.inner, strict=True):
            assert {key: [(name, id(value)) for name, value in items] for key, items in one.items()} == {
                key: [(name, id(value)) for name, value in items] for key, items in other.items()
            }
        assert now.notes == self.notes
        for one, other in zip(now.tensors, self.tensors, strict=True):
            assert one[0] is other[0]
            assert one[1:5] == other[1:5]
            assert torch.equal(one[5].reshape(-1).view(torch.uint8), other[5].reshape(-1).view(torch.uint8))


class Noted(nn.Module):
    """With everything that a restore could leave changed; its own part of loading can be made to fail."""

    def __init__(self, fails=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1))
        self.up = nn.Upsample(scale_factor=2)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        self.notes = {"seen": [1, {"deep": 2}]}
        self.fails = fails
        self.body[1].train(False)
        self.body[0].weight.requires_grad_(False)
        self.body[0].register_forward_hook(print)

    def get_extra_state(self):
        return torch.ones(1)

    def set_extra_state(self, state):
        self.notes["seen"][1]["deep"] = 3
        self.notes["more"] = True
        self.attribute = 5
        if self.fails:
            raise KeyError("mine")

    def forward(self, x):
        return torch.nn.functional.interpolate(self.up(self.body(x)), scale_factor=2)


def fails_in(name, after=0):
    """Makes a step of restoring fail, once what comes before it is done."""

    def change(patch):
        target, attribute = name
        original = getattr(target, attribute)

        def failing(*args, **kwargs):
            if after:
                original(*args, **kwargs)
            raise RuntimeError("in the middle")

        patch.setattr(target, attribute, failing)

    return change


MIDDLE = {
    "set_extra_state": lambda patch: None,
    "replacement": fails_in((artifact, "apply_replacements")),
    "after the replacement": fails_in((artifact, "_cast")),
    "after the dtypes": fails_in((artifact, "_cast"), after=1),
    "load_state_dict": fails_in((nn.Module, "load_state_dict")),
    "after load_state_dict": fails_in((nn.Module, "load_state_dict"), after=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("place", MIDDLE)
def test_restore_that_fails_in_the_middle_changes_nothing(tmp_path, monkeypatch, place, dtype):
    image = torch.randn(1, 3, 20, 20)
    model = shaken(convert(Noted(), example_input=image, upsample=True)).to(dtype)
    assert len(recorded(model).replaced) == 3
    save(model, tmp_path / "out")
    fresh = Noted(fails=place == "set_extra_state")
    before = Seen(fresh)
    with monkeypatch.context() as patch:
        if place == "replacement":  # the sketch is converted too, and before
            calls, apply = [], artifact.apply_replacements

            def second(*args):
                calls.append(apply(*args))
                if len(calls) == 2:
                    raise RuntimeError("in the middle")
                return calls[-1]

            patch.setattr(artifact, "apply_replacements", second)
        else:
            MIDDLE[place](patch)
        with pytest.raises(ArtifactError, match=r"out: what it records cannot be done to Noted: (Runtime|Key)Error: "):
            restore(fresh, tmp_path / "out")
    before.check(fresh)
    if place != "set_extra_state":
        assert same_state(restore(fresh, tmp_path / "out"), model)


def test_a_ctrl_c_in_the_middle_changes_nothing(tmp_path, monkeypatch):
    save(tiny(1.0), tmp_path / "out")
    fresh = tiny(5.0)
    before = Seen(fresh)

    def interrupted(*args, **kwargs):
        nn.init.zeros_(fresh[0].weight)
        raise KeyboardInterrupt

    monkeypatch.setattr(nn.Module, "load_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        restore(fresh, tmp_path / "out")
    before.check(fresh)


def test_load_original_is_all_or_nothing(tmp_path, monkeypatch):
    save(tiny(1.0), tmp_path / "out", original=tiny(1.0).half())
    fresh = tiny(5.0)
    before = Seen(fresh)
    with monkeypatch.context() as patch:
        fails_in((nn.Module, "load_state_dict"), after=1)(patch)
        with pytest.raises(ArtifactError, match="in the middle"):
            artifact.load_original(tmp_path / "out", fresh)
    before.check(fresh)
    assert artifact.load_original(tmp_path / "out", fresh)[0].weight.dtype == torch.float16


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
