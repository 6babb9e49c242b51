"""From files on a mounted path to packed batches: files -> records -> formats -> packing, wired together in dataset."""
