"""Cache jobs that are killed while they write to a store (a short form of tests/campaigns/store_kills.py)."""

import os

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import s3fs  # noqa: E402
from campaigns.store_kills import run_campaign  # noqa: E402


def test_killed_jobs_leave_nothing_torn_or_unlisted(tmp_path):
    before = dict(os.environ)
    try:
        tally = run_campaign(tmp_path, num_kills=2, seconds=600, seed=3, rate=0.03)
    finally:
        os.environ.clear()
        os.environ.update(before)
        s3fs.S3FileSystem.clear_instance_cache()
    assert tally.problems == []
    assert tally.kills == 2 and tally.starts >= 3 and tally.caches >= 1
