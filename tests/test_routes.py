"""The routes keep to their times, lack nothing, say what they leave out, and agree with what the chapters say of them.

That each runs by itself and prints what the whole course prints is nbval's to show: `make test` runs both.
"""

import re
from copy import deepcopy
from itertools import count
from pathlib import Path

import nbformat
import pytest
import route as command
from build import Course
from builder.names import needs_and_gives
from builder.routes import NAMES, ROUTES, SECONDS, along, gaps, is_on, minutes, taken, tell
from builder.tables import REFERENCE
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted(ROOT.glob("notebooks/*.ipynb"))}
LINK = re.compile(r"\]\(([^)#\s]+)")
SHORT = list(NAMES)[:-1]
CHAPTERS = [name for name in NOTEBOOKS if name != REFERENCE]  # which is looked up, not read
NUMBERS = count()


def text(source, route=None, id="text"):
    return new_markdown_cell(source, id=id, metadata={"tags": [f"route-{route}"]} if route else {})


def code(source, route=None, id=None, outputs=()):
    tags = {"tags": [f"route-{route}"]} if route else {}
    return new_code_cell(
        source, id=id or f"code{next(NUMBERS)}", metadata=tags, outputs=list(outputs), execution_count=7
    )


def notebook(*cells):
    return new_notebook(cells=list(cells))


# Which names a cell needs


@pytest.mark.parametrize(
    ("source", "needs", "gives"),
    [
        ("a = b", {"b"}, {"a"}),
        ("a = 1\nc = a", set(), {"a", "c"}),
        ("runs = {1: 2} | runs", {"runs"}, {"runs"}),
        ("n += 1", {"n"}, {"n"}),
        ("x.y = 1\nx[i] = 2", {"x", "i"}, set()),
        ("for i in many:\n    i", {"many"}, {"i"}),
        ("[i + j for i in many for j in i if k]", {"many", "k"}, set()),
        ("i = {i: i for i in many}", {"many"}, {"i"}),
        ("import a.b, c as d\nfrom e import f as g", set(), {"a", "d", "g"}),
        ("def f(x, y=z):\n    w = x + late\n    return w", {"z", "late"}, {"f"}),
        ("def f():\n    return g()\n\n\ndef g():\n    return 1", set(), {"f", "g"}),
        ("def f(x):\n    return [x + i + far for i in x]", {"far"}, {"f"}),
        ("h = lambda x: x + far", {"far"}, {"h"}),
        ("@torch.no_grad()\ndef f(*a, **k):\n    a, k", {"torch"}, {"f"}),
        ("class A(B):\n    def f(self):\n        return C", {"B", "C"}, {"A"}),
        ("with a() as b:\n    b", {"a"}, {"b"}),
        ("try:\n    a\nexcept E as e:\n    e", {"a", "E"}, {"e"}),
        ("print(f'{a:.0%} {b!r}')", {"print", "a", "b"}, set()),
        ("(first := a)\nfirst", {"a"}, {"first"}),
    ],
)
def test_names_are_read_off_as_python_binds_them(source, needs, gives):
    assert needs_and_gives(source) == (needs, gives)


# What is on a route


def test_a_tag_names_the_shortest_route():
    cells = [text("", "15m"), text("", "2h"), text("")]
    assert [[is_on(cell, route) for cell in cells] for route in ROUTES] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


BETWEEN = "So it ends.\n\n## A section\n\nIt begins."


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ("2h", "2h", BETWEEN),
        (None, "2h", "## A section\n\nIt begins."),
        ("2h", None, "So it ends."),
        (None, None, "## A section\n\nIt begins."),
    ],
)
def test_text_between_two_sections_goes_with_the_cells_around_it(before, after, kept):
    whole = notebook(code("1", before, "a"), text(BETWEEN, "2h"), code("2", after, "b"))
    [found] = [cell.source for cell in along(whole, "2h") if cell.cell_type == "markdown"]
    assert found == kept
    assert whole.cells[1].source == BETWEEN


def test_code_is_never_cut():
    source = 'print("a")\n\n## no heading\n\n1'
    assert [cell.source for cell in along(notebook(code("0"), code(source, "2h"), code("0")), "2h")] == [source]


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [
        ([code("a = 1"), code("a", "2h", "b")], "cell b needs `a` of cell code"),
        ([code("a = 1", "2h"), code("a = 2", id="c"), code("a", "2h", "b")], "cell b needs `a` of cell c"),
        ([code("a = 1"), code("def f():\n    return a", "2h", "b")], "cell b needs `a`"),
        ([text("Look:", "2h"), code("1")], "cell text ends with a colon"),
        ([text("Look:", "15m"), code("1", "2h")], "on the route of 15 minutes cell text ends"),
    ],
)
def test_what_a_route_lacks_is_noticed(cells, complaint):
    assert [complaint in found for found in gaps(notebook(*cells))] == [True]


@pytest.mark.parametrize(
    "cells",
    [
        [code("a = 1", "2h"), code("a", "2h")],
        [code("a = 1"), code("a = 2\na", "2h")],
        [code("a = 1"), code("a")],
        [code("print(len)", "2h")],
        [text("Look:", "2h"), code("1", "2h")],
        [code("0", "2h"), text("Look.\n\n## Next\n\nSee:", "2h"), code("1")],
    ],
)
def test_what_is_whole_is_not_complained_about(cells):
    assert list(gaps(notebook(*cells))) == []


def test_a_needed_cell_that_loses_its_tag_is_missed():
    for name in CHAPTERS:
        whole = deepcopy(NOTEBOOKS[name])
        imports = next(cell for cell in whole.cells if cell.cell_type == "code" and is_on(cell, "2h"))
        imports.metadata["tags"] = []
        assert any(f"of cell {imports.id}," in found for found in gaps(whole)), name


# How long it takes


def test_minutes_are_counted_by_the_piece():
    figure = new_output("display_data", data={"image/png": "", "text/plain": "not counted"})
    panel = new_output("execute_result", data={"image/png": "", "text/plain": "not counted"})
    words = new_output("stream", text="word " * 100)
    cells = [
        text("word " * 200),
        text("<details><summary>Hint</summary>\n\n" + "word " * 500 + "\n\n</details>"),
        code("import a\nfrom b import c\n\n" + "x = 1\n" * 15, outputs=[figure, words, panel]),
    ]
    assert [minutes([cell]) for cell in cells] == [1, 0, 0.5 + 0.25 + 0.5 + 1]


def test_an_exercise_takes_the_minutes_it_names():
    cells = [text("### Exercise E1.1 ★☆☆ Name (15 minutes)\n\n" + "word " * 900), code("x\n" * 90, id="e1-1_stub")]
    assert minutes(cells) == 15


@pytest.mark.parametrize("route", ROUTES)
def test_each_route_takes_the_time_it_is_named_after(route):
    parts = [along(NOTEBOOKS[name], route) for name in CHAPTERS]
    needed = sum(map(minutes, parts)) + sum(SECONDS / 60 for cells in parts if cells)
    assert 0.85 * ROUTES[route] <= needed <= ROUTES[route]


# What a reader is told, and gets


def test_the_opening_cell_says_what_is_on_which_route():
    cells = [text("A. {routes}", "15m"), code("1", "2h"), code("2")]
    tell(notebook(*cells))
    assert cells[0].source == ("A. 15 minutes: 1 cell, 1 min. 2 hours: 2 cells, 1 min. 2 days: all of it, 1 min.")


def test_every_opening_cell_has_the_line_of_its_routes():
    course = Course(ROOT / "notebooks")
    for name in CHAPTERS:
        said = f"2 hours: {len(along(NOTEBOOKS[name], '2h'))} cells, "
        assert said in NOTEBOOKS[name].cells[0].source, name
        assert course.source(name).read_text("utf-8").split("# %%")[1].count("{routes}") == 1, name


def test_two_hours_lead_through_every_chapter_and_ask_for_no_exercise():
    on = {name: [cell.id for cell in along(NOTEBOOKS[name], "2h")] for name in CHAPTERS}
    assert [name for name, ids in on.items() if len(ids) < 8] == []
    assert [id for ids in on.values() for id in ids if re.match(r"e\d+-\d+_", id)] == []


def test_a_route_s_notebook_says_what_is_left_out_and_where_it_goes_on():
    whole = {
        "01_a": notebook(code("1", "2h", outputs=[new_output("execute_result", execution_count=7)]), code("2")),
        "02_b": notebook(code("3")),
        "03_c": notebook(text("See [01](01_a.ipynb) and [02](02_b.ipynb#x), C3.1 and C2.9.", "2h")),
    }
    on = taken(whole, "2h")
    assert list(on) == ["01_a", "03_c"]
    first, cell, last = on["01_a"].cells
    assert first.source == "*The route of 2 hours: 1 cell of [01_a](../notebooks/01_a.ipynb) is left out here.*"
    assert cell.execution_count == cell.outputs[0].execution_count == 1
    assert last.source == "**Next**: [03_c](03_c.ipynb)"
    assert on["03_c"].cells[1].source == (
        "See [01](01_a.ipynb) and [02](../notebooks/02_b.ipynb#x), [C3.1](../notebooks/03_c.ipynb) and C2.9."
    )
    assert whole["01_a"].cells[0].execution_count == 7


def test_a_notebook_whose_opening_is_left_out_keeps_its_title():
    on = taken({"01_a": notebook(text("# 01 A title\n\nWords."), code("1", "2h"))}, "2h")
    assert on["01_a"].cells[0].source.startswith("# 01 A title\n\n*The route of 2 hours: 1 cell of")


@pytest.mark.parametrize("route", SHORT)
def test_the_links_of_a_route_lead_somewhere(route):
    on = taken(NOTEBOOKS, route)
    for name, found in on.items():
        nbformat.validate(found)
        links = [link for cell in found.cells if cell.cell_type == "markdown" for link in LINK.findall(cell.source)]
        here = [link for link in links if "://" not in link and not link.startswith("../")]
        assert {Path(link).stem for link in here} <= set(on), name
        assert [link for link in links if link.startswith("../") and not (ROOT / link[3:]).exists()] == [], name


def test_the_command_writes_one_route_and_removes_what_is_no_longer_on_it(tmp_path, capsys):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "route-2h").mkdir()
    (tmp_path / "route-2h" / "99_old.ipynb").write_text("{}")
    nbformat.write(notebook(code("1", "2h"), code("2")), tmp_path / "notebooks" / "01_a.ipynb")
    [path] = command.write_route("2h", tmp_path)
    assert path == tmp_path / "route-2h" / "01_a.ipynb"
    assert [cell.source for cell in nbformat.read(path, as_version=4).cells][1:] == ["1"]
