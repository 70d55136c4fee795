"""The builder gives the same notebook for the same source, fills in only what is proven, and notices every change."""

import json
import re

import nbformat
import pytest

from course.builder import build
from course.builder.build import BuildError, Course
from course.builder.source import parse_source
from sample_exercise import SAMPLE

SOURCE = """\
# %% [markdown]
# # How a sample works
# The top keys keep {claim:kept}, of {source:report.tokens} tokens.

# %%
import uuid

from course.ui.claims import claim

claim("kept", True, "they keep 93 % of it", value="93 %")
once = uuid.uuid4()

# %%
once.hex

# %% [markdown]
# ## A figure

# %%
import matplotlib.pyplot as plt

from course.ui.style import show
from course.ui.panel import Panel, Slider

fig, ax = plt.subplots()
show(fig, "an empty pair of axes")

# %%
def draw(k):
    fig, ax = plt.subplots(figsize=(2, 1))
    return fig, f"nothing about k = {k}"


Panel(draw, k=Slider("k", 1, 4, 2))

# %% [markdown]
# ## Where it fails

# %% tags=["raises-exception"]
1 / 0
"""


@pytest.fixture(autouse=True)
def known_exercise(monkeypatch):
    monkeypatch.setattr("course.builder.source.find_exercise", lambda place: {"sample.largest": SAMPLE}[place])


def course_at(folder, source=SOURCE, **other):
    (folder / "notebooks/course/src").mkdir(parents=True)
    (folder / "data").mkdir()
    record = {"tokens": {"value": "943.7 B", "from": "report, section 2"}, "k": 2048}
    (folder / "data" / "report.json").write_text(json.dumps(record))
    for name, text in {"00_sample": source, **other}.items():
        (folder / "notebooks/course/src" / f"{name}.py").write_text(text)
    return Course(folder / "notebooks")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    course = course_at(tmp_path_factory.mktemp("course"))
    assert course.build("00_sample") == []
    return course


@pytest.fixture
def copy(built, tmp_path):
    """A course of one's own to spoil, with the notebook that was built."""
    course = course_at(tmp_path)
    course.notebook_path("00_sample").write_text(built.notebook_path("00_sample").read_text())
    return course


def notebook(course):
    return nbformat.read(course.notebook_path("00_sample"), as_version=4)


def cell(found, id):
    return next(cell for cell in found.cells if cell.id == id)


def draft(tmp_path, source):
    path = tmp_path / "source.py"
    path.write_text(source)
    return parse_source(path)


# From source to cells


def test_cells_are_named_by_their_first_claim_or_by_section_and_place(tmp_path):
    assert [cell.id for cell in draft(tmp_path, SOURCE).cells] == [
        "how-a-sample-works",
        "kept",
        "how-a-sample-works_1",
        "a-figure",
        "a-figure_1",
        "a-figure_2",
        "where-it-fails",
        "where-it-fails_1",
    ]


def test_a_new_cell_changes_no_id_outside_its_section(tmp_path):
    longer = draft(tmp_path, SOURCE.replace("# %%\nonce.hex", "# %%\n1 + 1\n\n# %%\nonce.hex"))
    assert {cell.id for cell in longer.cells} - {cell.id for cell in draft(tmp_path, SOURCE).cells} == {
        "how-a-sample-works_2"
    }


def test_equal_headings_still_give_different_ids(tmp_path):
    twice = draft(tmp_path, "# %% [markdown]\n# # Again\n\n# %%\n1\n\n# %% [markdown]\n# # Again\n\n# %%\n2\n")
    assert [cell.id for cell in twice.cells] == ["again", "again_1", "again_again2", "again_again2_1"]


def test_a_claim_called_like_a_section_is_an_error(tmp_path):
    with pytest.raises(BuildError, match="2 cells are called a-figure"):
        draft(tmp_path, SOURCE.replace('claim("kept"', 'claim("a-figure"'))


def test_tags_and_nothing_else_become_metadata(tmp_path):
    cells = draft(tmp_path, SOURCE).cells
    assert [cell.metadata for cell in cells] == [{}] * 7 + [{"tags": ["raises-exception"]}]


def test_an_exercise_becomes_task_stub_check_and_folded_hints(tmp_path):
    task, stub, check, hints = draft(tmp_path, "# %% [markdown]\n# {exercise:sample.largest}\n").cells
    assert task.source.startswith("### Exercise: The k largest ★☆☆ (5 minutes)\n\nReturn the")
    assert stub.source == SAMPLE.stub
    assert check.source == "check(largest)"
    assert hints.source.count("<details>") == hints.source.count("</details>") == 4
    assert [f"Hint {n}" in hints.source for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert f"```python\n{SAMPLE.source}\n```" in hints.source
    assert [cell.id for cell in (task, stub, check, hints)] == [
        "largest_task",
        "largest_stub",
        "largest_check",
        "largest_hints",
    ]


def test_an_exercise_nobody_wrote_is_an_error(tmp_path, monkeypatch):
    def unknown(place):
        raise ValueError(f"there is no exercise {place!r}")

    monkeypatch.setattr("course.builder.source.find_exercise", unknown)
    with pytest.raises(BuildError, match=r"sample\.least.*no exercise"):
        draft(tmp_path, "# %% [markdown]\n# {exercise:sample.least}\n")


# What is built


def test_prose_says_what_was_proven_and_recorded(built):
    assert "keep 93 %, of 943.7 B tokens." in notebook(built).cells[0].source


def test_cells_ran_in_order(built):
    code = [cell for cell in notebook(built).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4, 5]


def test_nothing_of_the_machine_or_of_live_widgets_is_stored(built):
    text = built.notebook_path("00_sample").read_text()
    assert str(build.ROOT) not in text
    assert "widget" not in text
    assert "jupytext" not in text
    assert set(notebook(built).metadata) == {"kernelspec", "language_info"}
    assert "version" not in notebook(built).metadata.language_info


def test_the_panel_leaves_a_picture(built):
    [output] = cell(notebook(built), "a-figure_2").outputs
    assert set(output.data) == {"image/png", "text/plain"}


def test_building_the_layout_anew_gives_the_same_bytes(copy, built):
    before = copy.notebook_path("00_sample").read_bytes()
    assert copy.build("00_sample", run=False) == []
    assert copy.notebook_path("00_sample").read_bytes() == before


def test_outputs_can_be_kept_while_prose_changes(copy):
    before = cell(notebook(copy), "how-a-sample-works_1").outputs
    source = copy.source_path("00_sample")
    source.write_text(source.read_text().replace("## A figure", "## One figure"))
    assert copy.build("00_sample", keep=True) == []
    assert cell(notebook(copy), "how-a-sample-works_1").outputs == before
    assert cell(notebook(copy), "one-figure_1").execution_count == 3


def test_outputs_are_not_kept_when_code_changes(copy):
    before = cell(notebook(copy), "how-a-sample-works_1").outputs
    source = copy.source_path("00_sample")
    source.write_text(source.read_text().replace("1 / 0", "2 / 0"))
    assert copy.build("00_sample", keep=True) == []
    assert cell(notebook(copy), "how-a-sample-works_1").outputs != before


def test_equal_cells_keep_their_own_outputs():
    def cells(*counts):
        return [nbformat.v4.new_code_cell("next(numbers)", execution_count=count) for count in counts]

    old, new = nbformat.v4.new_notebook(cells=cells(1, 2)), nbformat.v4.new_notebook(cells=cells(None, None))
    assert build.reuse_outputs(new, old)
    assert [cell.execution_count for cell in new.cells] == [1, 2]


def test_a_cell_that_fails_is_named(tmp_path):
    course = course_at(tmp_path, "# %% [markdown]\n# # Broken\n\n# %%\n1\n\n# %%\nint('x')\n")
    with pytest.raises(BuildError, match=r"^cell broken_2: ValueError: invalid literal"):
        course.build("00_sample")
    assert not course.notebook_path("00_sample").exists()


def test_one_thread_in_the_folder_of_the_notebooks(tmp_path):
    course = course_at(tmp_path, "# %%\nimport os\nos.environ['OMP_NUM_THREADS'], os.path.basename(os.getcwd())\n")
    course.build("00_sample")
    assert notebook(course).cells[0].outputs[0].data["text/plain"] == "('1', 'notebooks')"


@pytest.mark.parametrize(
    ("placeholder", "complaint"),
    [
        ("{claim:lost}", "cell how-a-sample-works: {claim:lost} is made by no cell"),
        ("{source:report.heads}", "{source:report.heads} is not in report.json: there is no 'heads'"),
        ("{source:paper.tokens}", "needs one paper.json in the data folder, and there are 0"),
        ("{source:report}", "is not one value in report.json"),
        ("Try {exercise:sample.largest} now", "must stand alone"),
        ("{table:sky}", "cell how-a-sample-works: {table:sky} is unknown: use one of ledger, "),
    ],
)
def test_a_number_nothing_stands_behind_is_an_error(copy, placeholder, complaint):
    source = copy.source_path("00_sample")
    source.write_text(source.read_text().replace("{claim:kept}", placeholder))
    [found] = copy.build("00_sample", run=False)
    assert complaint in found


def test_plain_values_need_no_entry(copy):
    source = copy.source_path("00_sample")
    source.write_text(source.read_text().replace("{source:report.tokens}", "{source:report.k}"))
    assert copy.build("00_sample", run=False) == []
    assert "of 2048 tokens" in notebook(copy).cells[0].source


def test_tables_are_drawn_anew_after_every_build_and_outputs_stay(copy, monkeypatch):
    drawn = iter(["first", "first", "second", "second"])
    monkeypatch.setattr(build, "table", lambda name, root: next(drawn))
    source = copy.source_path("00_sample")
    source.write_text(source.read_text().replace("{claim:kept}", "{table:sky}"))
    assert copy.build("00_sample", keep=True) == []
    before = cell(notebook(copy), "how-a-sample-works_1").outputs
    copy.redraw_tables()
    assert "keep second, of" in notebook(copy).cells[0].source
    assert cell(notebook(copy), "how-a-sample-works_1").outputs == before
    source.write_text(source.read_text().replace("1 / 0", "2 / 0"))
    copy.redraw_tables()
    assert "1 / 0" in cell(notebook(copy), "where-it-fails_1").source, "code that changed must be executed"


# What is committed


def test_a_built_notebook_has_nothing_to_complain_about(built):
    assert list(built.check("00_sample")) == []
    assert built.orphans() == []


def wide(found):
    cell(found, "a-figure_1").source += "\n# " + "x" * 80


def tall(found):
    cell(found, "a-figure_1").source += "\n" * 3 + "x\n" * 25


def unrun(found):
    cell(found, "a-figure_1").execution_count = None


def twice_run(found):
    cell(found, "a-figure_1").execution_count = 4


def edited(found):
    found.cells[0].source += " By hand."


def renamed(found):
    found.cells[1].id = "other"


def retagged(found):
    found.cells[1].metadata = {"tags": ["nbval-skip"]}


def grown(found):
    found.cells.append(nbformat.v4.new_markdown_cell("more", id="more"))


def stateful(found):
    found.metadata["widgets"] = {}


def paired(found):
    found.metadata["jupytext"] = {}


def heavy(found):
    cell(found, "a-figure_1").outputs[0].data["image/png"] = "A" * 300_000


def speechless(found):
    cell(found, "a-figure_1").outputs[0].metadata = {}


def silent(found):
    del cell(found, "a-figure_1").outputs[1]


def vector(found):
    cell(found, "a-figure_1").outputs[0].data["image/svg+xml"] = "<svg/>"


def warned(found):
    warning = nbformat.v4.new_output("stream", name="stderr", text="/tmp/cell.py:7: UserWarning: a tensor")
    found.cells[1].outputs.append(warning)


def failed(found):
    cell(found, "a-figure_1").outputs += cell(found, "where-it-fails_1").outputs


def harmless(found):
    cell(found, "where-it-fails_1").outputs = []


def repeated(found):
    found.cells[1].outputs *= 2


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (wide, "cell a-figure_1: a line has 82 columns; the limit is 76"),
        (tall, "lines; the limit is 25"),
        (unrun, "cell a-figure_1: its execution count is None and should be 3"),
        (twice_run, "cell a-figure_1: its execution count is 4 and should be 3"),
        (edited, "cell how-a-sample-works: its source is not what the source gives"),
        (renamed, "cell kept: its id is not what"),
        (retagged, "cell kept: its metadata is not what"),
        (grown, "it has 9 cells, its source gives 8"),
        (stateful, "widget state is saved"),
        (paired, "jupytext metadata is saved"),
        (heavy, "the limit is 300,000"),
        (speechless, "no alternative text: end with `show(fig, words)`"),
        (silent, "the words of a figure are not shown"),
        (vector, "figures are PNG"),
        (warned, "it prints a warning, '/tmp/cell.py:7: UserWarning"),
        (failed, "cell a-figure_1: it raised ZeroDivisionError; if that is meant, tag it"),
        (harmless, "is tagged raises-exception and raised nothing"),
        (repeated, "claim kept is made more than once"),
    ],
)
def test_a_spoilt_notebook_is_noticed(copy, spoil, complaint):
    found = notebook(copy)
    spoil(found)
    copy.notebook_path("00_sample").write_text(build.serialized(found))
    assert any(complaint in said for said in copy.check("00_sample")), list(copy.check("00_sample"))


def test_another_layout_of_the_file_is_noticed(copy):
    found = json.loads(copy.notebook_path("00_sample").read_text())
    copy.notebook_path("00_sample").write_text(json.dumps(found))
    assert "layout" in " ".join(copy.check("00_sample"))


def test_notebooks_without_source_and_sources_without_notebook_are_noticed(tmp_path):
    course = course_at(tmp_path)
    (course.folder / "99_stray.ipynb").write_text("{}")
    assert course.orphans() == ["99_stray.ipynb"]
    assert list(course.check("00_sample")) == ["it was never built"]


def test_the_command_reports_in_lines_and_fails(copy, monkeypatch, capsys):
    monkeypatch.setattr(build, "ROOT", copy.folder.parent)
    assert build.main(["--check"]) == 0
    assert capsys.readouterr().out == "00_sample: fine\n"
    copy.source_path("00_sample").write_text("# %%\n1\n")
    assert build.main(["--check", "00_sample"]) == 1
    said = capsys.readouterr()
    assert re.fullmatch(r"00_sample: [1-9] complaints\n", said.out)
    assert all(line.startswith("00_sample, ") for line in said.err.splitlines())
