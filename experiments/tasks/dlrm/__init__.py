"""DLRM on click logs: Criteo's, and flights below it."""
