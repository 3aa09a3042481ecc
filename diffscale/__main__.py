"""`python -m diffscale COMMAND ...`, the same as `diffscale COMMAND ...`."""

from diffscale.core.app import main

if __name__ == "__main__":
    main()
