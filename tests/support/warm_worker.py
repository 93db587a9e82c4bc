"""What worker processes of trainings import, and what torch imports as it traces for the first time: imported once, by
the process that they are forked from."""

from __future__ import annotations

import gc

import torch
from outsize.models.segmentation.training.step import StepEngine as StepEngine
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.training.cluster import TrainingCluster as TrainingCluster

torch.set_num_threads(1)
analyze_network(torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3, padding=1), torch.nn.MaxPool2d(2)).eval(), 2)
gc.collect()
gc.freeze()
