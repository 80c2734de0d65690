"""An optimizer from outside put to the test: tuned, run and compared as the recorded ones were."""
