"""The course as pages in a real browser: nothing serious for a screen reader, light and dark, on a telephone too."""

import pytest
from axe_playwright_python.sync_playwright import Axe

from harness import CLOCK
from project import ROOT

NAMES = ["index", *sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))]

# A page has thousands of words of code in a dozen colours. What has been looked at once is looked at no more.
ONCE = """() => {
    const seen = new Set();
    for (const code of document.querySelectorAll('.highlight pre')) {
        const place = code.closest('details') ? 'folded' : 'open';
        const words = [...code.querySelectorAll('span')];
        const kinds = words.map(word => `${place} ${word.className}`);
        if (kinds.every(kind => seen.has(kind))) words.forEach(word => word.replaceWith(word.textContent));
        kinds.forEach(kind => seen.add(kind));
    }
}"""


def complaints(browser, page_file, width, scheme, **only):
    """What axe finds on a page at a width, in a colour scheme; the page must fit and fetch nothing."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(1000 * CLOCK)
    page, fetched = context.new_page(), []
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(page_file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page itself scrolls sideways"
    assert [url for url in fetched if not url.startswith(("file:", "data:"))] == []
    page.evaluate(ONCE)
    found = Axe().run(page, options={"resultTypes": ["violations"], **only}).response["violations"]
    context.close()
    return [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_read_wide_and_light_narrow_and_dark(browser, book, name):
    assert complaints(browser, book / f"{name}.html", 390, "dark") == []
    assert complaints(browser, book / f"{name}.html", 1000, "light", runOnly=["color-contrast"]) == []
