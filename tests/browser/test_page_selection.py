"""Chapter 04 in a browser: one more token is kept by one key press, another chooser is taken, all follow."""

import pytest
from playwright.sync_api import expect

from harness import Panel, Reader


@pytest.mark.slow
def test_a_reader_moves_top_k_and_lets_another_choose(reader: Reader):
    reader.open("04_token_selection")
    reader.run_all()
    panel, keyboard = Panel(reader.page, "who chooses"), reader.page.keyboard

    expect(panel.sentence).to_contain_text("the indexer choice with top-k 16")
    pictures = panel.pictures()
    panel.control("top-k").slider.focus()
    keyboard.press("ArrowRight")
    expect(panel.sentence).to_contain_text("the indexer choice with top-k 17")
    assert panel.pictures() != pictures, "the sentence changed and the picture did not"

    before = panel.pictures()
    panel.control("who chooses").field.select_option("window")
    expect(panel.sentence).to_contain_text("the window choice with top-k 17")
    panel.changed(before)

    assert reader.complaints == []
