"""`python -m course.builder`: see `build`."""

import sys

from course.builder.build import main

raise SystemExit(main(sys.argv[1:]))
