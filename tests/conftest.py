import gc


def pytest_collection_finish():
    """Let a collection of garbage pass over what importing the tests has made: torch alone is a million objects."""
    gc.collect()
    gc.freeze()
