"""`python -m fedmeta` is the command line."""

from fedmeta.cli.main import main

if __name__ == "__main__":
    main()
