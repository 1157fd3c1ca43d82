"""Files of a cache by name, from a directory, a server or a bucket."""
