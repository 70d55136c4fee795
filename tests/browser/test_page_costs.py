"""Chapter 09 in a real browser: a reader moves the calculator's controls, and curves and bill follow."""

import pytest
from playwright.sync_api import expect

from harness import Panel, Reader


@pytest.mark.slow
def test_a_reader_prices_a_request(reader: Reader):
    reader.open("09_cost_curves")
    reader.run_all()
    panel, keyboard = Panel(reader.page, "length in Ki tokens"), reader.page.keyboard

    length = panel.control("length in Ki tokens")
    expect(length.field).to_have_value("64")
    expect(panel.sentence).to_contain_text("A prompt of 65,536 tokens, 0 of them cached")
    pictures = panel.pictures()
    length.slider.focus()
    keyboard.press("ArrowLeft")
    expect(panel.sentence).to_contain_text("A prompt of 64,512 tokens")
    assert panel.pictures() != pictures, "the sentence changed and the picture did not"

    top_k = panel.control("top-k")
    top_k.field.fill("4096")
    keyboard.press("Tab")
    expect(panel.sentence).to_contain_text("with top-k 4,096")

    cached = panel.control("share of the prompt cached, %")
    cached.field.fill("50")
    keyboard.press("Tab")
    expect(panel.sentence).to_contain_text("32,256 of them cached")
    assert reader.complaints == []
