"""benchmarks/zoo.py: tiny models through the code that takes every architecture of timm and torchvision."""

import json
import sys
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import zoo
from architectures import catalog, checks, forward, page
from support.tiny_architectures import Tiny
from torch import Tensor


def own(name):
    return catalog.Architecture("own", name, "support.tiny_architectures")


def test_a_model_that_passes():
    line = checks.check_shapes(own("Tiny"))
    counts = {"convs": 3, "3x3": 3, "sites": 3, "default": 1, "everything": 3}
    assert "failures" not in line, line
    assert {name: line[name] for name in counts} == counts
    assert line["seconds"] >= 0


def test_a_model_that_cannot_be_built_is_a_failure_of_its_line():
    line = checks.check_shapes(own("Unbuilt"))
    (failure,) = line["failures"]
    assert (failure["step"], failure["reason"]) == ("build", "RuntimeError: no such luck")
    assert failure["at"].startswith("support/tiny_architectures.py:")


def test_differences_of_a_converted_model_are_failures(monkeypatch):
    convert = checks.ddf.convert

    def drops_one(model, plan):
        other = plan.model_copy(deep=True)
        other.replaced[-1].skip()
        return convert(model, other)

    monkeypatch.setattr(checks.ddf, "convert", drops_one)
    line = checks.check_shapes(own("Tiny"))
    reasons = {failure["step"]: failure["reason"] for failure in line["failures"]}
    assert set(reasons) == {"forward, default", "totals, default"}
    assert reasons["forward, default"] == "the forward pass runs 0 DDF operators, the plan has 1 calls of new layers"
    assert page.headline([line], [], 1, 0).startswith(
        "1 of 1 architectures looked at; 1 of 1 architectures with a 3x3 conv"
    )
    assert "0 converted by default, 0 more on request, 1 failures" in page.headline([line], [], 1, 0)


def test_replace_all_is_what_the_options_do():
    model, image = Tiny(), torch.rand(1, 3, 16, 16)
    plan, asked = checks.ddf.plan(model, image), checks.ddf.plan(model, image, **checks.EVERYTHING)
    assert checks.replace_all(model, plan) == 2
    assert [(site.action, site.replacement) for site in plan] == [(site.action, site.replacement) for site in asked]


@dataclass
class Boxes:
    found: Tensor


def test_structure_describes_nested_outputs():
    value = {"a": (torch.empty(2, 3), None), "b": [Boxes(torch.empty(5, dtype=torch.int64))]}
    assert forward.structure(value) == "dict(a=tuple(float32[2, 3], NoneType), b=list(Boxes(dict(found=int64[5]))))"
    assert forward.structure(value["b"], first="n") == "list(Boxes(dict(found=int64[n])))"
    assert [tensor.dim() for tensor in forward.tensors(value)] == [2, 1]


def test_the_catalog_has_all_of_both_libraries():
    everything = catalog.catalog()
    names = {(a.library, a.name) for a in everything}
    assert len(everything) == len(names) > 1300
    assert not any(name.startswith("ddf_") for _, name in names)
    chosen = zoo.choose(everything, only="*resnet*", library="torchvision", per_file=2)
    assert [a.name for a in chosen if a.file == "torchvision.models.resnet"] == ["resnet101", "resnet34"]
    assert max(Counter(a.file for a in chosen).values()) == 2
    assert len(zoo.choose(everything, library="timm", per_file=12)) == sum(
        min(12, number) for number in Counter(a.file for a in everything if a.library == "timm").values()
    )
    several = zoo.choose(everything, library="torchvision", per_file=9)
    assert len(several) == len({a.name for a in several})


@pytest.mark.slow
def test_a_saved_model_is_loaded_by_another_process():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in every worker: the last bits depend on it
    try:
        line = checks.check_real(own("Tiny"))
    finally:
        torch.set_num_threads(threads)
        checks._loader.stop()
    assert "failures" not in line, line
    assert line["replaced"] == 3
    assert "| Tiny (own) | own | 3 | equal |" in page.page([], [line], 1, "timm")


def test_real_numbers_are_for_the_smallest_of_each_file():
    entries = [own("Tiny"), own("Large"), catalog.Architecture("own", "Other", "elsewhere")]
    lines = [
        {"library": "own", "name": name, "params": params, "everything": 1}
        for name, params in (("Large", 20), ("Tiny", 10))
    ]
    assert zoo.smallest(entries, lines) == [own("Tiny")]


def test_results_of_other_sources_do_not_count(tmp_path):
    file = tmp_path / "zoo.jsonl"
    with checks.line_of(own("Tiny"), "shapes") as line:
        zoo.CheckResults(file, "before").add(line)
    assert len(zoo.CheckResults(file, "before").of("shapes")) == 1
    with file.open("a") as half:
        half.write('{"check": "sha')
    assert len(zoo.CheckResults(file, "after", stale=True).of("shapes")) == 1
    assert zoo.CheckResults(file, "after").of("shapes") == []
    assert zoo.CheckResults(file, "before").of("shapes") == []  # forgotten


@pytest.mark.slow
def test_a_run_records_failures_and_crashes_and_resumes(monkeypatch, tmp_path, capsys):
    entries = [own("Tiny"), own("Unbuilt"), own("crash")]
    results = tmp_path / "zoo.jsonl"
    monkeypatch.setattr(zoo, "catalog", lambda: entries)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["zoo.py", "--jobs", "1", "--results", str(results), *arguments])
        code = zoo.main()
        return code, capsys.readouterr().out

    code, shown = run()
    assert code == 1
    lines = {line["name"]: line for line in map(json.loads, results.read_text().splitlines())}
    assert set(lines) == {"Tiny", "Unbuilt", "crash"}
    assert "failures" not in lines["Tiny"]
    assert lines["crash"]["failures"][0]["reason"] == "its process crashed (exit code 3)"
    found = (
        "3 of 3 architectures looked at; 1 of 1 architectures with a 3x3 conv planned, 1 converted by default, 0 more"
        " on request, 2 failures"
    )
    assert found in " ".join(shown.split())
    assert found in (tmp_path / "zoo.md").read_text()

    monkeypatch.setattr(
        zoo, "call_each", lambda check, tasks, *_, **options: [(task, {**lines[task.name]}) for task in tasks]
    )
    before = results.read_text()
    assert run()[0] == 1
    assert results.read_text() == before  # nothing was done again
    assert run("--only", "Tyni")[0] == 2  # nothing that was looked at is nothing that passed
    run("--failed")
    assert len(results.read_text().splitlines()) == 5
