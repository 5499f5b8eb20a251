"""The store in a bucket: conditional puts and no renames, snapshots whole, copies read once, two writers at once."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import obstore
import polars as pl
import pytest
from bucket_server import serve
from night import TOWER, night, right, scan, vector

from pipeline import embeddings
from pipeline.bucket import Bucket
from pipeline.cache import announced, open_snapshot, snapshot_items
from pipeline.cleanup import RetentionConfig, clean
from pipeline.files import LocalFolder
from pipeline.store import BucketStore, Store, open_store
from schemas.errors import ConfigError, NotFoundError, StoreError
from schemas.records import Snapshot

NOW = RetentionConfig(days=0, newest=1, job_hours=0)
TEXTS = [f"text {n}" for n in range(50)]


@pytest.fixture(scope="module")
def server():
    with serve() as served:
        yield served


@pytest.fixture
def url(server, tmp_path, monkeypatch) -> str:
    """A fresh prefix in a bucket, and the environment that leads to it."""
    import boto3

    environment = {
        "AWS_ENDPOINT_URL": server[0], "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "XDG_CACHE_HOME": str(tmp_path / "copies"),
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="shop-bucket")
    return f"s3://shop-bucket/{uuid.uuid4().hex}/store"


@pytest.fixture
def store(url) -> BucketStore:
    found = open_store(url)
    assert isinstance(found, BucketStore)
    return found


def test_files_of_a_bucket_and_of_a_folder_behave_alike(url, tmp_path):
    for folder in (Bucket(url), LocalFolder(tmp_path / "folder")):
        folder.create("a/one", b"1")
        folder.create("a/b/two", memoryview(b"22"))
        folder.create("c", b"333")
        assert [each[:2] for each in folder.below("a/")] == [("a/b/two", 2), ("a/one", 1)]
        assert [each.name for each in folder.below("")] == ["a/b/two", "a/one", "c"]
        assert folder.below("none/") == []
        assert (folder.read("a/b/two"), folder.size("c")) == (b"22", 3)
        with pytest.raises((StoreError, FileExistsError)):
            folder.create("c", b"other")
        assert folder.read("c") == b"333"
        folder.delete(["c", "not there"])
        with pytest.raises((StoreError, FileNotFoundError)):
            folder.read("c")
    Bucket(url).create("a/one", b"1")  # a put that is repeated since its answer was lost


def test_a_night_in_a_bucket_comes_back_right_and_the_same_content_is_the_same_snapshot(store, url):
    first = night(store, "one", TEXTS[:40])
    assert night(store, "again", TEXTS[:40]) == first
    second = night(store, "two", TEXTS)
    assert (second.parent, second.embedded, second.reused) == (first.id, 10, 40)
    assert right(open_snapshot(store, second))
    shutil.rmtree(store.root)  # copies and arrays are caches
    for _ in range(2):
        other = open_store(url)
        assert other.all(Snapshot) == [first, second]
        assert right(open_snapshot(other, first))
        assert right(open_snapshot(other, other.require(Snapshot)))


def test_every_write_has_its_condition_and_nothing_is_renamed(store, server):
    requests = server[1]
    requests.clear()
    night(store, "one", TEXTS)
    clean(store, NOW)
    writes = [each for each in requests if each["method"] == "PUT"]
    unconditional = [each["path"] for each in writes if each["condition"] != "*"]
    assert len(writes) > 8
    assert all("_last_checkpoint" in path or "checkpoint.parquet" in path for path in unconditional)
    assert not any(each["copy_source"] for each in requests)
    names = [each["path"].rpartition("/")[2] for each in writes if "/snapshots/" in each["path"]]
    assert names[-1] == "record.json"


def test_a_commit_on_an_old_version_is_refused(store):
    night(store, "one", TEXTS[:20])
    table = store.embeddings
    version, old = table.version(), table.files(TOWER)
    assert table.seal(version)
    assert not table.seal(version)
    assert not table.replace(TOWER, old, [], version)
    assert table.files(TOWER) != []


def test_a_commit_whose_answer_was_lost_is_done(store, server):
    table, faults = store.embeddings, server[2]
    faults.append(("lost", "_delta_log/"))
    record = night(store, "one", TEXTS)
    assert faults == []
    assert len(table.files(TOWER)) == 3
    faults.append(("lost", f"_delta_log/{table.version() + 1:020d}"))
    assert clean(store, RetentionConfig(days=100, job_hours=0)).files == 3  # not taken for a commit of others
    assert faults == []
    assert len(table.files(TOWER)) == 1
    shutil.rmtree(store.root)
    assert right(open_snapshot(store, record))


def test_what_was_not_finished_does_not_exist_and_is_swept(store, monkeypatch):
    with monkeypatch.context() as patch:
        create = Bucket.create

        def broken(self, name, data):
            if name.endswith("record.json"):
                raise KeyboardInterrupt
            create(self, name, data)

        patch.setattr(Bucket, "create", broken)
        with pytest.raises(KeyboardInterrupt):
            night(store, "one", TEXTS)
    assert store.all(Snapshot) == []
    assert any("snapshots/" in each.name for each in store.bucket.below(""))
    assert list(store.parent(Snapshot).iterdir()) == []
    clean(store, RetentionConfig(days=0, newest=1, job_hours=1))
    assert len(store.embeddings.files(TOWER)) > 0  # young: a job may be about to publish it
    done = night(store, "two", TEXTS)
    assert done.embedded == 0
    clean(store, NOW)
    assert [each.name for each in store.bucket.below("snapshots/")] == [
        f"snapshots/{done.id}/{name}" for name in ("items.parquet", "quarantine.parquet", "record.json")
    ]
    assert right(open_snapshot(store, done))


def test_a_clean_up_drops_what_is_past_retention_and_keeps_the_rest_readable(store):
    first = night(store, "one", TEXTS)
    pinned = open_snapshot(store, first)
    second = night(store, "two", [*TEXTS[:10], "new"])
    done = clean(store, NOW)
    assert (done.snapshots, done.rows) == ([first.id], 40)
    assert right(pinned)
    with pytest.raises(NotFoundError, match="no snapshots called"):
        store.get(Snapshot, first.id)
    shutil.rmtree(store.root)
    assert right(open_snapshot(store, second))
    listed = {each.name.removeprefix("item_embeddings/") for each in store.bucket.below("item_embeddings/")}
    assert {name for name in listed if name.endswith(".parquet") and "_delta_log" not in name} == {
        str(file.path) for file in store.embeddings.files(TOWER)
    }


def test_keys_that_a_running_night_announced_are_kept(store, monkeypatch):
    """A clean-up at the moment at which a snapshot of old vectors is about to be published."""
    with monkeypatch.context() as patch:
        patch.setattr(embeddings.time, "time_ns", lambda: int(time.time() - 3 * 86_400) * 1_000_000_000)
        night(store, "one", TEXTS)
        night(store, "two", TEXTS[:5])
    cleaned = []
    new = BucketStore.new

    def clean_first(self, kind, name):
        done = clean(store, RetentionConfig(days=0, newest=1, job_hours=1))
        cleaned.append((done.snapshots, done.rows))
        return new(self, kind, name)

    monkeypatch.setattr(BucketStore, "new", clean_first)
    third = night(store, "three", TEXTS[:20])
    assert len(cleaned[0][0]) == 1
    assert cleaned[0][1] == 30
    assert third.embedded == 0
    shutil.rmtree(store.root)
    assert right(open_snapshot(store, third))


def test_damage_and_loss_are_named_with_the_way_out(store):
    record = night(store, "one", TEXTS)
    (local,) = store.parent(Snapshot).glob("*/items.parquet")
    local.write_bytes(b"PAR1 is not enough")
    with pytest.raises(StoreError, match=r"items\.parquet is damaged.*a copy that is fetched again"):
        open_snapshot(store, record)
    shutil.rmtree(local.parent)
    assert right(open_snapshot(store, record))
    file = store.embeddings.files(TOWER)[0]
    content = store.bucket.read(f"item_embeddings/{file.path}")
    store.bucket.delete([f"item_embeddings/{file.path}"])
    shutil.rmtree(store.root)
    with pytest.raises(StoreError, match=rf"s3://.*{file.path.name} is missing; restore it"):
        open_snapshot(store, record)
    flipped = bytearray(content)
    flipped[content.index(vector("text 0").tobytes())] ^= 1
    store.bucket.create(f"item_embeddings/{file.path}", bytes(flipped))
    with pytest.raises(StoreError, match=rf"{file.path.name} is damaged"):
        open_snapshot(store, record)


def test_a_refused_put_is_one_line(store, server):
    night(store, "one", TEXTS[:1])
    server[2].append(("denied", "_delta_log/"))
    with pytest.raises(
        StoreError, match=r"s3://.*/item_embeddings cannot be written: .*privileges.*run the command again"
    ):
        night(store, "two", TEXTS[:2])


def test_what_is_gone_already_keeps_nothing_else_from_being_deleted(url, monkeypatch):
    bucket, delete = Bucket(url), obstore.delete
    bucket.create("here", b"1")

    def as_gs(store, names):  # which answers 404, where S3 says nothing
        if "gone" in names:
            raise FileNotFoundError("404")
        delete(store, names)

    monkeypatch.setattr(obstore, "delete", as_gs)
    bucket.delete(["gone", "here"])
    assert bucket.below("") == []


def test_a_bucket_that_ignores_conditions_is_refused(store, monkeypatch):
    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda store, name, data, **_: put(store, name, data))
    with pytest.raises(ConfigError, match=r"store = 's3://.* ignores If-None-Match"):
        night(store, "one", TEXTS[:1])
    assert store.embeddings.version() == -1
    assert {each.name.partition("/")[0] for each in store.bucket.below("")} == {"item_embeddings"}  # one data file


def test_a_bucket_that_is_not_there_is_one_line(url):
    with pytest.raises(StoreError, match=r"s3://other-bucket/x/snapshots/: .*NoSuchBucket|404"):
        open_store("s3://other-bucket/x").all(Snapshot)
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_store("nowhere://x").bucket.read("y")


@pytest.mark.slow
def test_two_nights_and_a_clean_up_at_once_in_a_bucket(store, url):
    rng = np.random.default_rng(0)
    script = Path(__file__).with_name("night.py")
    retention = RetentionConfig(days=0, newest=3, job_hours=1)
    for number in range(3):
        chosen = [sorted(rng.choice(TEXTS, 30, replace=False).tolist()) for _ in range(2)]
        if number == 0:
            chosen[1] = chosen[0]
        runs = [
            subprocess.Popen([sys.executable, str(script), url, f"{number}-{side}", *texts],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for side, texts in enumerate(chosen)
        ]  # fmt: skip
        while any(run.poll() is None for run in runs):
            clean(store, retention)
        for run in runs:
            output, errors = run.communicate()
            assert run.returncode == 0, errors
            shutil.rmtree(store.matrices, ignore_errors=True)
            assert right(open_snapshot(store, store.get(Snapshot, output.strip().splitlines()[-1])))


@pytest.mark.slow
def test_every_command_runs_on_a_bucket(workspace, embed_here, url, tmp_path):
    sets = ("--set", f"store={url}", "--set", "train.epochs=2", "--set", "tune.warmup_epochs=0")
    for command in ("prepare-data", "tune-items"):
        workspace.run(command, *sets)
    first = workspace.run("embed-items", *sets)
    assert first["embedded"] == 24
    assert workspace.run("embed-items", *sets)["snapshot"] == first["snapshot"]
    for command in ("train-user", "build-index", "evaluate", "compare-runs"):
        workspace.run(command, *sets)
    before = workspace.run("recommend", "--user", "u0", *sets)["items"]
    shutil.rmtree(tmp_path / "copies", ignore_errors=True)
    assert workspace.run("recommend", "--user", "u0", *sets)["items"] == before
    out = tmp_path / "vectors.parquet"
    assert workspace.run("export-items", "--out", str(out), *sets)["rows"] == pl.read_parquet(out).height == 24
    assert workspace.run("snapshots", "list", *sets)["snapshots"][0]["id"] == first["snapshot"]
    assert "bench" in workspace.fails("bench cache", *sets)["error"]
    assert not (workspace.folder / "store").exists()


def test_a_path_is_a_local_store(tmp_path):
    assert type(open_store(str(tmp_path))) is Store


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("s3:/bucket/x", "two slashes"),
        ("s3://", "with a bucket|and a bucket"),
        ("file:///tmp/x", "is no path, nor s3://"),
        ("/tmp/a%2Fb/store", "%2F|encoded"),
    ],
)
def test_an_address_that_cannot_be_a_store_is_refused(where, why):
    with pytest.raises(ConfigError, match=why):
        open_store(where)


def test_a_list_that_the_bucket_does_not_give_now_keeps_what_it_names(store, monkeypatch):
    night(store, "one", TEXTS[:5])
    read = Bucket.read

    def busy(self, name):
        if ".wanted" in name:
            raise StoreError(f"{name}: 503 Service Unavailable")
        return read(self, name)

    items = snapshot_items(scan(TEXTS[:3]), set())
    with announced(store, items):
        assert [len(column) for column in store.announced("key")] == [3]
        monkeypatch.setattr(Bucket, "read", busy)
        with pytest.raises(StoreError, match="503"):
            clean(store, RetentionConfig(days=0, newest=1, job_hours=1))
