"""Pictures of faces: folders, lists, RecordIO, their order, augmentation and batches; draws on `base` alone."""
