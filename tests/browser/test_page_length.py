"""Chapter 09a in a real browser: a reader moves every control of the panel, and work and cache follow."""

import pytest
from playwright.sync_api import expect

from harness import Panel, Reader


@pytest.mark.slow
def test_a_reader_becomes_the_designer(reader: Reader):
    reader.open("09a_attention_at_length")
    reader.run_all()
    panel, keyboard = Panel(reader.page, "length in Ki tokens"), reader.page.keyboard

    length = panel.control("length in Ki tokens")
    expect(length.field).to_have_value("128")
    expect(panel.sentence).to_contain_text("A token that sees 131,072")
    pictures = panel.pictures()
    length.slider.focus()
    keyboard.press("ArrowLeft")
    expect(panel.sentence).to_contain_text("A token that sees 130,048")
    expect(length.field).to_have_value("127")
    assert panel.pictures() != pictures, "the sentence changed and the picture did not"

    top_k = panel.control("top-k")
    top_k.field.fill("4096")
    keyboard.press("Tab")
    expect(panel.sentence).to_contain_text("above 17,834 tokens in prefill")

    panel.control("heads").field.select_option("16")
    expect(panel.sentence).to_contain_text("at no length in prefill")

    before = panel.pictures()
    panel.control("precision").field.select_option("bf16")
    panel.changed(before)
    expect(panel.sentence).to_contain_text("11.17 GB of cache")
    assert reader.complaints == []
