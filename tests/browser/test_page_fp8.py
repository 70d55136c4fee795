"""Chapter 07 in a browser: an outlier grows by one key press, another format is chosen, picture and sentence follow."""

import pytest
from playwright.sync_api import expect

from harness import Panel, Reader


@pytest.mark.slow
def test_a_reader_lets_an_outlier_grow_and_changes_the_format(reader: Reader):
    reader.open("07_fp8")
    reader.run_all()
    panel, keyboard = Panel(reader.page, "outlier, 2 to the power of"), reader.page.keyboard

    outlier = panel.control("outlier, 2 to the power of")
    expect(outlier.field).to_have_value("4")
    expect(panel.sentence).to_contain_text("With int8, one scale for a row and an outlier of 16:")
    pictures = panel.pictures()

    outlier.slider.focus()
    keyboard.press("ArrowRight")
    expect(panel.sentence).to_contain_text("an outlier of 32:")
    assert panel.pictures() != pictures, "the sentence changed and the picture did not"

    for label, choice in (("format", "e4m3"), ("one scale for", "8 numbers")):
        before = panel.pictures()
        panel.control(label).field.select_option(choice)
        expect(panel.sentence).to_contain_text(choice)
        panel.changed(before)

    assert reader.complaints == []
