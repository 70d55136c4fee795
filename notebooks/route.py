"""Writes the notebooks of a shorter route through the course: python notebooks/route.py 15m (or 2h).

They land in route-15m/ (or route-2h/) beside notebooks/, executed as they are there, and run from there too. What
is on a route say the tags in notebooks/src; see `builder.routes`.
"""

import argparse
from pathlib import Path

import nbformat
from builder.routes import NAMES, along, minutes, taken

ROOT = Path(__file__).resolve().parent.parent


def write_route(route: str, root: Path) -> list[Path]:
    """Write the notebooks of a route, replacing what an earlier call wrote; returns their paths in reading order."""
    notebooks = {path.stem: nbformat.read(path, as_version=4) for path in sorted(root.glob("notebooks/*.ipynb"))}
    folder = root / f"route-{route}"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.ipynb"):
        old.unlink()
    for name, notebook in taken(notebooks, route).items():
        nbformat.write(notebook, folder / f"{name}.ipynb")
        print(f"  {name}: {round(minutes(along(notebook, '2d')))} minutes")
    return sorted(folder.glob("*.ipynb"))


def main() -> None:
    """Write the routes that are asked for, and say where they begin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("routes", nargs="+", choices=list(NAMES)[:-1], metavar="ROUTE", help="15m or 2h")
    for route in parser.parse_args().routes:
        print(f"The route of {NAMES[route]}:")
        first = write_route(route, ROOT)[0]
        print(f"  open {first}")


if __name__ == "__main__":
    main()
