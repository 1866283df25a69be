"""Recipe files: what is read, and errors that name file, line and key."""

from __future__ import annotations

import tracemalloc

import pytest

import ddf_convert as ddf
from ddf_convert.errors import UsageError
from ddf_convert.recipes.schema import Initialize


@pytest.mark.parametrize("name", ddf.recipes.names())
def test_built_in_recipes_are_valid_and_survive_being_written_out(name):
    recipe = ddf.recipes.load(name)
    assert recipe.name == name
    assert recipe.description
    assert ddf.recipes.parse(recipe.to_yaml()) == recipe
    assert ddf.recipes.parse(ddf.recipes.source(name)) == recipe


STAGE = "name: mine\nstages:\n  - name: one\n    optimizer: {lr: 0.1}\n"
EPOCH = STAGE + "    epochs: 1\n"
STEPS = STAGE + "    steps: 9\n"
INVALID = {
    "unknown key": ("name: mine\ninitialize:\n  methode: paper\n", 3, "initialize.methode", "did you mean method?"),
    "unknown key below an old one": ("name: mine\ninitialise:\n  methode: paper\n", 3, "initialise.methode", "method?"),
    "nearly an old key": ("name: mine\ninitialse: {}\n", 2, "initialse: unknown key; did you mean initialize?"),
    "old and new key": ("name: mine\ninitialise: {}\ninitialize: {}\n", 2, "initialise", "old name of initialize"),
    "new and old key": ("name: mine\ninitialize: {}\n\ninitialise: {}\n", 4, "initialise", "old name of initialize"),
    "key of a stage": (EPOCH + "    optimizer: {lr: 1}\n", 6, "stages.0.optimizer", "twice"),
    "key at the top": ("name: mine\nname: yours\n", 2, "name", "twice"),
    "missing": ("stages: []\n", None, "name", "is missing"),
    "type": (STAGE + "    epochs: many\n", 5, "stages.0.epochs", "integer"),
    "range": ("name: mine\nconversion:\n  heads: 0\n", 3, "conversion.heads", "greater"),
    "optimizer": (EPOCH.replace("lr: 0.1", "lr: 0.1, opt: adamx"), 4, "opt", "did you mean"),
    "epochs and steps": (EPOCH + "    steps: 1\n", 3, "stages.0", "one of the two"),
    "neither": (STAGE, 3, "stages.0", "one of the two"),
    "nothing to minimize": (EPOCH + "    losses: {task: 0}\n", 6, "losses", "every weight is 0"),
    "smoothing": (EPOCH + "    losses: {task: 0, logits: 1, label_smoothing: 0.1}\n", 6, "losses", "task loss"),
    "mixup": (EPOCH + "    losses: {task: 0, logits: 1}\n    augmentation: {mixup: 1}\n", 3, "stages.0", "mix labels"),
    "warm-up of epochs": (STEPS + "    schedule: {warmup_epochs: 1}\n", 3, "stages.0", "write warmup_steps"),
    "warm-up of steps": (EPOCH + "    schedule: {warmup_steps: 1}\n", 3, "stages.0", "write warmup_epochs"),
    "all warm-up": (EPOCH + "    schedule: {warmup_epochs: 1}\n", 3, "stages.0", "leaves nothing"),
    "schedule of epochs": (STEPS + "    schedule: {sched: step}\n", 3, "stages.0", "counts epochs"),
    "all and more": (EPOCH + "    trainable: [all, norms]\n", 3, "stages.0", "leaves nothing to add"),
    "no shifts": ("name: mine\ninitialize: {method: preserve}\n", None, "recipe", "affine: true"),
    "two stages of a name": (EPOCH + STAGE.partition("stages:\n")[2] + "    steps: 1\n", None, "recipe", "'one'"),
    "not a mapping": ("- 1\n", None, "", "not a recipe"),
    "not YAML": ("name: [\n", 2, "", "not YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID)
def test_errors_name_file_line_and_key(case, tmp_path):
    text, line, *words = INVALID[case]
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        ddf.recipes.load(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:{line}: " if line else f"{file}: ")
    assert all(word in message for word in words)
    assert "\n" not in message


def test_unknown_recipes_and_unreadable_files(tmp_path):
    with pytest.raises(UsageError, match="did you mean distill"):
        ddf.recipes.load("distil")
    with pytest.raises(UsageError, match=r"nothing\.yaml: cannot be read"):
        ddf.recipes.load(tmp_path / "nothing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        ddf.recipes.load(tmp_path / "bytes.yaml")
    with pytest.raises(UsageError, match="more than 1,048,576 bytes"):
        ddf.recipes.load("/dev/zero")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
HOSTILE = {
    "aliases of aliases": (BOMB, "more than 20,000 values"),
    "an alias of itself": ("a: &a [*a]\n", "more than 20,000 values"),
    "nested brackets": ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "much text": ("a: " + "x" * 2**20, "more than 1,048,576 bytes"),
    "many digits": ("a: " + "9" * 5000, "not YAML"),
    "a day that is none": ("a: 2024-13-77\n", "not YAML"),
    "a tag of Python": ("a: !!python/object/apply:os.system [ls]\n", "not YAML"),
    "a control character": ("a: \x07\n", "not YAML"),
    "a list as key": ("? [a]\n: b\n", "not YAML"),
    "a long key": ("name: a\n" + "x" * 1000 + ": 1\n", "characters\\)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_quickly(name, tmp_path):
    text, words = HOSTILE[name]
    (tmp_path / "r.yaml").write_text(text)
    if "alias" in name:  # the other files are as large as what is read from them, and tracing is slow
        tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=words) as caught:
            ddf.recipes.load(tmp_path / "r.yaml")
        assert tracemalloc.get_traced_memory()[1] < 100e6  # 0 where nothing is traced
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_changed_applies_to_all_stages():
    recipe = ddf.recipes.load("finetune").changed(epochs=1, lr=0.5, amp="bfloat16", batch_size=None)
    assert [(s.epochs, s.optimizer.lr, s.amp) for s in recipe.stages] == [(1, 0.5, "bfloat16")] * 2
    assert recipe.stages[0].batch_size == 64
    assert [s.epochs for s in ddf.recipes.load("finetune").stages] == [2, 10]
    shorter = ddf.recipes.load("finetune").changed(steps=20)
    assert [(s.steps, s.epochs, s.schedule.warmup_steps) for s in shorter.stages] == [(20, None, 2)] * 2


def test_stages_are_found_by_name_and_number():
    recipe = ddf.recipes.load("finetune")
    assert recipe.stage(1) == recipe.stage("everything") == recipe.stage(recipe.stages[1])
    with pytest.raises(UsageError, match="'everything'"):
        recipe.stage("nothing")
    with pytest.raises(UsageError, match="ends with the initialization"):
        ddf.recipes.load("preserve").stage(0)


def test_settings_of_the_initialization_are_checked():
    with pytest.raises(ValueError, match="steps"):
        Initialize(steps=-1)


# --- names of earlier versions ---


def test_the_old_key_is_read_and_the_new_one_written():
    old, new = ({"name": "mine", key: {"steps": 3}} for key in ("initialise", "initialize"))
    recipe = ddf.recipes.Recipe(**new)
    assert recipe.initialize_with.steps == 3
    assert recipe == ddf.recipes.Recipe(**old)
    assert recipe == ddf.recipes.Recipe.model_validate(old) == ddf.recipes.Recipe.model_validate(new)
    assert recipe == ddf.recipes.parse("name: mine\ninitialise: {steps: 3}\n")
    assert ddf.recipes.parse(recipe.to_yaml()) == recipe
    assert "\ninitialize:\n" in recipe.to_yaml()
    assert "initialise" not in recipe.to_yaml()
    with pytest.raises(ValueError, match="initialise"):
        ddf.recipes.Recipe(**{**old, **new})


def test_old_names_in_python_still_work():
    recipe = ddf.recipes.load("preserve")
    assert ddf.recipes.Initialised is ddf.recipes.Initialized
    assert ddf.recipes.Recipe.initialise is ddf.recipes.Recipe.initialize
    assert recipe.initialise_with is recipe.initialize_with
