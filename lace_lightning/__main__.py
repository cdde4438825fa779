"""``python -m lace_lightning`` is the ``lace`` command."""

import sys

from lace_lightning.cli.main import main

sys.exit(main())
