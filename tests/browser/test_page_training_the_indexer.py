"""A reader of chapter 05 trains an indexer in the page and moves through its training."""

import pytest
from playwright.sync_api import expect

from harness import Panel


@pytest.mark.slow
def test_a_reader_moves_through_the_training(reader):
    reader.open("05_training_the_indexer")
    reader.run_to("step")
    panel, keyboard = Panel(reader.page, "step"), reader.page.keyboard
    expect(panel.sentence).to_contain_text("After 20 steps, layer 2, token 95")
    before = panel.pictures()

    step = panel.control("step")
    step.slider.focus()
    keyboard.press("ArrowRight")
    expect(panel.sentence).to_contain_text("After 25 steps, layer 2")
    expect(step.field).to_have_value("25")
    assert panel.pictures() != before, "the sentence changed and the picture did not"

    panel.control("layer").field.fill("1")
    keyboard.press("Tab")
    expect(panel.sentence).to_contain_text("After 25 steps, layer 1")

    panel.control("token, counted from the end").field.fill("7")
    keyboard.press("Tab")
    expect(panel.sentence).to_contain_text("token 88 (")
    assert reader.complaints == []
