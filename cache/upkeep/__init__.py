"""Maintenance of a filled cache: verify, repack, copy, and adopt files of other programs."""
