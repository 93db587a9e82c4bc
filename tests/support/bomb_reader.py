"""Reads stores that it is given by name, in a process of little memory: `python -m outsize.tests.support.bomb_reader
FOLDER...` prints how each ended, and by how many bytes this process grew at most."""

from __future__ import annotations

import json
import resource
import sys

from outsize.tiler.base.errors import RasterError
from outsize.tiler.base.geometry import Window
from outsize.tiler.rasters.opening import open_raster

ROOM = 1 << 30


def main() -> None:
    with open("/proc/self/statm") as file:  # noqa: PTH123 - no path of a user's
        pages = int(file.read().split()[0])
    now = pages * resource.getpagesize()
    # What takes more than this ends with MemoryError, and not with the machine.
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, now + ROOM))
    found: dict[str, str] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in sys.argv[1:]:
        try:
            raster = open_raster(name)
            reader = raster.open_reader()
            window = Window(y=0, x=0, height=3, width=3)
            image = reader.read(window)
            reader.read_missing(window, image)
            found[name] = "read"
        except RasterError as error:
            found[name] = str(error)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"found": found, "grown": grown}))


if __name__ == "__main__":
    main()
