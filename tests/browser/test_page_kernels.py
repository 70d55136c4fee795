"""Chapter 08 in a browser: a smaller top-k and shorter tiles, the figure and the sentence follow."""

import pytest
from playwright.sync_api import expect

from harness import Panel, Reader


@pytest.mark.slow
def test_a_reader_takes_shorter_tiles(reader: Reader):
    reader.open("08_kernels")
    reader.run_to("heads in a tile")
    panel, keyboard = Panel(reader.page, "heads in a tile"), reader.page.keyboard

    expect(panel.sentence).to_contain_text("top-k 2048 and 64 heads a tile")
    pictures = panel.pictures()
    panel.control("top-k").slider.focus()
    keyboard.press("ArrowLeft")
    expect(panel.sentence).to_contain_text("top-k 1984 and 64 heads a tile")
    assert panel.pictures() != pictures, "the sentence changed and the picture did not"

    before = panel.pictures()
    panel.control("heads in a tile").field.select_option("16")
    expect(panel.sentence).to_contain_text("top-k 1984 and 16 heads a tile")
    panel.changed(before)

    assert reader.complaints == []
