"""``python -m barlow_fused.train``, the same as ``python -m barlow_fused train``."""

import sys

from .trainer import main

sys.exit(main())
