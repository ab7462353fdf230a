"""The client of buckets, leases and outputs, against servers that speak the stores' protocols."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from attnlab import storage
from attnlab.errors import TrainingFailed, UserError
from attnlab.storage import bucket as bucket_lib
from attnlab.storage import lease as lease_lib
from attnlab.storage import workdir as workdir_lib
from attnlab.storage.bucket import Bucket, Url
from attnlab.storage.checkpoints import RemoteCheckpoints
from tests.storage.servers import Answer, only


@pytest.fixture
def bucket(place):
    return Bucket(Url(place))


def denied(method, path):
    body = {"error": {"code": 403, "message": "does not have access"}}
    return Answer(403, {"Content-Type": "application/json"}, json.dumps(body).encode())


def busy(method, path):
    return Answer(503, {"Content-Type": "application/xml"}, b"")


def test_objects(bucket, place, tmp_path):
    """What is written is read, listed below its directory alone, copied, removed; a conditional put happens once."""
    (tmp_path / "big").write_bytes(os.urandom(300_000))
    bucket.put("a/one", b"1")
    bucket.upload({"a/two": tmp_path / "big", "b": tmp_path / "big"})
    Bucket(Url(f"{place}2")).put("a/one", b"another directory, whose name begins alike")
    assert {name: o.size for name, o in bucket.listing().items()} == {"a/one": 1, "a/two": 300_000, "b": 300_000}
    assert list(bucket.listing("a")) == ["a/one", "a/two"] and bucket.listing("c") == {}
    assert list(bucket.glob("*/t*")) == ["a/two"] and (bucket.size("b"), bucket.size("a")) == (300_000, None)
    assert bucket.get("a/one") == b"1"
    bucket.download({"a/two": tmp_path / "back"}, bucket.listing())
    assert (tmp_path / "back").read_bytes() == (tmp_path / "big").read_bytes()
    before = bucket.listing()["b"].version
    assert not bucket.create("b", b"x") and bucket.listing()["b"].version == before
    assert bucket.create("new", b"x") and bucket.get("new") == b"x"
    bucket.copy({"a/two": "c/two"})
    bucket.remove(["a/one", "a/two", "never there"])
    assert list(bucket.listing()) == ["b", "c/two", "new"]
    with pytest.raises(FileNotFoundError):
        bucket.get("a/one")


def test_what_passes_is_tried_again(bucket, store, tmp_path, caplog):
    """503 for a while, and bodies that are cut: told, and nothing is lost; what does not pass ends after patience."""
    (tmp_path / "f").write_bytes(content := os.urandom(100_000))
    seen = []

    def at_first(fault, times):
        def change(method, path):
            seen.append(path)
            return fault(method, path) if len(seen) <= times else None

        return change

    def cut(method, path):
        return lambda answer: Answer(answer.status, answer.headers, answer.body, cut=len(answer.body) > 50_000)

    with store.failing(at_first(busy, 2)):
        bucket.upload({"f": tmp_path / "f"})
    assert len(seen) > 2
    assert [r for r in caplog.records if "/f failed: 503" in r.getMessage() and "trying again in" in r.getMessage()]
    seen.clear()
    objects = bucket.listing()
    with store.failing(at_first(cut, 2)):
        bucket.download({"f": tmp_path / "back"}, objects)
    assert (tmp_path / "back").read_bytes() == content and bucket.get("f") == content
    with store.failing(busy), pytest.raises(UserError, match=r"writing .*/g failed for 0 s: 503"):
        bucket.patient(0).put("g", b"x")
    assert bucket.size("g") is None


@only("gs")
def test_the_outer_tries_tell(bucket, patch, caplog):
    """What the library gives up is tried again by us, with a message; a call without an answer has a limit."""
    calls = []

    async def flaky():
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("reset")
        return 7

    async def silent():
        await __import__("asyncio").sleep(60)

    patch.setattr(bucket_lib.time, "sleep", lambda _: None)
    assert bucket._call("reading x", flaky) == 7
    assert [r.getMessage().partition(";")[0] for r in caplog.records] == ["reading x failed: reset"] * 2
    patch.setattr(bucket_lib, "_NO_ANSWER", 0.05)
    patch.setattr(bucket_lib, "_CALL", 0.1)
    with pytest.raises(UserError, match="reading x failed for 0 s: no answer for 0 s"):
        bucket.patient(0)._call("reading x", silent)
    assert "reading x: no answer for 0 s, still waiting" in caplog.text


@only("s3")
def test_slow_answers(bucket, store, patch, caplog):
    """A slow answer is waited for, and told of."""
    patch.setattr(bucket_lib, "_NO_ANSWER", 0.1)
    bucket.put("f", b"x")
    with store.failing(lambda method, path: time.sleep(0.3)):
        assert bucket.get("f") == b"x"
    assert "/f: no answer for 0 s, still waiting" in caplog.text


def test_what_does_not_pass(bucket, store, place, patch):
    """No right, no bucket, another region, no package: one clear error at once, that says what it is of."""
    began = time.monotonic()
    with store.failing(denied), pytest.raises(UserError, match=f"writing {place}/f failed: .*"):
        bucket.put("f", b"x")
    with pytest.raises(UserError, match="there is no bucket nobody-has-this"):
        lease_lib.claim(Bucket(Url(f"{store.scheme}://nobody-has-this/a")), pytest.fail)
    if store.scheme == "s3":

        def region(method, path):
            text = "<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region 'us-east-1' is wrong; expecting"
            return Answer(400, {"Content-Type": "application/xml"}, f"{text} 'eu-west-1'</Message></Error>".encode())

        with store.failing(region), pytest.raises(UserError, match="is AWS_REGION the bucket's region?"):
            bucket.put("f", b"x")
    assert time.monotonic() - began < 15
    patch.setattr(bucket_lib, "_filesystems", {})
    patch.setitem(__import__("sys").modules, {"gs": "gcsfs", "s3": "s3fs"}[store.scheme], None)
    extra = {"gs": "gcs", "s3": "s3"}[store.scheme]
    with pytest.raises(UserError, match=rf"pip install 'attnlab\[{extra}\]'"):
        Bucket(Url(place))


@pytest.mark.parametrize("text", ["gs:/a/b", "http://a/b", "gs://", "s3:///a", "gs://A b/c"])
def test_what_is_no_url(text):
    if storage.is_url(text):
        with pytest.raises(UserError, match="allowed: gs://BUCKET/PATH, s3://BUCKET/PATH"):
            Url(text)
    else:
        assert text == "gs:/a/b"


def test_one_run_has_a_workdir(bucket, caplog):
    """Of runs that come at once one gets the lease; another is refused with who has it and until when; then free."""
    outcomes = []

    def come():
        try:
            outcomes.append(lease_lib.claim(bucket, lambda text: None))
        except UserError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=come) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lease,) = [o for o in outcomes if isinstance(o, lease_lib.Lease)]
    for error in (o for o in outcomes if o is not lease):
        assert f"in use by another run (process {os.getpid()} on " in str(error) and "holds until" in str(error)
    lease.require()
    bucket.put("config.json", b"{}")
    lease.release()
    after = lease_lib.claim(bucket, pytest.fail)
    assert after.term == lease.term + 1
    after.release()


def foreign(bucket, **more):
    """A lease of a run on another machine, which is not renewed."""
    content = {"host": "elsewhere", "process": 1, "machine": "another", "token": "t", "seconds": 1.0}
    bucket.put("lease/000000004.json", json.dumps({**content, "until": time.time() + 1, **more}).encode())


@only("s3")
def test_a_dead_runs_lease(bucket):
    """It is taken over after its time, not before; at once where its process is known to be gone, or long ago."""
    said = []
    foreign(bucket)
    began = time.monotonic()
    lease = lease_lib.claim(bucket, said.append)
    assert 1 <= time.monotonic() - began < 10 and lease.term == 5
    assert "elsewhere" in said[0] and "waiting" in said[0] and "takes over" in said[1]
    assert list(bucket.listing("lease")) == ["lease/000000005.json"]
    bucket.put("config.json", b"{}")
    lease.release()
    for gone in ({"until": time.time() - 1000, "seconds": 1000.0},
                 {"machine": lease_lib._machine(), "process": 2**22 + 1, "began": "1", "seconds": 1000.0}):  # fmt: skip
        bucket.remove(bucket.listing("lease"))
        foreign(bucket, **gone)
        began = time.monotonic()
        lease_lib.claim(bucket, said.append).release()
        assert time.monotonic() - began < 5


@only("gs")
def test_a_lease_that_another_took(bucket):
    """Its run may not write any more, and says who may."""
    lease = lease_lib.claim(bucket, pytest.fail)
    foreign(bucket, until=time.time() + 1000)
    lease._valid_until = 0.0  # it had not renewed it
    with pytest.raises(TrainingFailed, match="taken over by process 1 on elsewhere"):
        lease.require()
    with pytest.raises(TrainingFailed, match="taken over"):
        lease.check()
    lease.release()
    assert json.loads(bucket.get("lease/000000004.json"))["token"] == "t"


def staged(bucket, path):
    path.mkdir()
    here = workdir_lib.RemoteWorkdir(bucket, path, None, 1)
    here.pull()
    return here


@only("gs")
def test_logs_grow_by_parts(bucket, tmp_path, patch):
    """Readers have all that was brought, whenever its writer dies; the writer's end makes one object of it."""
    patch.setattr(workdir_lib, "_MOST_PARTS", 4)
    here, log = staged(bucket, tmp_path / "a"), tmp_path / "a" / "metrics.jsonl"
    for i in range(7):
        with log.open("a") as file:
            file.write(f"line {i}\n")
        here.push()
        assert workdir_lib.merged(bucket, "metrics.jsonl") == log.read_bytes()
    assert 0 < len(bucket.listing("metrics.jsonl.parts")) <= 4
    again = staged(bucket, tmp_path / "b")  # the first one died
    log = tmp_path / "b" / "metrics.jsonl"
    assert log.read_bytes() == (tmp_path / "a" / "metrics.jsonl").read_bytes()
    log.with_name("new").write_text("line 0\n")
    os.replace(log.with_name("new"), log)  # steps that come again are dropped
    again.push()
    with log.open("a") as file:
        file.write("another line 1\n")
    again.stop()
    assert bucket.get("metrics.jsonl") == log.read_bytes() == b"line 0\nanother line 1\n"
    assert not bucket.listing("metrics.jsonl.parts")


@only("s3")
def test_outputs(place, tmp_path):
    """A file or a directory is brought whole, its last file last; nothing where what writes it raises."""
    url, bucket = Url(place), Bucket(Url(place))
    with pytest.raises(KeyError), storage.writing(url / "t.json") as path:
        path.write_text("half")
        raise KeyError
    assert not bucket.listing()
    with storage.writing(url / "t.json") as path:
        assert not path.exists()
        path.write_text("{}")
    with storage.writing(url / "t.json") as path:
        assert path.exists()  # for whoever must not replace it
    assert bucket.get("t.json") == b"{}"
    for names in (("old", "index.json"), ("new", "index.json")):
        with storage.writing(url / "d", last="index.json") as path:
            for file in path.iterdir() if path.exists() else ():
                file.unlink()
            path.mkdir(exist_ok=True)
            for name in names:
                (path / name).write_text(name)
    assert list(bucket.listing("d")) == ["d/index.json", "d/new"]


@only("s3")
def test_a_checkpoint_of_several_hosts(bucket, tmp_path):
    """Each brings what it alone wrote, the first what all wrote; it is complete once all is there, and as one list."""
    checked, written = [], []

    def host(index):
        path = tmp_path / f"host{index}"
        directory = path / "checkpoints" / "8"
        directory.mkdir(parents=True)
        for name in ("all", f"part{index}"):
            (directory / name).write_text(f"{name} of {index}")
        files = {"all": "the same", f"part{index}": str(index)}
        (directory / "digests.json").write_text(json.dumps({"files": files}))

        def write(files):
            written.append(index)
            (directory / "digests.json").write_text(json.dumps({"files": files}))

        def before_commit():
            checked.append(sorted(bucket.listing("checkpoints")))

        made = RemoteCheckpoints(bucket, path, 1, before_commit)
        made.commit(8, directory, index, 3, write)
        made.committed(8)
        assert not directory.exists() and made.steps() == [8]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(host, (2, 1, 0)))
    names = [f"checkpoints/8/{name}" for name in ("all", "part0", "part1", "part2")]
    assert checked == [names] and written == [0]  # all were there before it became a checkpoint
    assert bucket.get(names[0]) == b"all of 0" and bucket.get(names[2]) == b"part1 of 1"
    listed = json.loads(bucket.get("checkpoints/8/digests.json"))["files"]
    assert listed == {"all": "the same"} | {f"part{i}": str(i) for i in range(3)}
    assert not bucket.listing("uploads") and RemoteCheckpoints(bucket, tmp_path, 0, None).steps() == [8]
