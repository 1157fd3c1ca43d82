"""`python -m evl_cache_cli`, which `torchrun -m` needs."""

from .main import main

main()
