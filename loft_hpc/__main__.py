"""Entry point of the `loft` command and of `python -m loft_hpc`."""

import sys

from loft_hpc.cli.commands import listen


def main() -> None:
    interruption = listen(sys.argv[1:])
    try:
        from loft_hpc.cli.main import main as command
    except ModuleNotFoundError as problem:
        from loft_hpc.packages import what_is_missing

        print(f"loft: {what_is_missing(problem)}", file=sys.stderr)
        sys.exit(1)
    command(interruption)


if __name__ == "__main__":
    main()
