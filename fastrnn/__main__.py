"""``python -m fastrnn``, and the ``fastrnn`` command."""

import sys


def main() -> None:
    """Entry point of the ``fastrnn`` command: quiet if Ctrl-C comes while it is still starting."""
    try:
        from fastrnn import cli
    except KeyboardInterrupt:
        print("fastrnn: interrupted", file=sys.stderr)
        sys.exit(1)
    cli.main()


if __name__ == "__main__":
    main()
