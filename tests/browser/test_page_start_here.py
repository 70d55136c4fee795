"""What the course promises first: open notebook 00, run it, move the top-k slider, type a text, see both change."""

import pytest
from playwright.sync_api import expect

from harness import Panel, Reader


@pytest.fixture
def opened(reader: Reader) -> Reader:
    reader.open("00_start_here")
    reader.run_all()
    return reader


@pytest.mark.slow
def test_a_reader_runs_everything_moves_top_k_and_types_a_text(opened):
    panel, keyboard = Panel(opened.page, "top-k"), opened.page.keyboard

    top_k = panel.control("top-k")
    expect(top_k.field).to_have_value("16")
    expect(panel.sentence).to_contain_text("keeps 16 of")
    pictures = panel.pictures()

    top_k.slider.focus()
    keyboard.press("ArrowRight")
    expect(panel.sentence).to_contain_text("keeps 17 of")
    expect(top_k.field).to_have_value("17")
    assert panel.pictures() != pictures, "the sentence changed and the picture did not"

    top_k.field.fill("5")
    keyboard.press("Tab")
    expect(panel.sentence).to_contain_text("keeps 5 of")

    for label, value in (("layer", "0"), ("token, counted from the end", "3")):
        before = panel.pictures()
        panel.control(label).field.fill(value)
        keyboard.press("Tab")
        panel.changed(before)

    text = panel.control("your text, or file:PATH").field
    text.fill("The quick brown fox <b>jumps</b> over the lazy dog.")
    keyboard.press("Tab")
    expect(panel.sentence).to_contain_text("of 51")
    expect(panel.output).to_contain_text("The quick brown fox <b>jumps</b> over the lazy dog.")

    text.fill("")
    keyboard.press("Tab")
    expect(panel.output.get_by_role("img")).to_have_count(0)
    text.fill("And it goes on after a mistake, with another text.")
    keyboard.press("Tab")
    expect(panel.output.get_by_role("img")).to_have_count(1)
    expect(panel.sentence).to_contain_text("of 50")

    assert opened.complaints == []
