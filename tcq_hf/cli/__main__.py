"""`python -m tcq_hf.cli`."""

from . import main

raise SystemExit(main())
