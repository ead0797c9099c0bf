"""`python -m univigu`: see `univigu/cli.py`."""

import sys

from univigu.cli import main

sys.exit(main())
