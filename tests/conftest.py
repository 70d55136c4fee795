"""What all tests share: one thread, so that times and rounding do not depend on load; no network; a small text."""

import os
import sys
from contextlib import chdir

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from filelock import FileLock

import small
from dsa.datasets.corpus import user_text
from project import NOTEBOOKS, ROOT

torch.set_num_threads(1)

OFFLINE = str(ROOT / "tests/offline")  # its sitecustomize refuses every host but this one
known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
if OFFLINE not in known:  # make test has it there, for notebooks too
    sys.modules.pop("sitecustomize", None)
    sys.path.insert(0, OFFLINE)
    import sitecustomize  # noqa: F401 - for this process
ours = [OFFLINE, str(ROOT / "tests/support"), str(NOTEBOOKS), str(ROOT)]  # for the processes that tests start
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*ours, *filter(None, known)]))


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory):
    """Tests run in an empty folder, so that none finds the project's files by luck: `project` says where they are."""
    with chdir(tmp_path_factory.mktemp("elsewhere")):
        yield


def pytest_collection_modifyitems(items):
    """Browser tests first: a file of theirs has few tests and takes long, and one that came last would run alone."""
    items.sort(key=lambda item: "browser" not in item.path.parts)


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """The course as pages, written once in a run, whichever worker needs them first."""
    from course.builder.book import build_book  # for these tests alone

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with FileLock(shared / "book.lock"):
        if not (shared / "book").exists():
            build_book(NOTEBOOKS, shared / "book.partial")
            (shared / "book.partial").rename(shared / "book")
    return shared / "book"


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small corpus of one's own: `small.LINES`."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(small.LINES)
    return user_text(path)
