"""Several processes of one run: how they find each other, and how one leaves when it has to."""

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator

import jax

from adaptive_ts.experiment.config.groups import HostsConfig
from adaptive_ts.experiment.devices.stopping import Stopped
from adaptive_ts.experiment.errors import UserError, lost_peer, one_line


@contextlib.contextmanager
def joined(hosts: HostsConfig, exit_lost: int) -> Iterator[None]:
    """Joins the other processes, if the config names any, and stays with them to the end.

    Alone, an error is the caller's. Among others it ends this process at once, after a line that
    says which one it was and why: Python's own way out would wait for the others, and they for us.

    Args:
      hosts: who takes part.
      exit_lost: the exit code if it was not us: "start all of them again".

    Raises:
      UserError: the others cannot be joined.
    """
    _join(hosts)
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        code = _last_words(error, exit_lost)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _join(hosts: HostsConfig) -> None:
    times = {
        "heartbeat_timeout_seconds": hosts.timeout,
        "shutdown_timeout_seconds": hosts.timeout,
    }
    # Two programs under way at once may each hold a thread that the other's collective waits for.
    jax.config.update("jax_cpu_enable_async_dispatch", not (hosts.auto or hosts.coordinator))
    try:
        if hosts.auto:
            jax.distributed.initialize(**times)
        elif hosts.coordinator is not None:
            who = hosts.coordinator, hosts.num_processes, hosts.process_id
            jax.distributed.initialize(*who, **times)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--hosts: cannot join the other processes: {one_line(error)}") from error


def _last_words(error: BaseException, exit_lost: int) -> int:
    """Tells why this process stops; returns its exit code."""
    if isinstance(error, SystemExit) and isinstance(error.code, int | None):
        return error.code or 0
    me = f"process {jax.process_index()} of {jax.process_count()}, on {socket.gethostname()}"
    code, why = 1, one_line(error)
    if isinstance(error, UserError):
        code, why = error.exit_code, " ".join(str(error).split())
    elif isinstance(error, Stopped):
        code = exit_lost
        why = f"stopped by {error}; the same commands on all hosts go on from the last checkpoint"
    elif lost_peer(error):
        code = exit_lost
        why = (
            f"lost another process ({one_line(error, 300)}); what that one said last says why. The "
            "same commands on all hosts go on from the last checkpoint"
        )
    elif not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    print(f"{os.path.basename(sys.argv[0])}: {me}: {why}", file=sys.stderr)
    return code
