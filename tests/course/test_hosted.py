"""The files that open the course in a browser, as far as that can be tested without a network.

What a container or Binder does with them is theirs; that they read them, that what they are told to run is there, and
that versions are those of the course, is ours. Colab's start is run whole, on a clone in a folder of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from course import colab, hosted
from project import ROOT

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
PINS = colab.pins((ROOT / "requirements.txt").read_text("utf-8"))
BINDER = ROOT / ".binder"
CONTAINER = ROOT / ".devcontainer" / "devcontainer.json"
# of the specification, those that a container made from an image may use here
KNOWN = {"name", "image", "postCreateCommand", "forwardPorts", "portsAttributes", "hostRequirements", "customizations"}


def ci_python():
    return re.search(r'python-version: "([\d.]+)"', (ROOT / ".github/workflows/ci.yml").read_text("utf-8"))[1]


def target(name):
    return re.search(rf"^{re.escape(name)}:", MAKEFILE, re.MULTILINE)


# A container


@pytest.fixture
def container():
    return json.loads(CONTAINER.read_text("utf-8"))


def test_the_container_is_described_as_its_readers_expect(container):
    assert set(container) <= KNOWN
    assert container["image"] == f"python:{ci_python()}"
    size = container["hostRequirements"]
    assert isinstance(size["cpus"], int)
    assert all(re.fullmatch(r"\d+gb", size[name]) for name in ("memory", "storage"))


def test_what_the_container_runs_and_opens_is_there(container):
    assert target(container["postCreateCommand"].removeprefix("make "))
    [opened] = container["customizations"]["codespaces"]["openFiles"]
    assert (ROOT / opened).exists()
    assert opened in MAKEFILE
    interpreter = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert interpreter == "${containerWorkspaceFolder}/.venv/bin/python"


def test_the_container_forwards_the_port_of_make_lab(container):
    [port] = container["forwardPorts"]
    assert list(container["portsAttributes"]) == [str(port)]
    assert port == 8888  # Jupyter's own, which the Makefile leaves
    assert "--port" not in MAKEFILE
    assert target("lab")


# Binder


def test_binder_gets_the_course_s_python_and_torch():
    found = dict(re.findall(r"^  - ([\w-]+)=([\d.]+)$", (BINDER / "environment.yml").read_text("utf-8"), re.MULTILINE))
    assert found == {"python": ci_python(), "pytorch-cpu": PINS["torch"]}


def test_binder_s_script_installs_everything_else(tmp_path):
    script = BINDER / "postBuild"
    assert os.access(script, os.X_OK)
    pip = tmp_path / "python"
    pip.write_text('#!/bin/bash\necho "${@:1:$#-1}"\ncat "${@: -1}"\n')
    pip.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    said = subprocess.run(
        [script], cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    asked, *lines = said.stdout.splitlines()
    assert asked == "-m pip install --no-cache-dir -r"
    every = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert lines == [line for line in every if line != f"torch=={PINS['torch']}"]
    assert "-e ." in lines


# Colab


@pytest.mark.slow
def test_notebooks_run_as_they_are_beside_a_clone(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git repository to clone")
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", "dsa-course"], cwd=tmp_path, check=True)
    cells = nbformat.read(ROOT / "notebooks/00_start_here.ipynb", as_version=4).cells
    first = [cell.source for cell in cells if cell.cell_type == "code"][:4]
    program = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in ["%run dsa-course/notebooks/course/colab.py", *{first!r}]:
    shell.run_cell(cell).raise_error()
import os, subprocess, sys
print(os.getcwd(), shell.user_ns["dsa"].__file__, sep="\\n")
child = [sys.executable, "-c", "import course, dsa; print(course.__file__, dsa.__file__)"]
print(subprocess.run(child, capture_output=True, text=True).stdout)
"""
    said = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = said.stdout.split()
    clone = tmp_path / "dsa-course"
    package, support = str(clone / "dsa/__init__.py"), str(clone / "notebooks/course/__init__.py")
    assert lines[-4:] == [str(clone / "notebooks"), package, support, package]
    assert "Ready: run the cells of the notebook." in said.stdout
    assert "Added" not in said.stdout


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What `start` asks pip for, with its changes to this process undone afterwards."""
    commands = []
    monkeypatch.setattr(colab.subprocess, "run", lambda command, check: commands.append(command[1:]))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["elsewhere", str(ROOT)]))
    monkeypatch.chdir(tmp_path)
    return commands


def test_only_what_is_missing_is_added(asked, monkeypatch):
    there = {name: PINS[name] for name in colab.NEEDED} | {"torch": "2.13.0+cu130", "safetensors": ""}
    monkeypatch.setattr(colab, "installed", there.get)
    assert "Added safetensors" in colab.start(ROOT)
    assert asked == [["-m", "pip", "install", "--quiet", f"safetensors=={PINS['safetensors']}"]]


def test_other_versions_stay_and_are_named(asked, monkeypatch):
    there = {name: PINS[name] for name in colab.NEEDED} | {"torch": "2.11.0+cu128", "ipywidgets": "7.7.1"}
    monkeypatch.setattr(colab, "installed", there.get)
    told = colab.start(ROOT)
    assert f"torch 2.11.0+cu128 ({PINS['torch']}), ipywidgets 7.7.1 ({PINS['ipywidgets']})." in told
    assert "numpy" not in told
    assert asked == []


def test_starting_twice_changes_nothing_more(asked):
    colab.start(ROOT)
    once = list(sys.path), os.environ["PYTHONPATH"], Path.cwd()
    colab.start(ROOT)
    assert (list(sys.path), os.environ["PYTHONPATH"], Path.cwd()) == once
    assert once[0][:2] == [str(ROOT), str(ROOT / "notebooks")]
    assert once[1] == os.pathsep.join([str(ROOT), str(ROOT / "notebooks"), "elsewhere"])
    assert once[2] == ROOT / "notebooks"


def test_every_package_that_colab_needs_is_pinned():
    assert set(colab.NEEDED) <= set(PINS)


# Links


@pytest.mark.parametrize(
    "address",
    [
        "https://github.com/some-one/a.course",
        "https://github.com/some-one/a.course.git",
        "git@github.com:some-one/a.course.git",
        "ssh://git@github.com/some-one/a.course\n",
    ],
)
def test_addresses_on_github_are_understood(address):
    assert hosted.repository(address) == "some-one/a.course"


@pytest.mark.parametrize("address", ["", "/srv/git/course", "https://example.org/some-one/course", "github.com/course"])
def test_other_addresses_are_refused(address):
    with pytest.raises(ValueError, match="not the address of a repository on GitHub"):
        hosted.repository(address)


def test_links_lead_to_every_notebook_and_to_files_that_are_there():
    names = [path.stem for path in sorted(ROOT.glob("notebooks/*.ipynb"))]
    told = "\n".join(hosted.links("some-one/course", names))
    assert re.findall(r"course/blob/main/notebooks/(\w+)\.ipynb", told) == names
    [begin] = re.findall(r"urlpath=lab/tree/([\w/.]+)", told)
    assert (ROOT / begin).exists()
    [run] = re.findall(r"%run dsa-course/([\w/.]+)", told)
    assert (ROOT / run).exists()


def test_no_file_names_a_package_index_or_a_place_where_it_is_published():
    files = [CONTAINER, *BINDER.iterdir(), ROOT / "notebooks/course/colab.py", ROOT / "notebooks/course/hosted.py"]
    for path in files:
        text = path.read_text("utf-8")
        assert not re.search(r"pypi|pytorch\.org|anaconda|index-url", text), path
        assert set(re.findall(r"github\.com/(\w+)", text)) <= {"OWNER"}, path
