"""Define errors that users can fix, and the hints in their messages."""

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
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
