"""Chapter 10 in a browser: another GPU is taken, and what fits changes with it."""

import pytest
from playwright.sync_api import expect

from harness import Panel, Reader


@pytest.mark.slow
def test_a_reader_looks_for_gpus_that_are_large_enough(reader: Reader):
    reader.open("10_full_model_on_a_gpu")
    reader.run_to("how many")
    panel = Panel(reader.page, "how many")

    expect(panel.sentence).to_contain_text("8 x H200 141 GB, 1 x 128K tokens")
    expect(panel.sentence).to_contain_text("it fits; there is room for 7")
    before = panel.pictures()
    panel.control("GPU").field.select_option("H100 80 GB")
    expect(panel.sentence).to_contain_text("it does not fit; not one sequence has room")
    panel.changed(before)

    assert reader.complaints == []
