"""What is installed is what is in the tree."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[1]
IMPORTED = ("tiler", "models", "pipelines", "sample_data")


def test_the_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        "outsize/" + path.relative_to(ROOT).as_posix() for folder in IMPORTED for path in (ROOT / folder).rglob("*.py")
    }
    data = {
        "outsize/pipelines/templates/face_evaluate.html",
        "outsize/py.typed",
        "outsize/models/segmentation/weights/sample-unet.safetensors",
        "outsize/models/segmentation/weights/sample-unet.json",
        "outsize/sample_data/small/scene.tif",
        "outsize/sample_data/small/labels.tif",
    }
    assert expected | data <= inside
    assert {name.split("/")[0] for name in inside} == {
        "outsize",
        next(n.split("/")[0] for n in inside if "dist-info" in n),
    }


@pytest.mark.parametrize("name", IMPORTED)
def test_no_generic_name_is_installed(name: str) -> None:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/", check=False).returncode == 0


def test_no_module_imports_a_bare_folder() -> None:
    bare = re.compile(rf"^\s*(from|import) ({'|'.join(IMPORTED)})\b", re.MULTILINE)
    offenders = [
        str(path) for path in ROOT.rglob("*.py") if ".venv" not in path.parts and bare.search(path.read_text())
    ]
    assert offenders == []


def test_every_public_name_resolves() -> None:
    import outsize
    import outsize.models
    import outsize.tiler

    for module in (outsize, outsize.models, outsize.tiler):
        for name in module.__all__:
            assert getattr(module, name) is not None
    assert importlib.util.find_spec("outsize") is not None


def test_the_version_is_the_same_everywhere() -> None:
    import outsize

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert outsize.__version__ == settings["project"]["version"]
    assert f"## {outsize.__version__}" in (ROOT / "CHANGELOG.md").read_text()
