"""What ddf_convert itself draws, made anew for the site: ResNet-50's chart for the first page, and its whole report."""

from __future__ import annotations

import functools

import timm
import torch
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import ddf_convert as ddf
from ddf_convert.report.data import MACS, PARAMETERS
from ddf_convert.report.html import chart
from ddf_convert.report.html import page as report

PLACE = "<!-- chart of resnet50 -->"
REPORT = "resnet50.html"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page that ``ddf-convert inspect resnet50 --html resnet50.html`` writes."""
    files.append(File.generated(config, REPORT, content=report(comparison())))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the charts of parameters and MACs where a page asks for them."""
    return markdown.replace(PLACE, charts()) if PLACE in markdown else markdown


@functools.cache
def comparison() -> ddf.Comparison:
    """ResNet-50 and what becomes of it."""
    with torch.device("meta"):
        model, image = timm.create_model("resnet50"), torch.empty(1, 3, 224, 224)
    return ddf.Comparison.of(ddf.plan(model, image), "resnet50")


def charts() -> str:
    """Two charts side by side, each under its totals."""
    shown = comparison()
    figures = []
    for measure in (PARAMETERS, MACS):
        before, after = measure.of(shown.before), measure.of(shown.after)
        assert before is not None
        assert after is not None
        totals = f"{measure.heading}: {measure.total(before, 0)} → {measure.total(after, before)}"
        figures.append(
            f'<figure class="chart"><figcaption>{totals}</figcaption>{chart(shown.layers, measure)}</figure>'
        )
    return f'<div class="charts">{"".join(figures)}</div>'.replace("\n", "")
