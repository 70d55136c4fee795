"""What a test in the browser is written with: a reader, a panel and its controls, found the way a person finds them.

Nothing is waited for blindly: every wait is for something named, and its limit is out of a busy machine's reach. Where
a kernel computes for long the processor's time counts (`patience`); what follows a click costs a fraction of a second.
"""

from dataclasses import dataclass

from playwright.sync_api import ConsoleMessage, Locator, Page
from playwright.sync_api import TimeoutError as NotYet

from patience import patiently

SECONDS = 150  # of the processor, to open a notebook or to run it
CLOCK = 120  # seconds for anything else awaited in a page
IDLE = """() => {
    const session = window.jupyterapp?.shell?.currentWidget?.sessionContext;
    return session?.isReady && session.session?.kernel?.status === 'idle';
}"""
DRAWN = """panel => {
    const drawn = panel.querySelector('[role=status]').parentElement.cloneNode(true);
    drawn.querySelector('[role=status]').remove();
    for (const image of drawn.querySelectorAll('img')) image.removeAttribute('alt');
    return drawn.innerHTML;
}"""
RUN = """async label => {
    const run = (command) => window.jupyterapp.commands.execute(command);
    await run('notebook:clear-all-cell-outputs');  // so that what is seen afterwards is new
    const notebook = window.jupyterapp.shell.currentWidget.content;
    const code = notebook.widgets.filter(cell => cell.model.type === 'code');
    const shows = (cell) => ['Panel(', `"${label}"`].every(word => cell.model.sharedModel.source.includes(word));
    const count = label ? 1 + code.findLastIndex(shows) : code.length;
    if (label) notebook.activeCellIndex = notebook.widgets.indexOf(code[count - 1]) + 1;
    void run(label ? 'notebook:run-all-above' : 'notebook:run-all-cells');
    return count;
}"""
HAS_RUN = f"""count => {{
    const prompts = document.querySelectorAll('.jp-CodeCell .jp-InputPrompt');
    return prompts[count - 1].textContent === `[${{count}}]:` && ({IDLE})();
}}"""


@dataclass(frozen=True)
class Lab:
    """A running server: where it listens, and its secret."""

    address: str
    token: str

    def page_of(self, notebook: str) -> str:
        """The address at which a notebook opens."""
        return f"{self.address}/lab/tree/notebooks/{notebook}.ipynb?token={self.token}&reset"


@dataclass(frozen=True)
class Control:
    """One control of a panel, found by the name that a screen reader says."""

    field: Locator

    @property
    def slider(self) -> Locator:
        """The handle of the slider in the same row."""
        row = self.field.locator("xpath=ancestor::*[contains(concat(' ', @class, ' '), ' widget-hbox ')][1]")
        return row.get_by_role("slider")


class Panel:
    """The first panel of a page that has a control with this label."""

    def __init__(self, page: Page, label: str) -> None:
        named = page.locator(".widget-inline-hbox", has=page.get_by_text(label, exact=True))
        self.output = page.locator(".jp-OutputArea-output .widget-vbox", has=named).first
        self.sentence = self.output.get_by_role("status")

    def control(self, label: str) -> Control:
        """The control with this label."""
        return Control(self.output.get_by_label(label, exact=True).first)

    def changed(self, before: str) -> None:
        """Wait until something else is drawn than `before`."""
        self.output.page.wait_for_function(
            f"([panel, before]) => ({DRAWN})(panel) !== before", arg=[self.output.element_handle(), before]
        )

    def pictures(self) -> str:
        """Everything drawn, without the sentence, to be compared before and after."""
        self.sentence.wait_for()
        return self.output.evaluate(DRAWN)


class Reader:
    """Someone with a browser."""

    def __init__(self, page: Page, lab: Lab) -> None:
        self.page, self.lab = page, lab
        self.complaints: list[str] = []
        page.set_default_timeout(1000 * CLOCK)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(f"{message.text} ({message.location.get('url', '')})")

    def open(self, notebook: str) -> None:
        """Open a notebook and wait for its kernel."""
        self.page.goto(self.lab.page_of(notebook), wait_until="commit")
        patiently(lambda: self._sees(IDLE), f"{notebook} is open and its kernel idle", SECONDS)

    def run_all(self, seconds: int = SECONDS) -> None:
        """Run every cell, and wait until the last one has; a chapter that trains needs more `seconds` than others."""
        count = self.page.evaluate(RUN)
        patiently(lambda: self._sees(HAS_RUN, count), "all cells have run", seconds)

    def run_to(self, label: str, seconds: int = SECONDS) -> None:
        """Run the cells down to the panel that has a control with this label: all that a long chapter needs here."""
        count = self.page.evaluate(RUN, label)
        assert count, f"no cell has a panel with the control {label!r}"
        patiently(lambda: self._sees(HAS_RUN, count), f"the panel with {label!r} has run", seconds)

    def _sees(self, condition: str, argument: object = None) -> bool:
        """Whether a condition comes true in the page within five seconds."""
        try:
            self.page.wait_for_function(condition, arg=argument, timeout=5000, polling=100)
        except NotYet:
            return False
        return True
