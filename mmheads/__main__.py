"""`python -m mmheads` is the command `mmheads`."""

from mmheads.cli import main

raise SystemExit(main())
