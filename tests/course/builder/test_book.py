"""The course as pages: complete, nothing fetched, pictures described, formulas drawn, links that lead somewhere."""

import re

import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course.builder.book import body, build_book, page_html, title
from project import NOTEBOOKS

FOLDER = NOTEBOOKS
FETCHED = re.compile(r"<(?:script|link|iframe)|(?:src|srcset)=\"(?!data:)|@import|url\(")


@pytest.fixture(scope="module")
def pages(book):
    return {page.name: BeautifulSoup(page.read_text("utf-8"), "html.parser") for page in sorted(book.glob("*.html"))}


def test_every_notebook_has_a_page_and_a_place_in_the_contents(pages):
    names = [f"{path.stem}.html" for path in sorted(FOLDER.glob("*.ipynb"))]
    assert sorted(pages) == sorted([*names, "index.html"])
    assert [link["href"] for link in pages["index.html"].select("h2 a")] == names


def test_no_page_fetches_or_runs_anything(pages):
    assert {name: found for name, page in pages.items() if (found := FETCHED.findall(str(page)))} == {}


def test_every_picture_is_described(pages):
    for name, page in pages.items():
        silent = [image for image in page.select("img") if len(image.get("alt", "").split()) < 3]
        assert silent == [], name


def test_no_formula_is_left_as_latex(pages):
    for name, page in pages.items():
        for code in page.select("pre, code, annotation, math"):
            code.decompose()
        assert re.findall(r"\$[^$\n]*[\\^_][^$\n]*\$", page.get_text()) == [], name


def test_links_lead_to_pages_that_are_there(pages):
    for name, page in pages.items():
        targets = {link["href"].split("#")[0] for link in page.select("a[href]")} - {""}
        assert {to for to in targets if not to.startswith("https://")} <= set(pages), name


def test_a_link_to_a_cell_finds_it_on_its_page(pages):
    marks = {name: {found["id"] for found in page.select("[id]")} for name, page in pages.items()}
    links = [(name, link["href"]) for name, page in pages.items() for link in page.select("a[href*='#cell-id=']")]
    assert len(links) > 300
    assert [(name, to) for name, to in links if to.partition("#")[2] not in marks[to.partition("#")[0]]] == []


def small(*cells):
    notebook = new_notebook(cells=[new_markdown_cell("# A *short* page\n\nIt costs $a^2$."), *cells])
    return BeautifulSoup(page_html(title(notebook), body(notebook, FOLDER), [("x.html", "On & on")]), "html.parser")


def test_formulas_become_mathml_and_titles_plain_words():
    page = small()
    assert page.title.text == "A short page"
    assert page.select_one("math msup")
    assert page.select_one("nav a").text == "On & on"


def test_an_output_keeps_its_words_and_the_picture_s_description():
    picture = new_output("display_data", data={"image/png": "aGk=", "text/plain": "[figure]"})
    picture.metadata["image/png"] = {"alt": "three words here"}
    page = small(new_code_cell("1 < 2", outputs=[picture, new_output("stream", text="✓ C1.1 <held>")]))
    assert page.select_one("img")["alt"] == "three words here"
    assert "✓ C1.1 <held>" in page.get_text()
    assert all(block["tabindex"] == "0" for block in page.select("pre"))


def test_what_is_folded_away_stays_inside(pages):
    hints = pages["04_token_selection.html"].select("details")
    assert len(hints) > 10
    assert [fold for name, page in pages.items() for fold in page.select("details") if len(fold.contents) < 3] == []
    page = small(new_markdown_cell("<details><summary>Hint</summary>\n\nA *hint*.\n\n| a |\n| - |\n\n</details>"))
    assert page.select_one("details > p > em").text == "hint"
    assert page.select_one("details table")


def test_links_into_the_repository_become_text_and_scripts_go():
    page = small(new_markdown_cell("[03](03_x.ipynb#two), [code](../dsa/x.py)\n\n<script>alert(1)</script>"))
    assert [link["href"] for link in page.select("main a")] == ["03_x.html#two"]
    assert "code" in page.main.get_text()
    assert not page.select("script")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no notebooks"):
        build_book(tmp_path, tmp_path / "book")
