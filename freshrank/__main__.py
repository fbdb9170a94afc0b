"""`python -m freshrank`."""

from freshrank.cli.main import main

main()
