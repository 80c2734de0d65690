"""The same search for the settings of every optimizer, on the validation split at the tuning seed."""
