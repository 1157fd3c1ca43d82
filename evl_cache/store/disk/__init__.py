"""Files on a disk: published whole, locked between jobs, with the permissions of a shared folder."""
