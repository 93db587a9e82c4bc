"""Exact tiled inference and training of CNNs on giant rasters.

Public names are loaded on first use, so that importing the package does not import torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cluster": ["ClusterOptions"],
        "errors": ["TilerError"],
        "geometry": ["Window"],
        "network": ["Network", "analyze_network"],
        "plan": ["TilePlan", "plan_tiles"],
        "predict": ["RunSummary", "lazy_predict", "predict", "predict_window"],
        "raster": ["Raster", "open_raster"],
        "store": ["OutputDescription"],
    },
)
