"""`python -m mbm_cli` is the command `mbm`."""

from mbm_cli.cli import main

if __name__ == "__main__":
    main()
