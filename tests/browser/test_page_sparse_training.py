"""A reader of chapter 06 trains twins in the page, then asks what a text of their own costs with two keys."""

import pytest
from playwright.sync_api import expect

from harness import Panel


@pytest.mark.slow
def test_a_reader_takes_keys_away(reader):
    reader.open("06_sparse_training")
    reader.run_to("your text, or file:PATH", seconds=300)
    panel, keyboard = Panel(reader.page, "top-k"), reader.page.keyboard
    expect(panel.sentence).to_contain_text("K = 2, chooser: indexer")
    before = panel.pictures()

    panel.control("top-k").slider.focus()
    keyboard.press("ArrowRight")
    expect(panel.sentence).to_contain_text("K = 3, chooser: indexer")
    assert panel.pictures() != before, "the sentence changed and the picture did not"

    panel.control("your text, or file:PATH").field.fill("def f(x): return x")
    keyboard.press("Tab")
    expect(panel.sentence).to_contain_text("18 tokens, K = 3, chooser: indexer")
    assert reader.complaints == []
