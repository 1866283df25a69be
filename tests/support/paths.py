"""Where the parts of the repository are."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
DATA = TESTS / "data"
BENCHMARKS = ROOT / "benchmarks"
