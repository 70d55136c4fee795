"""How every command of `dsa` behaves towards the person who types it.

What went wrong is said in one sentence, `error: ...`, on the error stream; a traceback is for mistakes of ours. The
exit status tells a script which kind it was: 2 for a command line that cannot be understood, 1 for a command that was
understood and could not be done, 130 for one that was stopped by Ctrl-C, as shells have it.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence that says where help is, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line, and leave with status 2."""
        self.exit(2, f"error: {message} ({self.prog} --help explains)\n")


def count(word: str) -> int:
    """The `type=` of an option that is a whole number of at least 1."""
    if not (word.isdecimal() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"{word!r} must be a whole number of at least 1")
    return int(word)


@contextmanager
def errors_in_a_sentence() -> Iterator[None]:
    """Turn errors that a user can cause (files, values, losses that are not finite) into a sentence and status 1."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
