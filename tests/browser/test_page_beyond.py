"""A reader of chapter 12 runs it and asks for larger blocks, and for another layer."""

import pytest
from playwright.sync_api import expect

from harness import Panel


@pytest.mark.slow
def test_a_reader_asks_for_larger_blocks(reader):
    reader.open("12_one_year_later")
    reader.run_all()
    panel, keyboard = Panel(reader.page, "layer"), reader.page.keyboard
    expect(panel.sentence).to_contain_text("Layer 2, 32 keys, blocks of 8;")

    before = panel.pictures()
    panel.control("tokens in a block").field.select_option("16")
    panel.changed(before)
    expect(panel.sentence).to_contain_text("Layer 2, 32 keys, blocks of 16;")

    layer = panel.control("layer")
    layer.slider.focus()
    keyboard.press("ArrowLeft")
    expect(panel.sentence).to_contain_text("Layer 1, 32 keys, blocks of 16;")
    expect(layer.field).to_have_value("1")
    assert reader.complaints == []
