"""How soon what is told to end has ended."""

import os

IS_ALONE = "PYTEST_XDIST_WORKER" not in os.environ
# Two seconds are the promise. Where other files of tests run on the same processors, a command may get a fraction of one:
# the tests marked `timed` hold it to the promise in `make soak`, where nothing else runs.
SOON_S = 2.0 if IS_ALONE else 10.0
