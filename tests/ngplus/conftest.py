"""Makes this folder importable, so that tests in folders below it find `oracle`."""
