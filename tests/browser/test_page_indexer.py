"""A reader of chapter 03 runs it and looks into the scores of another layer and token, with and without the ReLU."""

import pytest
from playwright.sync_api import expect

from harness import Panel


@pytest.mark.slow
def test_a_reader_looks_into_another_score(reader):
    reader.open("03_lightning_indexer")
    reader.run_all()
    panel, keyboard = Panel(reader.page, "layer"), reader.page.keyboard
    expect(panel.sentence).to_contain_text("its heads in layer 2")
    before = panel.pictures()

    layer = panel.control("layer")
    layer.slider.focus()
    keyboard.press("ArrowLeft")
    expect(panel.sentence).to_contain_text("its heads in layer 1")
    expect(layer.field).to_have_value("1")
    assert panel.pictures() != before, "the sentence changed and the picture did not"

    panel.control("token, counted from the end").field.fill("7")
    keyboard.press("Tab")
    expect(panel.sentence).to_contain_text("Token 88 ")

    before = panel.pictures()
    panel.control("activation").field.select_option("none")
    panel.changed(before)
    assert reader.complaints == []
