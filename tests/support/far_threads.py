"""Several threads that open and read one far raster through a store that fails often; prints how often they could.

python far_threads.py URL
"""

from __future__ import annotations

import sys
import threading

from outsize.tiler.base.errors import RasterError
from outsize.tiler.base.geometry import Window
from outsize.tiler.rasters.opening import open_raster

THREADS, TIMES = 3, 2


def main() -> None:
    """Open, read, close; again and again."""
    url, done = sys.argv[1], []

    def read() -> None:
        for _ in range(TIMES):
            try:
                raster = open_raster(url)
                reader = raster.open_reader()
                reader.read(Window.whole(raster.shape_yx))
                reader.close()
            except RasterError:
                continue  # so often may requests fail
            done.append(1)

    threads = [threading.Thread(target=read) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(len(done))


if __name__ == "__main__":
    main()
