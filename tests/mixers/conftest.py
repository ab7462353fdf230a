"""The batteries' order: laws share a config's programs while these are in memory, so they come config by config."""


def pytest_collection_modifyitems(items):
    for name in ("test_contract.py", "test_contract_chunks.py", "test_contract_declared.py"):
        places = [i for i, item in enumerate(items) if item.path.name == name]
        first = {}
        tests = sorted((items[i] for i in places), key=lambda item: first.setdefault(_config(item), len(first)))
        for i, item in zip(places, tests, strict=True):
            items[i] = item


def _config(item):
    """The id of the config, or the name of a test that has none."""
    call = getattr(item, "callspec", None)
    return call.id if call is not None and "config" in call.params else item.originalname
