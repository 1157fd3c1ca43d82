"""Videos without a cache: the tower runs on each clip when it is asked for, to train or to predict."""
