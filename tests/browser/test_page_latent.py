"""A reader opens notebook 02, runs it, and moves the rank: figure and sentence follow."""

import pytest
from playwright.sync_api import expect

from harness import Panel, Reader


@pytest.mark.slow
def test_a_reader_moves_the_rank_and_cuts_one_layer(reader: Reader):
    reader.open("02_latent_attention")
    reader.run_all()
    panel, keyboard = Panel(reader.page, "rank"), reader.page.keyboard

    rank = panel.control("rank")
    expect(rank.field).to_have_value("24")
    expect(panel.sentence).to_contain_text("Rank 24 of 48 in all layers")
    pictures = panel.pictures()

    rank.slider.focus()
    keyboard.press("ArrowLeft")
    expect(panel.sentence).to_contain_text("Rank 23 of 48 in all layers: 78 bytes per token")
    assert panel.pictures() != pictures, "the sentence changed and the picture did not"

    panel.control("cut in").field.select_option("layer 0")
    expect(panel.sentence).to_contain_text("Rank 23 of 48 in layer 0")

    assert reader.complaints == []
