"""`python -m towtank.cli`."""

from towtank.cli.main import main

if __name__ == "__main__":
    main()
