"""Buckets: the only place that knows of URLs (`gs://...`, `s3://...`) against local paths.

A run whose workdir is a URL works in a local directory, its staging directory, as it would in any workdir. What it
writes there goes to the bucket, and what it reads comes from there: all bytes pass through one client (gcsfs, s3fs)
with one way to try again. orbax is not pointed at the bucket: its atomic commit knows `gs://` alone, and its endless
tries are silent.
"""

from attnlab.storage.bucket import Url, is_url
from attnlab.storage.copies import local_copies, local_copy
from attnlab.storage.names import cache_directory, shown
from attnlab.storage.outputs import writing
from attnlab.storage.workdir import Contents, RemoteWorkdir, below, joined, mirrored, opened

__all__ = [
    "Contents",
    "RemoteWorkdir",
    "Url",
    "below",
    "cache_directory",
    "is_url",
    "joined",
    "local_copies",
    "local_copy",
    "mirrored",
    "opened",
    "shown",
    "writing",
]
