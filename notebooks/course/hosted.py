"""Prints links that open the course in a browser, for a public copy of this repository.

    python -m course.hosted [ADDRESS]

ADDRESS is the copy's on GitHub, such as https://github.com/OWNER/NAME; without it the place counts that this clone came
from (`git remote get-url origin`). No file of the repository says where it is published, so a copy of a copy still
links to itself. Paste what is printed into a README of yours.
"""

import argparse
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GITHUB = re.compile(r"(?:https://|ssh://git@|git@)github\.com[/:]([\w.-]+)/([\w.-]+?)(?:\.git)?/?")


def repository(address: str) -> str:
    """OWNER/NAME of an address on GitHub."""
    if found := GITHUB.fullmatch(address.strip()):
        return f"{found[1]}/{found[2]}"
    raise ValueError(f"{address!r} is not the address of a repository on GitHub, such as https://github.com/OWNER/NAME")


def links(place: str, names: list[str]) -> Iterator[str]:
    """Lines of Markdown for the repository OWNER/NAME: where to begin, and Colab's link for each notebook."""
    first = f"notebooks/{names[0]}.ipynb"
    yield f"* [Codespaces](https://codespaces.new/{place}): the editor and its notebooks, or `make lab` in its terminal"
    yield f"* [Binder](https://mybinder.org/v2/gh/{place}/HEAD?urlpath=lab/tree/{first}): JupyterLab, free, no GPU"
    yield "* Colab, with these two lines in a new cell above the first:"
    clone = f"!git clone --depth 1 https://github.com/{place} dsa-course"
    yield f"  `{clone}` and `%run dsa-course/notebooks/course/colab.py`"
    for name in names:
        yield f"  * [{name}](https://colab.research.google.com/github/{place}/blob/main/notebooks/{name}.ipynb)"


def main() -> None:
    """Print the links, or why there are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", nargs="?", help="such as https://github.com/OWNER/NAME")
    address = parser.parse_args().address or _origin()
    try:
        place = repository(address)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(links(place, sorted(path.stem for path in ROOT.glob("notebooks/*.ipynb")))))


def _origin() -> str:
    asked = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip()


if __name__ == "__main__":
    main()
