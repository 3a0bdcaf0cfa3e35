"""The one exception that bad input ends in, and how a command-line program shows it.

Every message has four parts: where the fault is, what was found, what was expected, and what to do
next.
"""

import errno
import os
import sys
from collections.abc import Callable

EXIT_BAD_INPUT = 2
EXIT_RESUME = 75
"""A signal ended the run, its checkpoint is written: start it again (EX_TEMPFAIL of sysexits.h)."""
EXIT_INTERRUPTED = 130
_USERS_TO_MEND = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
                  errno.ENOTDIR, errno.EISDIR, errno.EEXIST}  # fmt: skip


class InputError(Exception):
    """Something that the user gave (a file, a folder, an option) cannot be used."""

    def __init__(self, where: object, found: str, expected: str, next_step: str):
        """Keep the four parts, and print them as one block of text.

        where: the file, sample or option at fault. found, expected: what is there, what should be.
        next_step: what the user can do about it, as an imperative.
        """
        self.where, self.found = str(where), found
        self.expected, self.next_step = expected, next_step
        super().__init__(self.where, found, expected, next_step)

    def __str__(self) -> str:
        return (
            f"{self.where}\n  found:    {self.found}\n"
            f"  expected: {self.expected}\n  next:     {self.next_step}"
        )


def run_main(main: Callable[[], int | None], speaks: Callable[[str], bool] | None = None) -> None:
    """Run a program's main function and leave with its exit code.

    InputError becomes a message on stderr and exit code 2, a missing permission and a full disk
    likewise, Ctrl-C one sentence and 130, a closed pipe (`| head`) silence. speaks: is given a
    message, and says whether this process is the one to show it, where several have the same.
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
        if error.errno not in _USERS_TO_MEND:
            raise
        code = EXIT_BAD_INPUT
        message = (
            f"{error.filename or 'writing'}\n  found:    {error.strerror}\n"
            "  expected: a path that this user may use, with space left\n"
            "  next:     change its permissions, make room, or name another path"
        )
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    # Only now that the failed calls are gone: a progress bar that they held has ended its line.
    if code == EXIT_INTERRUPTED:
        say_interrupted()
    if message and (speaks is None or speaks(message)):
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def say_interrupted() -> None:
    """What Ctrl-C leaves on the screen."""
    print("\nInterrupted; what was whole by then is kept.", file=sys.stderr)
