"""`python -m attnlab VERB` is `attnlab VERB`."""

from attnlab.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
