"""What a test in the browser is written with: a reader, a panel and its controls, found the way a person finds them.

Nothing sleeps: every wait is for something named, with a limit.
"""

from dataclasses import dataclass

from playwright.sync_api import ConsoleMessage, Locator, Page, expect

SECONDS = 90  # for anything awaited, on a busy machine
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
RUN_ALL = """async () => {
    const run = (command) => window.jupyterapp.commands.execute(command);
    await run('notebook:clear-all-cell-outputs');  // so that what is seen afterwards is new
    void run('notebook:run-all-cells');
}"""


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
        page.set_default_timeout(1000 * SECONDS)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(f"{message.text} ({message.location.get('url', '')})")

    def open(self, notebook: str) -> None:
        """Open a notebook and wait for its kernel."""
        self.page.goto(self.lab.page_of(notebook))
        self.page.wait_for_function(IDLE)

    def run_all(self, seconds: int = SECONDS) -> None:
        """Run every cell, and wait until the last one has; a chapter that trains needs more `seconds` than others."""
        prompts = self.page.locator(".jp-CodeCell .jp-InputPrompt")
        self.page.evaluate(RUN_ALL)
        expect(prompts.last).to_have_text(f"[{prompts.count()}]:", timeout=1000 * seconds)
        self.page.wait_for_function(IDLE)
