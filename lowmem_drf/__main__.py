"""The console script; ``python -m lowmem_drf`` is the same without its folder on PATH."""

import os
import signal


def main() -> None:
    """Runs a command. Ctrl-C while it is imported, and while the interpreter ends, ends it with one line and 130."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    from lowmem_drf.shortage import expand_segments

    expand_segments()
    from lowmem_drf.cli import main as run

    run()


def _stop(number: int, frame: object) -> None:
    """KeyboardInterrupt is of no use here: no one has begun to catch it, and nothing is there yet to be put right."""
    try:
        os.write(2, b"Interrupted.\n")
    finally:
        os._exit(130)


if __name__ == "__main__":
    main()
