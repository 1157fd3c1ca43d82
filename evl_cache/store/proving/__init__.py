"""What `verify` is made of: threads, what marks promise, files against it, the manifest's text."""
