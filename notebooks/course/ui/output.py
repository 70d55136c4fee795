"""How this room speaks: one output, in several forms at once, of which each viewer shows the best it can.

A notebook's output is a bundle: a picture for those who see it, plain words for everybody else and for the
test that compares outputs. In a plain Python process there is no notebook to show pictures in, so the words
are printed alone; that is also what the tests of this room capture.
"""

from typing import Any

from IPython.core.getipython import get_ipython
from IPython.display import display


def publish(bundle: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
    """Show one output. `bundle` maps MIME types to data and always holds "text/plain", the words of it."""
    if get_ipython() is None:  # type: ignore[no-untyped-call]
        print(bundle["text/plain"])
    else:
        display(bundle, raw=True, metadata=metadata or {})
