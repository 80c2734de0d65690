"""What datasets share: files, checksums, packages, sampling, and below it structures of atoms and parallel text."""
