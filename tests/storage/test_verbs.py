"""Data, tokenizers and what commands write, by URL; what takes none says so."""

import json

import pytest

from attnlab import storage
from attnlab.storage.bucket import Bucket, Url
from tests import tiers
from tests.storage.servers import only
from tests.train import runs


@pytest.fixture
def corpus(place, tmp_path):
    """Forty files in a bucket; the glob, and the same on a disk."""
    local = runs.corpus(tmp_path / "corpus")
    Bucket(Url(place)).upload({f"corpus/{p.name}": p for p in (tmp_path / "corpus").iterdir()})
    return f"text:{place}/corpus/*.py", local


@only("gs")
def test_a_corpus_in_a_bucket(place, corpus, store, attnlab, tmp_path):
    """Globs, tokenizer and tokens at URLs give what they give on a disk; copies are read again where they changed."""
    remote, local = corpus
    made = {}
    for source, out in ((remote, place), (local, tmp_path)):
        config = runs.write_config(tmp_path / "c.py", source)
        args = ("--config", config, "--out")
        code, told, err = attnlab("tokenizer", "train", *args, f"{out}/t.json", "--vocab", "300", "--json")
        assert code == 0, err
        tokenizer = f"--config.data.tokenizer={out}/t.json"
        code, told, err = attnlab("tokenizer", "apply", *args, f"{out}/tokens", "--shards", "2", tokenizer, "--json")
        assert code == 0, err
        made[out] = json.loads(told)
    assert made[place]["out_dir"] == f"{place}/tokens" and made[place]["digest"] == made[tmp_path]["digest"]
    bucket = Bucket(Url(place))
    assert bucket.get("t.json") == (tmp_path / "t.json").read_bytes()
    names = {n.removeprefix("tokens/") for n in bucket.listing("tokens")}
    assert names == {p.name for p in (tmp_path / "tokens").iterdir()}
    code, _, err = attnlab("tokenizer", "train", *args, f"{place}/t.json")
    assert code == 2 and f"{place}/t.json exists; name another, or replace it with --overwrite" in err
    code, _, err = attnlab("tokenizer", "apply", *args, f"{place}/corpus")
    assert code == 2 and f"{place}/corpus exists and is not an empty directory" in err

    from attnlab import data

    def batch(source, tokenizer):
        config = runs.config(source, data__tokenizer=tokenizer, model__vocab=300).data
        loader = data.train_loader(config, data.load_tokenizer(tokenizer), seed=0)
        return next(loader)["tokens"].tolist()

    wanted = batch(f"array_record:{tmp_path}/tokens/*.array_record", f"{tmp_path}/t.json")
    source = f"array_record:{place}/tokens/*.array_record"
    assert batch(source, f"{place}/t.json") == wanted
    before = [path for method, path in store.proxy.requests if method == "GET"]
    assert batch(source, f"{place}/t.json") == wanted
    after = [path for method, path in store.proxy.requests if method == "GET"][len(before) :]
    assert not [path for path in after if "array_record" in path and "prefix" not in path and "alt=media" in path]
    name = next(n for n in bucket.listing("tokens") if n.endswith(".array_record"))
    bucket.put(name, bucket.get(name)[:-1] + b"x")  # another object by now
    code, _, err = attnlab("train", "--config", config, "--workdir", tmp_path / "w", f"--config.data.source={source}",
                           f"--config.data.tokenizer={place}/t.json", "--config.model.vocab=300")  # fmt: skip
    assert code == 2 and f"{place}/{name} is damaged" in err


@only("s3")
@tiers.exhaustive
def test_a_report_of_runs_in_a_bucket(place, attnlab, tmp_path):
    """Workdirs that are URLs, or a directory of them, are compared as others; the report goes where it is told to."""
    source = runs.corpus(tmp_path / "corpus")
    for name, rate in (("a", 1e-2), ("b", 1e-3)):
        for seed in (0, 1):
            more = {"optimizer__learning_rate": rate, "optimizer__schedule": "constant", "train__sample_tokens": 0}
            config = runs.config(source, seed=seed, **more)
            runs.run(config, Url(f"{place}/{name}{seed}"))
    code, out, err = attnlab("report", place, "--out", f"{place}/report", "--json")
    assert code == 0, err
    assert json.loads(out)["report"] == f"{place}/report/report.html"
    bucket = Bucket(Url(place))
    assert {"report/report.html", "report/results.csv", "report/results.json"} <= set(bucket.listing("report"))
    text = bucket.get("report/results.json").decode()
    assert len(json.loads(text)["runs"]) == 4 and str(tmp_path / "staging") not in text
    code, out, err = attnlab("report", f"{place}/report", "--json")
    assert code == 0, err


@pytest.mark.parametrize(
    "args, names",
    [
        (("tune", "--out", "URL", "--target", "v6e"), "--out"),
        (("generate", "--workdir", "runs/none", "--prompt-file", "URL"), "--prompt-file"),
        (("train", "--config", "configs/lm.py", "--workdir", "http://a/b"), "--workdir"),
    ],
)
def test_what_takes_no_url(attnlab, args, names):
    """It is refused by the name of its argument, before anything is done."""
    code, _, err = attnlab(*(arg.replace("URL", "gs://bucket-of-nobody/a") for arg in args))
    assert code == 2 and f"argument {names}: " in err and "allowed: " in err


def test_a_cache_is_local(attnlab):
    code, _, err = attnlab("cost", "--config", "configs/lm.py", "--config.data.cache=gs://bucket-of-nobody/a")
    assert code == 2 and "data.cache" in err and "directory" in err
    assert storage.is_url("gs://a")
