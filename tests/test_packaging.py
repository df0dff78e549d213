"""What is shipped: the source archive tests itself, and the wheel runs where no checkout is."""

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The folder that each package comes from, as in setup.cfg.
FOLDERS = {name: ROOT / name for name in ("retrieval_attn", "index", "kernels", "bench")}

# It trains the embedded model: in the source archive, not in the wheel.
TRAINING = "retrieval_attn.bench.train"

# Calls the backend that pip calls; the archive's path is its last line.
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def test_every_package_is_listed():
    """setuptools takes what setup.cfg lists: a package that is not would be missing in the wheel only."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    assert sorted(listed) == sorted(name for name in packages() if not name.startswith(TRAINING))


def packages():
    for top, folder in FOLDERS.items():
        for file in folder.rglob("__init__.py"):
            name = ".".join((top, *file.parent.relative_to(folder).parts))
            yield name if top == "retrieval_attn" else f"retrieval_attn.{name}"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The unpacked source archive and, built from it, the wheel."""
    place = tmp_path_factory.mktemp("shipped")
    tracked = place / "checkout"
    copy_of_the_sources(tracked)
    with tarfile.open(built("build_sdist", tracked, place)) as archive:
        archive.extractall(place, filter="data")
    source = next(place.glob("retrieval_attn-*/"))
    return source, built("build_wheel", source, place)


def copy_of_the_sources(target):
    """What a fresh clone has: older builds would leave their files in the archives."""
    made = (".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*made))


def built(what, source, place):
    done = run(sys.executable, "-c", BUILD, what, place, cwd=source)
    return place / done.stdout.splitlines()[-1]


def run(*command, cwd):
    """The command in a folder that is not the checkout; nothing of the tests' own environment leads back to it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def venv(folder, *what):
    """A virtual environment over the packages of this one, except ours, which is installed as `what` says."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    packages = next((folder / "lib").glob("python*/site-packages"))
    # Without their .pth files, by which an editable package would be found.
    (packages / "over.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-index", "--no-deps")
    run(*pip, "--no-build-isolation", "--ignore-installed", *what, cwd=folder.parent)
    return folder / "bin"


def test_the_wheel_has_what_it_needs_and_no_more(shipped):
    names = zipfile.ZipFile(shipped[1]).namelist()
    modules = {name.removesuffix("/__init__.py").replace("/", ".") for name in names if name.endswith("/__init__.py")}
    assert modules == {name for name in packages() if not name.startswith(TRAINING)}
    assert not [name for name in names if "test" in Path(name).name or "/train/" in name]
    assert "retrieval_attn/py.typed" in names
    model = (path for path in (ROOT / "retrieval_attn" / "embedded").iterdir() if path.is_file())
    assert {str(path.relative_to(ROOT)) for path in model} <= set(names)
    templates = {f"retrieval_attn/{path.relative_to(ROOT)}" for path in (ROOT / "bench").rglob("*.jinja")}
    assert templates <= set(names)


@pytest.mark.long
def test_a_wheel_runs_without_a_checkout(shipped, tmp_path):
    bin = venv(tmp_path / "venv", shipped[1])
    program = bin / "retrieval-attn"
    where = run(bin / "python", "-c", "import retrieval_attn; print(retrieval_attn.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(bin.parent)
    assert run(program, "demo", "--tokens", "8192", cwd=tmp_path).stdout
    assert run(program, "chat", "-p", "Hello", "-n", "4", cwd=tmp_path).stdout.strip()
    run(program, "bench", "report", "--results", ROOT / "bench" / "results", "-o", "page.html", cwd=tmp_path)
    assert "</html>" in (tmp_path / "page.html").read_text()
    run(program, "bench", "report", "-o", "empty.html", cwd=tmp_path)
    run(program, "bench", "gpu-check", "--dry-run", cwd=tmp_path)


def functions(collected):
    """The test functions that pytest lists; their parameters may depend on data that lies beside a checkout."""
    return list(dict.fromkeys(line.split("[")[0] for line in collected.splitlines() if "::" in line))


@pytest.mark.long
def test_the_source_archive_tests_itself(shipped, tmp_path):
    source, _ = shipped
    bin = venv(tmp_path / "venv", "-e", source)
    pytest_ = (bin / "python", "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    ours = run(sys.executable, "-P", "-m", "pytest", "-q", "--collect-only", cwd=ROOT).stdout
    theirs = run(*pytest_, "--collect-only", cwd=source).stdout
    assert functions(theirs) == functions(ours)
    few = ("test_config.py", "test_layering.py", "index/test_keys.py", "bench/report")
    run(*pytest_, *(f"tests/{name}" for name in few), cwd=source)
