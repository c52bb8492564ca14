"""``python -m fastrnn``."""

from fastrnn.cli import main

main()
