"""What every committed notebook of the course must keep, checked without running it.

Each check is a generator of complaints about one notebook, one line each, and names the cell by its id. What a
notebook *computes* is nbval's business; this file is about everything nbval does not see: it skips cells that were
never executed, compares no picture, and knows no budget.
"""

from collections.abc import Iterator
from types import MappingProxyType

from nbformat import NotebookNode

from course.builder.prose import claim_records

BUDGETS = MappingProxyType(  # seconds as a test, on two cores
    {
        "00_start_here": 30,
        "09a_attention_at_length": 45,
        "02_latent_attention": 40,
        "04_token_selection": 90,
        "07_fp8": 40,
        "05_training_the_indexer": 120,
        "06_sparse_training": 150,
        "08_kernels": 90,
        "10_full_model_on_a_gpu": 90,
        "11_rl_when_attention_chooses": 150,
        "09_cost_curves": 150,
        "12_one_year_later": 90,
    }
)
BYTES, LINES, COLUMNS = 300_000, 25, 76
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"


def time_budget(name: str) -> int:
    """How long a notebook may take when it is run as a test."""
    return BUDGETS.get(name, 60)


def errors(notebook: NotebookNode, size: int) -> Iterator[str]:
    """Every complaint about a notebook whose file has `size` bytes."""
    if size >= BYTES:
        yield f"the file has {size:,} bytes; the limit is {BYTES:,}: draw fewer or smaller figures"
    if "widgets" in notebook.metadata:  # GitHub renders nothing of a notebook whose widget state it cannot read
        yield "widget state is saved in the metadata: it breaks the view on GitHub; build the notebook instead"
    if "jupytext" in notebook.metadata:
        yield "jupytext metadata is saved: JupyterLab would rewrite the source"
    made = [claim["name"] for claim in claim_records(notebook)]
    for twice in sorted({id for id in made if made.count(id) > 1}):
        yield f"claim {twice} is made more than once: give each its own name"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for expected, cell in enumerate(code, 1):
        if cell.execution_count != expected:
            count = f"its execution count is {cell.execution_count} and should be {expected}"
            yield f"cell {cell.id}: {count}: run all cells in order"
        for error in (*_size_errors(cell), *_exception_errors(cell), *_output_errors(cell)):
            yield f"cell {cell.id}: {error}"


def _size_errors(cell: NotebookNode) -> Iterator[str]:
    lines = cell.source.splitlines()
    if len(lines) > LINES:
        yield f"it has {len(lines)} lines; the limit is {LINES}"
    if longest := [line for line in lines if len(line) > COLUMNS]:
        yield f"a line has {len(longest[0])} columns; the limit is {COLUMNS}: {longest[0].strip()[:40]}…"


def _exception_errors(cell: NotebookNode) -> Iterator[str]:
    meant = "raises-exception" in cell.metadata.get("tags", [])
    raised = [output.ename for output in cell.outputs if output.output_type == "error"]
    if raised and not meant:
        yield f"it raised {raised[0]}; if that is meant, tag it raises-exception"
    if meant and not raised:
        yield "it is tagged raises-exception and raised nothing"


def _output_errors(cell: NotebookNode) -> Iterator[str]:
    for output, following in zip(cell.outputs, [*cell.outputs[1:], None], strict=False):
        data = output.get("data", {})
        if "image/png" in data:
            yield from _figure_errors(output, following)
        if "image/svg+xml" in data or WIDGET_STATE in data:
            yield "it stores SVG or widget state: figures are PNG, panels are `course.ui.panel.Panel`"
        if output.get("name") == "stderr":  # a warning's path and line differ between machines, so nbval would fail
            yield f"it prints a warning, {output.text.strip()[:60]!r}…: change the code that it warns of"


def _figure_errors(output: NotebookNode, following: NotebookNode | None) -> Iterator[str]:
    """A figure has an alternative text, and the same words where everyone can read them."""
    alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
    below = following.get("text", "") if following else ""
    if not alt:
        yield "a figure has no alternative text: end with `show(fig, words)`"
    # `show` prints the words after the picture; a snapshot or panel carries them as its own plain text
    elif " ".join(alt.split()) not in " ".join(f"{output.data.get('text/plain', '')} {below}".split()):
        yield "the words of a figure are not shown with it: end with `show(fig, words)`"
