"""A converted model, its artifact, and a copy of that to damage."""

import shutil

import pytest
from support.artifacts import SMALL, converted

from ddf_convert.artifacts.artifact import save


@pytest.fixture(scope="session")
def model():
    return converted()


@pytest.fixture(scope="session")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "out"
    save(model, path, report={"model": SMALL})
    return path


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of a good artifact, to damage."""
    return shutil.copytree(saved, tmp_path / "damaged")
