"""Writes the course as HTML pages: python notebooks/book.py [--out book]. See `builder.book`."""

import argparse
from pathlib import Path

from builder.book import build_book

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Write the pages and say where the first one is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "book", help="folder for the pages (default: book)")
    out = parser.parse_args().out
    pages = build_book(ROOT / "notebooks", out)
    print(f"{len(pages)} pages: open {pages[-1]}")


if __name__ == "__main__":
    main()
