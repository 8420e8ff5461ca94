"""Wheel and source distribution, installed in an environment that borrows the dependencies of this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import swift
from swift.__main__ import COMMANDS

ROOT = Path(swift.__file__).resolve().parents[1]


def said(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """Output of a command that is run without this checkout on Python's path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-3000:]
    return done.stdout


def sources(folder: str, *endings: str) -> set[str]:
    """Files of the checkout, by their place in it."""
    files = (ROOT / folder).rglob("*")
    return {file.relative_to(ROOT).as_posix() for file in files if file.suffix in endings and file.is_file()}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout called swift, without what git ignores, so that a build leaves nothing here."""
    out = tmp_path_factory.mktemp("parent") / "swift"
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split() if "*" not in line]
    plain = shutil.ignore_patterns(".git", "*.egg-info", *ignored)
    made = {ROOT / name for name in ignored if "/" in name}

    def left_out(folder: str, names: list[str]) -> set[str]:
        return set(plain(folder, names)) | {name for name in names if Path(folder) / name in made}

    shutil.copytree(ROOT, out, ignore=left_out)
    return out


@pytest.fixture(scope="module")
def built(clone: Path) -> dict[str, Path]:
    """wheel and sdist, of the copy; and the wheel that the sdist makes."""
    script = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    out = clone.parent / "built"
    out.mkdir()
    names = {}
    for kind in ("sdist", "wheel"):
        name = said(sys.executable, "-c", script, f"build_{kind}", out, cwd=clone).splitlines()[-1]
        names[kind] = out / name
    with tarfile.open(names["sdist"]) as archive:
        archive.extractall(out, filter="data")
    unpacked = out / names["sdist"].name.removesuffix(".tar.gz")
    name = said(sys.executable, "-c", script, "build_wheel", out / "again", cwd=unpacked).splitlines()[-1]
    names["again"] = out / "again" / name
    return names


@pytest.fixture(scope="module")
def borrowing(clone: Path) -> Path:
    """Python of an empty environment that finds the packages of this one, but not those installed as editable."""
    place = clone.parent / "env"
    said(sys.executable, "-m", "venv", "--without-pip", place, cwd=clone.parent)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    lent = Path(pytest.__file__).resolve().parents[1]
    (place / "lib" / version / "site-packages" / "lent.pth").write_text(f"{lent}\n")
    return place / "bin" / "python"


def install(python: Path, *what: str | Path) -> None:
    given = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall", *what]
    said(sys.executable, "-m", "pip", "--python", python, "install", *given, cwd=python.parent)


@pytest.mark.slow
def test_every_file_that_runs_is_in_the_wheel(built: dict[str, Path]) -> None:
    wanted = sources("swift", ".py")
    wanted |= {f"swift/{name}" for name in sources("conf", ".yaml", ".py")}
    templates = {file.relative_to(ROOT).as_posix() for file in (ROOT / "launch/templates").iterdir()}
    wanted |= {f"swift/{name}" for name in sources("launch", ".sh") | templates}
    wanted |= {"brainmarks/models/swift_v2.py", "brainmarks/datasets/swift_store.py"}
    for kind in ("wheel", "again"):
        with zipfile.ZipFile(built[kind]) as wheel:
            names = set(wheel.namelist())
        assert wanted - names == set(), kind
        assert {name for name in names if name.startswith("brainmarks/")} <= wanted, kind  # no __init__.py: a namespace
        # Nothing else gets to the top of someone's site-packages.
        assert {name.split("/")[0] for name in names} <= {"swift", "brainmarks", "swift_fmri-0.1.0.dist-info"}


@pytest.mark.slow
def test_the_wheel_works_from_another_directory(built: dict[str, Path], borrowing: Path, tmp_path: Path) -> None:
    install(borrowing, built["wheel"])
    where = said(borrowing, "-c", "import swift; print(swift.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(borrowing.parents[1])
    listed = said(borrowing.parent / "swift-fmri", "--help", cwd=tmp_path)
    assert {line.split()[0] for line in listed.splitlines() if line.startswith("  ")} >= set(COMMANDS)
    # conf/ and launch/ come along: a whole configuration is composed, and a job file of a cluster written.
    shown = yaml.safe_load(said(borrowing, "-m", "swift.train", "model=7m", "data=store", "--cfg", "job", cwd=tmp_path))
    wanted = yaml.safe_load((ROOT / "conf/model/7m.yaml").read_text())
    assert {name: shown["model"][name] for name in ("embed_dim", "depths", "num_heads")} == {
        name: wanted[name] for name in ("embed_dim", "depths", "num_heads")
    }
    code = "from swift.cluster.job_text import launch_dir; print((launch_dir() / 'job.sh').read_text())"
    assert said(borrowing, "-c", code, cwd=tmp_path).rstrip() == (ROOT / "launch/job.sh").read_text().rstrip()


@pytest.mark.slow
def test_import_beside_a_clone_that_is_called_swift(clone: Path, built: dict[str, Path], borrowing: Path) -> None:
    # There the clone is a folder "swift" on Python's path, without __init__.py: a namespace that must not win.
    code = "import swift, swift.train; print(*swift.__all__, swift.__file__)"
    install(borrowing, built["wheel"])
    names, file = said(borrowing, "-c", code, cwd=clone.parent).rsplit(" ", 1)
    assert names == " ".join(swift.__all__)
    assert "site-packages" in file
    makefile = (ROOT / "Makefile").read_text()
    option = "--config-settings editable_mode=compat"
    assert f"{option} --editable" in makefile
    install(borrowing, *option.split(), "--editable", clone)
    names, file = said(borrowing, "-c", code, cwd=clone.parent).rsplit(" ", 1)
    assert names == " ".join(swift.__all__)
    assert Path(file.strip()) == clone / "swift" / "__init__.py"


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in sources("swift", ".py")}
    assert folders | {"swift.conf", "swift.launch"} == {name for name in listed if not name.startswith("brainmarks")}


def test_tested_versions_are_legal_and_complete() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    tested = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    for text in project["dependencies"]:
        needed = Requirement(text)
        assert needed.specifier.contains(tested[needed.name.lower().replace("_", "-")]), text


def test_citation_and_changelog_name_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == version
    assert cited["authors"] == [{"name": "The swift developers"}]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_an_issue_needs_the_doctor() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/problem.yml").read_text())
    doctor = next(part for part in form["body"] if part.get("id") == "doctor")
    assert "swift-fmri doctor" in doctor["attributes"]["description"]
    assert doctor["validations"]["required"] is True
