"""`python -m emomerge`, which torchrun and accelerate start."""

from emomerge.cli import main

main(prog_name="emomerge")
