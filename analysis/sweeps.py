"""`python -m analysis.sweeps [scale=small ...]`: all sweeps, their jobs, how they stand and the time still needed."""

import signal
import sys

from sweeps.overview import overview  # composing is the launcher's work; here is only the command's name


def main() -> None:
    """Print the table, or leave with status 2 and one line on stderr."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    try:
        print(overview(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"analysis.sweeps: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    main()
