"""A reader of the reference looks up an equation and a word, and lands in front of the cell."""

import re

from playwright.sync_api import expect

OPEN = "path => window.jupyterapp.shell.currentWidget?.context?.path === path && window.jupyterapp.shell.currentWidget"


def follow(page, row, link, notebook):
    """Click a link in a row of the reference and wait for the notebook it opens."""
    page.get_by_role("tab", name="13_reference.ipynb").click()
    page.get_by_role("row", name=row).get_by_role("link", name=link, exact=True).first.click()
    page.wait_for_function(f"{OPEN}.content.widgets.length > 20", arg=f"notebooks/{notebook}.ipynb")


def test_links_open_a_notebook_at_the_cell(reader):
    page = reader.page
    reader.open("13_reference")
    reader.run_all()
    expect(page.get_by_text("def sparse_attention(").first).to_be_attached()
    for row, link, notebook, seen in (
        ("Eq. 1 ", "03 five-ways-agree", "03_lightning_indexer", page.get_by_text("✓ [live] einsum, tiles")),
        (
            "absorption ",
            "02 latent attention",
            "02_latent_attention",
            page.get_by_role("heading", name="the key's side"),
        ),
    ):
        row = re.compile(f"^{re.escape(row)}")
        follow(page, row, link, notebook)  # too early to scroll: these tests keep all cells in the page, readers do not
        follow(page, row, link, notebook)
        expect(seen.last).to_be_in_viewport()
    assert reader.complaints == []
