"""`python -m shiva_dit.cli`."""

from shiva_dit.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
