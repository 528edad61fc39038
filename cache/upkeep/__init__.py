"""Maintenance of a filled cache: verify, repack, and adopt files of other programs."""
