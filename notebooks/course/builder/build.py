"""Builds the course: notebooks/course/src/NAME.py becomes notebooks/NAME.ipynb, executed.

    python -m course.builder [NAME ...]        build and execute (all notebooks when none is named)
    python -m course.builder --keep            the same, but keep the outputs where no code has changed
    python -m course.builder --no-execute      layout only: unchanged cells keep their outputs
    python -m course.builder --check           is every committed notebook what its source would give?

A source is a Python file in percent format: reviewed, linted and compared like any other code. `source` makes its
cells, this module runs them, `prose` fills the numbers they proved into the text, `lint` says what else a notebook must
keep. Tables that point into other notebooks (`reference_tables`) are drawn anew after every build.

Ids, sources and tags do not depend on the machine, outputs do. `--check` therefore takes the outputs as committed and
demands that everything around them is what the source gives, byte for byte; nbval compares the outputs.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_notebook

from course.builder import lint
from course.builder.prose import fill_placeholders
from course.builder.reference_tables import table
from course.builder.source import BuildError, metadata, parse_source

ROOT = Path(__file__).resolve().parents[3]
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in order in a clean kernel with one thread, in `folder`, and tidy what they leave."""
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
        extra_arguments=["--IPKernelApp.log_level=40"],  # errors only
    )
    try:
        client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    except CellExecutionError as error:
        failed = [cell for cell in notebook.cells if any(o.output_type == "error" for o in cell.get("outputs", []))]
        place = next((cell.id for cell in failed if "raises-exception" not in cell.metadata.get("tags", [])), "?")
        raise BuildError(f"cell {place}: {error.ename}: {error.evalue}\n{error}") from None
    notebook.metadata = metadata()
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        # drop what belongs to this run alone: ids of live widgets, and this machine's folders in tracebacks
        output.get("data", {}).pop(WIDGET_VIEW, None)
        if output.output_type == "error":
            output.traceback = [line.replace(f"{ROOT}/", "") for line in output.traceback]


def reuse_outputs(draft: NotebookNode, old: NotebookNode) -> bool:
    """Give code cells of a draft the outputs of equal old ones, in order; true if no code cell had changed."""
    past = [cell for cell in old.cells if cell.cell_type == "code"]
    code = [cell for cell in draft.cells if cell.cell_type == "code"]
    unchanged = [cell.source for cell in past] == [cell.source for cell in code]
    for cell in code:
        if same := next((other for other in past if other.source == cell.source), None):
            past.remove(same)  # an equal cell further down has outputs of its own
            cell.outputs, cell.execution_count = same.outputs, same.execution_count
    return unchanged


def serialized(notebook: NotebookNode) -> str:
    """A notebook as the text of its file."""
    return nbformat.writes(notebook).rstrip("\n") + "\n"


class Course:
    """The notebooks of one folder: sources in course/src/ beside them, data in data/ beside the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder.parent / "data"

    def names(self) -> list[str]:
        """All notebooks that have a source."""
        return sorted(source.stem for source in (self.folder / "course/src").glob("*.py"))

    def build(self, name: str, run: bool = True, keep: bool = False) -> list[str]:
        """Write one notebook, and return what there is to complain about in it."""
        draft, target = parse_source(self.source_path(name)), self.notebook_path(name)
        unchanged = reuse_outputs(draft, nbformat.read(target, as_version=4) if target.exists() else new_notebook())
        if run and not (keep and unchanged):
            execute(draft, self.folder)
        target.write_text(serialized(draft), "utf-8")  # for tables, which read the notebooks as they lie there
        self.fill(draft)
        target.write_text(serialized(draft), "utf-8")
        return list(self.check(name))

    def fill(self, draft: NotebookNode) -> list[str]:
        """Put numbers and tables into the prose; returns complaints."""
        return fill_placeholders(draft, self.data, partial(table, root=self.folder.parent))

    def check(self, name: str) -> Iterator[str]:
        """Complaints about one committed notebook: what `lint` finds, and whether it is what its source gives."""
        target = self.notebook_path(name)
        if not target.exists():
            yield "it was never built"
            return
        text = target.read_text("utf-8")
        committed, draft = nbformat.reads(text, as_version=4), parse_source(self.source_path(name))
        reuse_outputs(draft, committed)
        yield from (*lint.errors(committed, len(text.encode())), *self.fill(draft))
        if serialized(draft) != text:
            yield _first_difference(draft, committed)

    def redraw_tables(self) -> None:
        """Draw tables anew, as the cells they point to may have moved, where nothing but tables has changed."""
        for name in self.names():
            if "{table:" not in self.source_path(name).read_text("utf-8") or not self.notebook_path(name).exists():
                continue
            draft = parse_source(self.source_path(name))
            if reuse_outputs(draft, nbformat.read(self.notebook_path(name), as_version=4)):
                self.fill(draft)
                self.notebook_path(name).write_text(serialized(draft), "utf-8")

    def orphans(self) -> list[str]:
        """Notebooks without a source."""
        return sorted(path.name for path in self.folder.glob("*.ipynb") if path.stem not in self.names())

    def source_path(self, name: str) -> Path:
        """The file to edit."""
        return self.folder / "course/src" / f"{name}.py"

    def notebook_path(self, name: str) -> Path:
        """The file to read."""
        return self.folder / f"{name}.ipynb"


def _first_difference(draft: NotebookNode, committed: NotebookNode) -> str:
    """Where a committed notebook first differs from what its source gives."""
    for expected, found in zip(draft.cells, committed.cells, strict=False):
        for part in ("id", "cell_type", "source", "metadata"):
            if expected[part] != found[part]:
                return f"cell {expected.id}: its {part} is not what the source gives: build the notebook anew"
    if len(draft.cells) != len(committed.cells):
        return f"it has {len(committed.cells)} cells, its source gives {len(draft.cells)}: build the notebook anew"
    return "its metadata or layout is not what the builder writes: build the notebook anew"


def main(arguments: list[str]) -> int:
    """Build or check the notebooks named on the command line; 1 if anything is to be complained about."""
    parser = argparse.ArgumentParser(description="Build the course's notebooks from notebooks/course/src.")
    parser.add_argument("names", nargs="*", help="such as 04_token_selection; all when none is given")
    parser.add_argument("--check", action="store_true", help="only compare committed notebooks with their sources")
    parser.add_argument("--keep", action="store_true", help="keep the outputs of notebooks whose code is unchanged")
    parser.add_argument("--no-execute", dest="run", action="store_false", help="layout only")
    chosen = parser.parse_args(arguments)
    course = Course(ROOT / "notebooks")
    complaints = (
        [f"{orphan}: has no source in notebooks/course/src" for orphan in course.orphans()] if chosen.check else []
    )
    for name in [Path(name).stem for name in chosen.names] or course.names():
        try:
            errors = list(course.check(name) if chosen.check else course.build(name, chosen.run, chosen.keep))
        except BuildError as error:
            errors = [str(error)]
        print(f"{name}: {len(errors)} complaints" if errors else f"{name}: fine", flush=True)
        complaints += [f"{name}, {complaint}" for complaint in errors]
    if not chosen.check:
        course.redraw_tables()
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints and (chosen.check or chosen.run) else 0
