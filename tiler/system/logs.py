"""The package's log."""

from __future__ import annotations

import logging

log = logging.getLogger("outsize.run")
"""What a run tells whoever looks into it later; its journal gets it, not the terminal."""
log.setLevel(logging.INFO)
log.propagate = False
