"""The parts of the report page, a module each."""
