"""What lies on disk: tensors, the packed 2:4 format, the checkpoint folder, the folder of a run."""
