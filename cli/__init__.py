"""The command line of evl-cache: parse, call, render (installed as `evl_cache_cli`)."""
