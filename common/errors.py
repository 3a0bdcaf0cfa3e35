"""The one exception for bad input, and how a command-line program reports it.

Every message has four parts: where the fault is, what was found, what was expected, and what to do
next.
"""

import errno
import os
import sys
from collections.abc import Callable

EXIT_BAD_INPUT = 2
EXIT_RESUME = 75
"""A signal ended the run after its checkpoint was written; resume it (EX_TEMPFAIL, sysexits.h)."""
EXIT_INTERRUPTED = 130
_USER_CAN_FIX = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class InputError(Exception):
    """Something that the user gave (a file, a folder, an option) cannot be used."""

    def __init__(self, where: object, found: str, expected: str, next_step: str):
        """Keep the four parts; str() prints them as one block of text.

        where: the file, sample or option at fault. next_step: what the user can do, an imperative.
        """
        self.where, self.found = str(where), found
        self.expected, self.next_step = expected, next_step
        super().__init__(self.where, found, expected, next_step)

    def __str__(self) -> str:
        return (
            f"{self.where}\n  found:    {self.found}\n"
            f"  expected: {self.expected}\n  next:     {self.next_step}"
        )


def run_main(main: Callable[[], int | None], show: Callable[[str], bool] | None = None) -> None:
    """Run a program's main function and exit with its code.

    Prints InputErrors, missing permissions and full disks on stderr and exits with 2. Exits with
    130 after Ctrl-C, silently with 0 if a pipe is closed. show: whether this rank prints a message.
    """
    message = ""
    try:
        code = main() or 0
        sys.stdout.flush()
    except InputError as error:
        code, message = EXIT_BAD_INPUT, str(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if not isinstance(error, _USER_CAN_FIX) and error.errno not in NO_SPACE:
            raise
        where, found = error.filename or "writing", error.strerror or str(error)
        expected = "a path that this user may use, with space left"
        advice = "change its permissions, free some space, or give another path"
        code, message = EXIT_BAD_INPUT, str(InputError(where, found, expected, advice))
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    # Printed after the failed calls have returned, when their progress bars have ended their line.
    if code == EXIT_INTERRUPTED:
        print("\nInterrupted; complete files are kept.", file=sys.stderr)
    if message and (show is None or show(message)):
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
