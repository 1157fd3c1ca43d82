"""What a cache holds and where: arrays, marks, the manifest, the description and its second copy."""
