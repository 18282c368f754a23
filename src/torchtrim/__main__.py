"""`python -m torchtrim` is `torchtrim`."""

from torchtrim.cli import main

main()
