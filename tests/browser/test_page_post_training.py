"""A reader of chapter 11 trains by reward in the page, moves the objective and reads sampled answers."""

import pytest
from playwright.sync_api import expect

from harness import Panel


@pytest.mark.slow
def test_a_reader_changes_the_group_and_reads_answers(reader):
    reader.open("11_rl_when_attention_chooses")
    reader.run_to("domain", seconds=300)
    panel = Panel(reader.page, "group size G")
    expect(panel.sentence).to_contain_text("4 of 8 answers are right")
    before = panel.pictures()
    panel.control("right answers").field.select_option("all")
    expect(panel.sentence).to_contain_text("the group teaches nothing")
    assert panel.pictures() != before, "the sentence changed and the picture did not"

    answers = Panel(reader.page, "domain")
    expect(answers.sentence).to_contain_text("before, repair, level 2, direct")
    answers.control("model").field.select_option("after")
    expect(answers.sentence).to_contain_text("after, repair, level 2, direct")
    assert reader.complaints == []
