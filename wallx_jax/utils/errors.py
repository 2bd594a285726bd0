"""Define errors that users can fix, how their messages are worded, and how commands report them."""

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence

LONGEST = 300  # characters of another library's message that are quoted in ours


class UserError(Exception):
    """Base class of errors that the user can fix; the message names the cause and the remedy.

    Subclasses also derive from the built-in exception that fits, so that `except ValueError` catches them too.
    """


# Exceptions that commands report in one line: our own, and those by which Python and the libraries report invalid
# input, missing extras and missing resources (JaxRuntimeError is a RuntimeError). All others are bugs and keep their
# traceback.
REPORTED = (UserError, OSError, ValueError, ImportError, RuntimeError, MemoryError)


class ConfigError(UserError, ValueError):
    """One or more invalid settings.

    The message lists every invalid setting with its value and the remedy.

    Attributes:
        errors: one line per setting.
        offer: the available choices (e.g. a dataset's cameras), appended to the message.
    """

    def __init__(self, *errors: str, offer: str = ""):
        self.errors, self.offer = errors, offer
        count = "1 wrong setting" if len(errors) == 1 else f"{len(errors)} wrong settings"
        super().__init__("\n".join((f"{count}:", *(f"  - {error}" for error in errors), *([offer] if offer else []))))


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ' (did you mean "x"?)' for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and all exceptions that it wraps."""
    if error is not None:
        yield error
        for inner in (error.__cause__, error.__context__, *getattr(error, "exceptions", ())):
            yield from causes(inner)


def one_line(error: BaseException) -> str:
    """Return an exception's message as one line of at most LONGEST characters; its type's name if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def root_cause(error: BaseException) -> str:
    """Return the innermost exception's message as one line: libraries wrap it in pages of text."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return one_line(error)


def user_message(error: BaseException, memory_remedy: str = "") -> str:
    """Return the message that a command prints for an exception; our own messages may span several lines.

    Args:
        error: one of REPORTED.
        memory_remedy: what the user can do if memory is exhausted; JAX's pages on its allocations are left out.
    """
    text = str(error).strip()
    if isinstance(error, MemoryError) or text.startswith("RESOURCE_EXHAUSTED"):
        first = text.splitlines()[0] if text else "no memory left"
        return f"{first}; {memory_remedy}" if memory_remedy else first
    if not text:
        return type(error).__name__
    return " ".join(text.split()) if type(error).__name__ == "JaxRuntimeError" else text


def run_main(main: Callable[[], None]) -> None:
    """Run a command's main; on an exception of REPORTED, print "error: MESSAGE" and exit with code 1."""
    try:
        main()
    except REPORTED as error:
        sys.exit(f"error: {user_message(error)}")
