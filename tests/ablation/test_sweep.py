"""The sweep language: lists of flat dicts."""

from __future__ import annotations

import pytest

from attnlab.ablation.sweep import chain, default, named, param, prefix, prod, subsample, where, zipit
from attnlab.errors import ConfigError


def test_combinators():
    """Each gives the points that its docstring says, in order, and changes none of its arguments."""
    a, b = param("a", 1, 2), param("b", "x", "y")
    assert prod(a, b) == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]
    assert zipit(a, b) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert chain(a, b) == [*a, *b]
    assert prefix("m.M", a) == [{"m.M.a": 1}, {"m.M.a": 2}]
    assert default({"a": 0, "c": 3}, chain(a, b))[2] == {"a": 0, "c": 3, "b": "x"}
    assert where(lambda p: p["a"] > 1, a) == [{"a": 2}]
    many = param("a", *range(100))
    few = subsample(5, many, seed=1)
    assert few == subsample(5, many, seed=1) != subsample(5, many, seed=2)
    assert len(few) == 5 and [p["a"] for p in few] == sorted(p["a"] for p in few)
    assert prod() == [{}] and (a, b) == (param("a", 1, 2), param("b", "x", "y"))


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: zipit(param("a", 1, 2), param("b", 1)), "[2, 1]"),
        (lambda: prod(param("a", 1), param("a", 2)), "a is set by two"),
        (lambda: subsample(3, param("a", 1), 0), "count = 3"),
        (lambda: param("a"), "one value or more"),
        (lambda: named([{"a": 1}, {"a": 1}]), "points 1 and 2"),
    ],
)
def test_refused(make, says):
    """What cannot be meant is an error that says why; nothing is cut silently."""
    with pytest.raises(ConfigError) as error:
        make()
    assert says in str(error.value)


def test_names_are_what_differs():
    """Keys that all points share are in no name; a name is as short as tells its keys apart, and a directory's."""
    points = prod(param("model.width", 8), param("model.mixers.M.name", "flow", "moh"), param("data.source", "a/b"))
    assert list(named(points)) == ["M=flow", "M=moh"]
    points = prod(param("x.rate", 1, 2), param("y.rate", 1, 2), param("path", "a/b", "c d"))
    assert list(named(points))[:2] == ["x.rate=1,y.rate=1,path=a_b", "x.rate=1,y.rate=1,path=c_d"]
    assert named([{"a": 1}, {}]) == {"a=1": {"a": 1}, "base": {}}
