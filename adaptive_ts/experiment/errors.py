"""What a user is told: errors that are the user's to solve, and the wording they share."""

import contextlib
import difflib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

Log: TypeAlias = Callable[[str], None]  # takes a line for whoever started the program

_PEER = re.compile(r"[Gg]loo|[Hh]eartbeat|[Cc]oordination|[Bb]arrier|closed by peer")
_STATUS = re.compile(r"UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED")


class UserError(Exception):
    """A user's mistake, or an outside cause such as a full disk or missing data.

    A command prints the message, which is one line, and exits with ``exit_code``.

    Args:
        message: what is wrong, with the value received, and what to do about it.
        exit_code: 2 for a wrong argument or missing input, 1 for a failure while running.
    """

    def __init__(self, message: str, *, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process of the run, or the network to it, is gone.

    JAX says so by two types and orbax by a third; TensorStore, of files, by one of the same.
    """
    if type(error).__name__ == "JaxRuntimeError":  # by name: nothing here imports JAX
        return bool(_PEER.search(str(error)) or _STATUS.search(str(error)))
    return isinstance(error, ValueError | TimeoutError) and bool(_PEER.search(str(error)))


def nearest(name: str, known: Iterable[str], *, many: str | None = None) -> str:
    """Says which names there are, the most similar one first.

    Args:
        name: the name that was not found.
        known: the names that exist.
        many: what to say in place of more than a dozen of them.

    Returns:
        ``"did you mean 'digits'? known: cifar10, digits, fashion_mnist"``; without the question
        when no known name is similar.
    """
    names = sorted(known)
    folded = {n.lower(): n for n in names}
    close = difflib.get_close_matches(str(name).lower(), folded, n=1)
    question = f"did you mean {folded[close[0]]!r}? " if close else ""
    if many is not None and len(names) > 12:
        return f"{question}{many}"
    return f"{question}known: {', '.join(names) or 'none'}"


def one_line(error: BaseException, limit: int = 120) -> str:
    """The first line of an exception's text, cut at ``limit`` characters.

    TensorStore puts pages of specification into its messages; the cause is at the beginning.

    Args:
        error: any exception.
        limit: the longest text returned.

    Returns:
        The class name and the beginning of the message.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what the data and checkpoint packages log, warn about and print.

    What matters of it reaches the user as one line of ours, through an exception.

    Returns:
        A context manager. It swaps ``sys.stdout`` and ``sys.stderr``: not for use in threads.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
