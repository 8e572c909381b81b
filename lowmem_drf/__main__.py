"""The console script; ``python -m lowmem_drf`` is the same without its folder on PATH."""

import os
import signal
import sys


def main() -> None:
    """Runs a command. Ctrl-C while it is imported, and while the interpreter ends, ends it with one line and 130."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    from lowmem_drf.shortage import expand_segments

    expand_segments()
    from lowmem_drf.cli import main as run

    try:
        run()
    except SystemExit as end:
        if sys.argv[1:2] == ["plan"] and end.code in (0, None):
            _leave()
        raise


def _leave() -> None:
    """Ends the process without the interpreter's own end, which walks and frees what the model libraries made. A
    plan leaves nothing to put right."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the usual end says so
        return
    os._exit(0)


def _stop(number: int, frame: object) -> None:
    """KeyboardInterrupt is of no use here: no one has begun to catch it, and nothing is there yet to be put right."""
    try:
        os.write(2, b"Interrupted.\n")
    finally:
        os._exit(130)


if __name__ == "__main__":
    main()
