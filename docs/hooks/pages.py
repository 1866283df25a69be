"""Pages made of files outside docs/: the changelog, CONTRIBUTING.md, the results of benchmarks/, and examples/.

Pages under docs/ link to those files where they lie (``../benchmarks/results/zoo.md``), so that the links hold in the
repository too; here they are turned to the site's pages.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
RESULTS, EXAMPLES = ROOT / "benchmarks" / "results", ROOT / "examples"
LIST = "<!-- every page of benchmarks/results -->"
OUTWARD = re.compile(r"\]\((?:\.\./)+(CHANGELOG\.md|benchmarks/results/|examples/)([^)#]*)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, and the pictures that they show."""
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=contributing))
    for path in sorted([*RESULTS.glob("*.md"), *RESULTS.glob("*.png"), *RESULTS.glob("*.svg")]):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8").replace("](../docs/", "](../")
    for path in EXAMPLES.glob("*.py"):
        listed = listed.replace(f"`{path.name}`", f"[`{path.name}`]({path.stem}.md)")
    files.append(File.generated(config, "examples/README.md", content=listed))
    for path in sorted(EXAMPLES.glob("*.py")):
        code = path.read_text(encoding="utf-8")
        page = f"# `examples/{path.name}`\n\n```python\n{code}```\n"
        files.append(File.generated(config, f"examples/{path.stem}.md", content=page))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that leave docs/ to the pages above, and lists the results where a page asks for it."""
    up = "../" * page.file.src_uri.count("/")
    if LIST in markdown:
        markdown = markdown.replace(LIST, "\n".join(f"- [{title}](results/{name})" for name, title in titles()))
    return OUTWARD.sub(lambda found: f"]({up}{_inside(*found.groups())}", markdown)


def titles() -> list[tuple[str, str]]:
    """The names of the written results, and what each is headed by."""
    found = ((path.name, path.read_text(encoding="utf-8").split("\n", 1)[0]) for path in sorted(RESULTS.glob("*.md")))
    return [(name, heading.removeprefix("# ")) for name, heading in found]


def _inside(place: str, name: str) -> str:
    if place == "CHANGELOG.md":
        return "changelog.md"
    return f"results/{name}" if place.startswith("benchmarks") else f"examples/{Path(name).stem}.md"
