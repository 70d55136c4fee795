"""The course as pages: each executed notebook as one HTML file that needs no kernel, no script and no network.

A page holds everything it shows. Pictures are inside it, a panel is there as its picture and sentence, formulas are
MathML, which browsers draw by themselves, and the style sheet below is the only one. So a page opens from a disk, is
read aloud with the words that the figures were described in, fits a telephone, and follows the reader's choice of light
or dark. nbconvert makes the cells; what is ours is the frame, the formulas and a little tidying.

    python -m course.builder.book [--out book]
"""

import argparse
import re
from functools import partial
from html import escape
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup, Tag
from latex2mathml.converter import convert as mathml
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parents[3]
STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --paper: #fff; --soft: #f3f5f7; --line: #d0d7de; --link: #0550ae; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ec; --paper: #14181d; --soft: #1f252c; --line: #3d4651; --link: #7cc0ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--text); font: 1.05rem/1.6 system-ui, sans-serif; }
header, main, footer { max-width: 50rem; margin: 0 auto; padding: 0 1rem; }
nav { display: flex; gap: 1.2rem; flex-wrap: wrap; padding: .7rem 0; border-bottom: 1px solid var(--line); }
footer nav { border: 0; border-top: 1px solid var(--line); margin-top: 3rem; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
h1 { line-height: 1.25; } h2 { margin-top: 2.4rem; border-bottom: 1px solid var(--line); }
img { display: block; max-width: 100%; height: auto; background: #fff; }
pre, code { font: .9rem/1.45 ui-monospace, monospace; }
pre { margin: 0; padding: .6rem .8rem; overflow-x: auto; }
p code, li code, td code { background: var(--soft); padding: .1em .25em; border-radius: 3px; overflow-wrap: anywhere; }
.input, details { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; margin: .8rem 0; }
details { padding: .4rem .8rem; } summary { cursor: pointer; }
.output_wrapper { border-left: 3px solid var(--line); padding-left: .6rem; margin: .4rem 0 1.2rem; }
.output_html { color-scheme: light; background: #fff; color: #1b1f24; padding: .4rem; overflow-x: auto; }
.output_html code { background: #f3f5f7; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; } th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: left; }
th, td { vertical-align: top; }
math[display="block"] { margin: 1rem 0; overflow-x: auto; overflow-y: hidden; }
"""
LIGHT, DARK = "xcode", "github-dark"  # Pygments styles whose palest letters still have a contrast of 4.5 on --soft


class Renderer(IPythonRenderer):
    """Markdown to HTML with formulas as MathML, which keeps the LaTeX for who looks for it."""

    def inline_math(self, body: str) -> str:
        """A formula in a line."""
        return mathml(body)

    def block_math(self, body: str) -> str:
        """A formula on a line of its own."""
        return mathml(body.strip(), display="block")

    def block_html(self, html: str) -> str:
        """HTML as it is: nbconvert would close what a later block closes, and show all that is folded away."""
        return f"{html}\n"


def render_markdown(source: str, folder: Path) -> str:
    """Markdown as HTML; pictures beside the notebook, in `folder`, go into the page."""
    renderer = Renderer(escape=False, embed_images=True, path=str(folder))
    return str(MarkdownWithMath(renderer=renderer).render(source))


def body(notebook: NotebookNode, folder: Path) -> str:
    """The cells of a notebook as HTML."""
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.register_filter("markdown2html", partial(render_markdown, folder=folder))
    return clean_html(exporter.from_notebook_node(notebook)[0])


def clean_html(html: str) -> str:
    """Without scripts and styles of others, with links that hold here, and with wide things that keys can scroll."""
    page = BeautifulSoup(html, "html.parser")
    for mark in page.select("a.anchor-link, style, script"):
        mark.decompose()
    for link in page.select("a[href]"):
        _rewrite_link(link)
    for block in page.select("pre, .output_html, math[display=block]"):
        block["tabindex"] = "0"
    for table in page.select("table"):
        table.wrap(page.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
    return str(page)


def _rewrite_link(link: Tag) -> None:
    """Links between notebooks lead to their pages; links into the repository become plain text."""
    target = str(link["href"])
    if re.fullmatch(r"[\w.]+\.ipynb(#.*)?", target):
        link["href"] = target.replace(".ipynb", ".html")
    elif not target.startswith(("#", "http://", "https://")):
        link.unwrap()


def title(notebook: NotebookNode) -> str:
    """The first heading, without Markdown's signs."""
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.sub(r"[#*`$]", "", first.splitlines()[0]).strip()


def first_paragraph(notebook: NotebookNode, folder: Path) -> str:
    """The first paragraph below the first heading, as HTML."""
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return clean_html(render_markdown(first.split("\n\n")[1], folder))


def code_css() -> str:
    """Pygments' style sheets for both schemes."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in (LIGHT, DARK))
    plain = ".highlight, .highlight pre { background: transparent !important; }"
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n{plain}"


def page_html(heading: str, content: str, links: list[tuple[str, str]]) -> str:
    """A whole page around `content`; `links` are (address, text)."""
    nav = "".join(f'<a href="{escape(to)}">{escape(text)}</a>' for to, text in links)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(heading)}</title><style>{STYLE}{code_css()}</style></head>
<body><a class="skip" href="#text">To the text</a>
<header><nav aria-label="Chapters">{nav}</nav></header>
<main id="text">{content}</main>
<footer><nav aria-label="Chapters, again">{nav}</nav></footer></body></html>
"""


def build_book(folder: Path, out: Path) -> list[Path]:
    """Write index.html and a page for each executed notebook of `folder` into `out`; returns the pages."""
    notebooks = {path.stem: nbformat.read(path, as_version=4) for path in sorted(folder.glob("*.ipynb"))}
    if not notebooks:
        raise FileNotFoundError(f"{folder} holds no notebooks: build them first with python -m course.builder")
    out.mkdir(parents=True, exist_ok=True)
    names, pages = list(notebooks), []
    for at, (name, notebook) in enumerate(notebooks.items()):
        around = [("index.html", "Contents")]
        around += [(f"{names[at - 1]}.html", f"Back: {title(notebooks[names[at - 1]])}")] if at else []
        around += [(f"{names[at + 1]}.html", f"On: {title(notebooks[names[at + 1]])}")] if at + 1 < len(names) else []
        pages.append(out / f"{name}.html")
        pages[-1].write_text(page_html(title(notebook), body(notebook, folder), around), "utf-8")
    pages.append(out / "index.html")
    pages[-1].write_text(page_html("DeepSeek Sparse Attention", contents(notebooks, folder), []), "utf-8")
    return pages


def contents(notebooks: dict[str, NotebookNode], folder: Path) -> str:
    """The first page: every chapter with the paragraph it opens with."""
    parts = [
        f'<h2><a href="{name}.html">{name[:2]} {escape(title(notebook))}</a></h2>{first_paragraph(notebook, folder)}'
        for name, notebook in notebooks.items()
    ]
    words = (
        "A course of notebooks, here as pages to read. The sliders stand still on them, as pictures; to move them, "
        "clone the repository and run <code>make lab</code>."
    )
    return f"<h1>DeepSeek Sparse Attention, to understand, try and use</h1><p>{words}</p>{''.join(parts)}"


def main() -> None:
    """Write the pages and say where the first one is."""
    parser = argparse.ArgumentParser("python -m course.builder.book", description="Write the course as HTML pages.")
    parser.add_argument("--out", type=Path, default=ROOT / "book", help="folder for the pages (default: book)")
    out = parser.parse_args().out
    pages = build_book(ROOT / "notebooks", out)
    print(f"{len(pages)} pages: open {pages[-1]}")


if __name__ == "__main__":
    main()
