"""`python -m axo_flash` is `axo-flash`."""

import sys

from axo_flash.cli import main

sys.exit(main())
