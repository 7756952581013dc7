"""`python -m mupace`."""

from mupace.cli import main

main()
