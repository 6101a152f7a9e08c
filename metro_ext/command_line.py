"""What every command line does with the mistakes that its user can mend."""

import argparse
import errno
import os
import sys
from collections.abc import Callable

from metro_ext.errors import UserError

USER_ERROR = 2  # argparse exits with 2 for an unknown option: one code for all of a user's mistakes
INTERRUPTED = 130  # the shell's convention: 128 + SIGINT

_REMEDY = {
    errno.ENOSPC: "the disk is full: free some space and run the command again",
    errno.EFBIG: "the file is larger than a limit allows (ulimit -f): raise it and run again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the command again",
    errno.EMFILE: "too many files are open at once (ulimit -n): raise the limit and run again",
    errno.EACCES: "permission denied: check the rights of the file and of its folder",
    errno.EPERM: "not permitted: check the rights of the file and of its folder",
    errno.EROFS: "the file system is read-only: name a folder that can be written",
    errno.ENOENT: "there is no such file or folder: check the path",
    errno.ENOTDIR: "a part of the path is not a folder: check the path",
    errno.EISDIR: "this is a folder, a file was expected: check the path",
    errno.EEXIST: "it exists already: remove it or name another",
}


def run(main: Callable[[], int | None]) -> None:
    """Run a command line's `main` and end the process with its exit code.

    `UserError` and the operating system's refusals (`OSError`) become one line `error: ...` on
    stderr and exit code 2; any other exception is a defect and keeps its traceback.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        code = _fail(str(error))
    except BrokenPipeError:
        # The reader (`head`, say) has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        code = _fail(describe_os_error(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def at_least(minimum: int) -> Callable[[str], int]:
    """For the `type` of an argparse option: a whole number of at least so much."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, found {value}")
        return value

    return whole_number


def describe_os_error(error: OSError) -> str:
    """One sentence: the file, what the operating system refused, the remedy."""
    reason = _REMEDY.get(error.errno or 0, error.strerror or str(error))
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR
