"""`python -m megakd`: what launchers start."""

from megakd.cli import main

if __name__ == "__main__":
    main()
